"""The SNP attester in a played guest: HOST_DATA, certificates, derived keys, and the device call byte by byte."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from tests.unit.attest.fake_tsm import FakeTsm

from cloister.attest import Attester, SnpAttester, expected_host_data
from cloister.attest._attesters import snp
from cloister.errors import AttestationError

DATA = bytes(range(64))
REGISTER = b"\x33" * 48
HOST_DATA = hashlib.sha256(REGISTER).digest()
MEASUREMENT = b"\x77" * 48


class Firmware:
    """Hands out reports and keys of one guest."""

    def __init__(self) -> None:
        self.host_data = HOST_DATA
        self.certificates = b"a certificate table"
        self.requests: list[bytes] = []
        self.response = bytes(32) + b"\x5a" * 32
        self.size = 1184
        self.levels: list[int] = []

    def report(self, inblob: bytes, level: int) -> tuple[bytes, bytes]:
        self.levels.append(level)
        blob = bytearray(1184)
        blob[0x50:0x90], blob[0x90:0xC0], blob[0xC0:0xE0] = inblob, MEASUREMENT, self.host_data
        return bytes(blob[: self.size]), self.certificates

    def derive(self, request: bytes) -> bytes:
        self.requests.append(request)
        return self.response


@pytest.fixture
def firmware() -> Firmware:
    return Firmware()


@pytest.fixture
def guest(firmware) -> FakeTsm:
    return FakeTsm(firmware.report, provider="sev_guest")


def attester(guest: FakeTsm, certificates: bytes | Path | None = None, **options) -> SnpAttester:
    options.setdefault("register", REGISTER)
    return SnpAttester(certificates, fs=guest, sleep=lambda _: None, **options)


def test_evidence(guest, firmware):
    subject: Attester = attester(guest)
    evidence = subject.evidence(DATA)
    assert (evidence.type, subject.binding) == ("snp", "ATTESTATION_REPORT.REPORT_DATA")
    assert (evidence.blob[0x50:0x90], len(evidence.blob), evidence.aux) == (DATA, 1184, b"a certificate table")
    assert firmware.levels == [0, 0]
    assert subject.claims() == {
        "tee": "snp",
        "evidence_type": "snp",
        "simulated": False,
        "measurement": MEASUREMENT.hex(),
        "host_data": HOST_DATA.hex(),
    }
    assert HOST_DATA.hex()[:16] in repr(subject)


def test_privilege_level(guest, firmware):
    attester(guest, vmpl=2).evidence(DATA)
    assert firmware.levels == [2, 2]


def test_host_data_is_the_hash_of_the_register():
    assert expected_host_data(REGISTER) == HOST_DATA
    with pytest.raises(AttestationError, match="run-time register is 32 bytes, not 48"):
        expected_host_data(bytes(32))


@pytest.mark.parametrize("other", [bytes(32), hashlib.sha256(b"\x34" * 48).digest()])
def test_a_guest_that_was_launched_for_something_else_does_not_start(guest, firmware, other):
    firmware.host_data = other
    with pytest.raises(AttestationError, match=f"HOST_DATA of this guest is {other.hex()}") as caught:
        attester(guest)
    assert "cloister measure" in caught.value.hint


def test_a_process_that_loaded_something_else_does_not_start(guest):
    with pytest.raises(AttestationError, match="HOST_DATA"):
        attester(guest, register=b"\x34" * 48)


def test_report_of_another_size(guest, firmware):
    firmware.size = 1183
    with pytest.raises(AttestationError, match="1183 bytes, not 1184"):
        attester(guest)


def test_a_report_over_other_data(guest, firmware):
    subject = attester(guest)
    guest.driver = lambda inblob, level: firmware.report(inblob[::-1], level)
    with pytest.raises(AttestationError, match="does not carry the report data"):
        subject.evidence(DATA)


# --- certificates ---------------------------------------------------------------------------------------------------


def test_certificates_of_a_file_go_before_those_of_the_host(guest, tmp_path):
    path = tmp_path / "chain.pem"
    path.write_bytes(b"a PEM chain")
    subject = attester(guest, path)
    assert subject.evidence(DATA).aux == b"a PEM chain"
    path.write_bytes(b"a renewed chain")
    assert subject.evidence(DATA).aux == b"a renewed chain"
    assert attester(guest, b"bytes").evidence(DATA).aux == b"bytes"


def test_no_certificates(guest, firmware, tmp_path):
    firmware.certificates = b""
    with pytest.raises(AttestationError, match="hands out no SNP certificates") as caught:
        attester(guest)
    assert "cloister collateral fetch" in caught.value.hint
    with pytest.raises(AttestationError, match=r"SNP certificates .*missing\.pem cannot be read"):
        attester(guest, tmp_path / "missing.pem")


# --- sealing keys ---------------------------------------------------------------------------------------------------


def test_sealing_key(guest, firmware):
    subject = attester(guest, keys=firmware)
    info = b"".join(len(p).to_bytes(4, "big") + p for p in (b"cloister-sealing/v1", REGISTER, b"shards"))
    assert subject.sealing_key("shards") == HKDF(hashes.SHA384(), 32, salt=None, info=info).derive(b"\x5a" * 32)
    assert subject.sealing_key("shards") != subject.sealing_key("other")
    # root key, reserved, fields (policy, image, family, measurement), VMPL, guest SVN, TCB version
    assert firmware.requests[0] == bytes(8) + (15).to_bytes(8, "little") + bytes(16)


def test_sealing_key_depends_on_register_and_level(guest, firmware):
    first = attester(guest, keys=firmware).sealing_key("shards")
    firmware.host_data = hashlib.sha256(b"\x34" * 48).digest()
    assert attester(guest, keys=firmware, register=b"\x34" * 48, vmpl=2).sealing_key("shards") != first
    assert firmware.requests[1][16:20] == (2).to_bytes(4, "little")


@pytest.mark.parametrize(
    "response", [b"\x16" + bytes(31) + b"\x5a" * 32, bytes(64), bytes(32) + b"\x5a" * 31, b""], ids=len
)
def test_a_firmware_that_derives_no_key(guest, firmware, response):
    firmware.response = response
    with pytest.raises(AttestationError, match="derives no key"):
        attester(guest, keys=firmware).sealing_key("shards")


def test_a_device_that_fails(guest, firmware, monkeypatch):
    def fail(request: bytes) -> bytes:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    monkeypatch.setattr(firmware, "derive", fail)
    with pytest.raises(AttestationError, match="/dev/sev-guest derives no key: Inappropriate"):
        attester(guest, keys=firmware).sealing_key("shards")


def test_the_device_is_opened_when_it_is_needed(guest, firmware, monkeypatch, tmp_path):
    subject = attester(guest)
    monkeypatch.setattr(snp, "SevGuestDevice", lambda: firmware)
    assert len(subject.sealing_key("shards")) == 32
    assert len(subject.sealing_key("other")) == 32
    monkeypatch.undo()
    with pytest.raises(AttestationError, match=r"cannot open .*sev-guest: No such file"):
        snp.SevGuestDevice(tmp_path / "sev-guest")


def test_device_call(tmp_path, monkeypatch):
    """The call as linux/sev-guest.h has it; the buffers are those of this process."""
    path = tmp_path / "sev-guest"
    path.write_bytes(b"")
    calls: list[tuple[int, int, int, bytes]] = []
    addresses: list[int] = []

    def ioctl(descriptor: int, operation: int, argument: ctypes.Structure) -> int:
        raw = bytes(argument)
        assert len(raw) == 32
        version, request, response, error = (int.from_bytes(raw[i : i + 8], "little") for i in range(0, 32, 8))
        calls.append((operation, version, error, ctypes.string_at(request, 32)))
        ctypes.memmove(response, bytes(32) + b"\x5a" * 32, 64)
        addresses.append(response)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    device = snp.SevGuestDevice(path)
    assert device.derive(b"\x11" * 32) == bytes(32) + b"\x5a" * 32
    assert calls == [(0xC0205301, 1, 0, b"\x11" * 32)]
    descriptor = device._descriptor
    assert not os.get_inheritable(descriptor)
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_file_that_is_no_device(tmp_path):
    path = tmp_path / "sev-guest"
    path.write_bytes(b"")
    device = snp.SevGuestDevice(path)
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        device.derive(bytes(32))
    device.close()
