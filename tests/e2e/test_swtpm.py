"""A real software TPM: quotes, measurements, sealing and the counter, over loopback sockets."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister.attest import Policy, verify_evidence
from cloister.attest._attesters.tpm_device import DeviceTpm
from cloister.attest._attesters.tpm_port import expected_pcr
from cloister.attest._attesters.vtpm import COUNTER_INDEX, SEALED_NAME, VtpmAttester
from cloister.channel import CountedFile
from cloister.errors import AttestationError, CloisterError, MeasurementMismatchError, RollbackError

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))
EVENTS = [bytes([i]) * 48 for i in range(4)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("tpm2_pytss") is None, reason="the extra cloister[vtpm] is missing"),
]


def free_ports() -> int:
    """A port whose successor is free too: swtpm's control channel is on the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class SoftwareTpm:
    """swtpm as a foreground child with its state in a folder; starting it again is a restart of the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._open: list[DeviceTpm] = []
        self.tcti = ""

    def start(self) -> None:
        port = free_ports()
        self.tcti = f"swtpm:host=127.0.0.1,port={port}"
        place = "type=tcp,bindaddr=127.0.0.1,port="
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._folder}", "--server", f"{place}{port}"]
        command += ["--ctrl", f"{place}{port + 1}", "--flags", "not-need-init,startup-clear"]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.device().close()
            except AttestationError:
                assert self._process.poll() is None, "swtpm has ended"
                assert time.monotonic() < deadline, "swtpm does not answer"
                time.sleep(0.05)

    def stop(self) -> None:
        for device in self._open:
            device.close()
        self._open.clear()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)

    def restart(self) -> None:
        self.stop()
        self.start()

    def device(self, **options) -> DeviceTpm:
        # swtpm serves one connection at a time, as /dev/tpm0 does: the one before must be let go.
        for device in self._open:
            device.close()
        self._open = [DeviceTpm(self.tcti, **options)]
        return self._open[0]

    def attester(self, folder: Path | None = None, events=EVENTS, **options) -> VtpmAttester:
        return VtpmAttester(port=self.device(**options), events=events, folder=folder)


@pytest.fixture(scope="module")
def tpm(tmp_path_factory):
    made = SoftwareTpm(tmp_path_factory.mktemp("swtpm"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def fresh(tpm):
    """The TPM after a restart of the machine: PCRs are zero, the rest is kept."""
    tpm.restart()
    return tpm


def policy_for(attester: VtpmAttester, pcr15: bytes) -> Policy:
    text = f"""
version = 1
accept = ["vtpm"]
allow_simulated = true
[vtpm]
ak_source = ["software"]
software_ak_sha256 = ["{attester.ak_sha256}"]
[roles.server.vtpm]
pcr15 = ["{pcr15.hex()}"]
"""
    return Policy.parse(text.encode())


def verify(attester: VtpmAttester, policy: Policy, *, expected: bytes = REPORT_DATA):
    return verify_evidence(attester.evidence(REPORT_DATA), policy, role="server", report_data=expected, now=NOW)


@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
def test_quote_is_accepted_and_is_simulated(fresh, algorithm):
    attester = fresh.attester(algorithm=algorithm)
    decision = verify(attester, policy_for(attester, expected_pcr(EVENTS)))
    claims = decision.claims
    assert claims.simulated
    assert claims.details["root"] == "software TPM"
    assert claims.details["binding"] == "extraData"
    assert claims.report_data == REPORT_DATA
    assert claims.measurements["pcr15"] == expected_pcr(EVENTS).hex()
    assert len(claims.measurements) == 24
    assert any("SIMULATED" in limit for limit in decision.limits)
    assert attester.manufacturer == "software TPM (IBM SW TPM)"
    assert attester.claims()["simulated"] is True


def test_attestation_key_outlives_a_restart(fresh):
    before = fresh.attester().ak_sha256
    fresh.restart()
    assert fresh.attester().ak_sha256 == before


def test_another_nonce(fresh):
    attester = fresh.attester()
    with pytest.raises(MeasurementMismatchError, match="not of this session"):
        verify(attester, policy_for(attester, expected_pcr(EVENTS)), expected=bytes(64))


def test_one_event_more_is_other_code(fresh):
    attester = fresh.attester()
    policy = policy_for(attester, expected_pcr(EVENTS))
    verify(attester, policy)
    attester.extend_runtime(b"x" * 48)
    with pytest.raises(MeasurementMismatchError, match="pcr15"):
        verify(attester, policy)
    verify(attester, policy_for(attester, expected_pcr([*EVENTS, b"x" * 48])))


def test_a_predecessor_has_extended_already(fresh):
    fresh.attester(events=EVENTS[:2])
    attester = fresh.attester()
    verify(attester, policy_for(attester, expected_pcr(EVENTS)))


def test_others_have_extended_the_register(fresh):
    fresh.device().extend_pcr(15, b"z" * 32)
    with pytest.raises(AttestationError, match="no state of this job"):
        fresh.attester()


def test_somebody_extends_the_register_later(fresh):
    device = fresh.device()
    attester = VtpmAttester(port=device, events=EVENTS)
    device.extend_pcr(15, b"z" * 32)
    with pytest.raises(AttestationError, match="has changed since"):
        attester.evidence(REPORT_DATA)


def test_sealing_key_is_stable_and_gone_after_a_change(fresh, tmp_path):
    attester = fresh.attester(tmp_path)
    key = attester.sealing_key("adapter")
    assert len(key) == 32
    assert attester.sealing_key("adapter") == key
    assert attester.sealing_key("other") != key
    fresh.restart()
    attester = fresh.attester(tmp_path)
    assert attester.sealing_key("adapter") == key
    attester.extend_runtime(b"x" * 48)
    with pytest.raises(AttestationError, match="release the sealed secret"):
        attester.sealing_key("adapter")
    fresh.restart()
    with pytest.raises(AttestationError, match="release the sealed secret"):
        fresh.attester(tmp_path, events=EVENTS[:3]).sealing_key("adapter")


def test_sealed_secret_of_another_tpm(fresh, tmp_path, tmp_path_factory):
    fresh.attester(tmp_path).sealing_key("adapter")
    other = SoftwareTpm(tmp_path_factory.mktemp("other-swtpm"))
    other.start()
    try:
        with pytest.raises(AttestationError, match="release the sealed secret"):
            other.attester(tmp_path).sealing_key("adapter")
    finally:
        other.stop()


@pytest.mark.parametrize("damage", [lambda blob: blob[:40], lambda blob: b"\0" * len(blob), lambda blob: b""])
def test_damaged_sealed_secret(fresh, tmp_path, damage):
    attester = fresh.attester(tmp_path)
    attester.sealing_key("adapter")
    path = tmp_path / SEALED_NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AttestationError):
        attester.sealing_key("adapter")


def test_counter_only_grows_over_restarts(fresh, tmp_path):
    counter = fresh.attester(tmp_path).counter()
    assert counter.value() == 0
    assert [counter.increment() for _ in range(3)] == [1, 2, 3]
    counter.advance(5)
    counter.advance(2)
    fresh.restart()
    counter = fresh.attester(tmp_path).counter()
    assert counter.value() == 5
    assert counter.increment() == 6


def test_counter_that_was_deleted_and_made_anew(fresh, tmp_path):
    """It starts above every value that it had, so that old files never look like the newest."""
    attester = fresh.attester(tmp_path)
    counter = attester.counter()
    counter.advance(2)
    device = attester._port
    esys = device._esys
    esys.nv_undefine_space(esys.tr_from_tpmpublic(COUNTER_INDEX))
    with pytest.raises(AttestationError, match="is not the one"):
        counter.value()
    with pytest.raises(AttestationError, match="is not the one"):
        counter.increment()
    device.increment_counter(COUNTER_INDEX)
    assert attester.counter().value() > 2


def test_an_index_that_is_no_counter(fresh, tmp_path):
    import tpm2_pytss as t

    device = fresh.device()
    index = COUNTER_INDEX + 1
    public = t.TPMS_NV_PUBLIC(
        nvIndex=index,
        nameAlg=t.TPM2_ALG.SHA256,
        attributes=t.TPMA_NV.AUTHREAD | t.TPMA_NV.AUTHWRITE | t.TPMA_NV.OWNERREAD | t.TPMA_NV.OWNERWRITE,
        dataSize=1300,
    )
    handle = device._esys.nv_define_space(None, t.TPM2B_NV_PUBLIC(public))
    content = hashlib.shake_256(b"nv").digest(1300)
    for at in range(0, 1300, 512):
        device._esys.nv_write(handle, content[at : at + 512], at)
    try:
        assert device.read_nv(index) == content  # in several reads
        attester = VtpmAttester(port=device, events=EVENTS, folder=tmp_path, counter_index=index)
        with pytest.raises(AttestationError, match="is no counter"):
            attester.counter()
        assert not (tmp_path / SEALED_NAME).exists()
    finally:
        device._esys.nv_undefine_space(handle)


def test_rolled_back_sealed_file(fresh, tmp_path):
    attester = fresh.attester(tmp_path)
    path = tmp_path / "state.sealed"
    file = CountedFile(path, key=attester.sealing_key("state"), label="state", counter=attester.counter())
    assert file.read() is None
    file.write(b"first")
    old = path.read_bytes()
    file.write(b"second")
    path.write_bytes(old)
    fresh.restart()
    attester = fresh.attester(tmp_path)
    file = CountedFile(path, key=attester.sealing_key("state"), label="state", counter=attester.counter())
    with pytest.raises(RollbackError):
        file.read()


def test_ready_key_under_a_persistent_handle(fresh):
    handle = 0x81000C15
    device = fresh.device()
    with device._key() as (made, _):
        ready = device._esys.evict_control(device._t.ESYS_TR.OWNER, made, handle)
    spki = device.attestation_key()
    device = fresh.device(key_handle=handle)
    try:
        assert device.attestation_key() == spki
        attester = VtpmAttester(port=device, events=EVENTS)
        verify(attester, policy_for(attester, expected_pcr(EVENTS)))
    finally:
        ready = device._esys.tr_from_tpmpublic(handle)
        device._esys.evict_control(device._t.ESYS_TR.OWNER, ready, handle)
    with pytest.raises(AttestationError, match="attestation key"):
        device.attestation_key()


def test_nothing_there_to_read(fresh):
    with pytest.raises(AttestationError, match="NV index 0x01400001"):
        fresh.device().read_nv(0x01400001)


def test_a_bank_that_is_off(fresh, monkeypatch):
    device = fresh.device()
    monkeypatch.setattr("cloister.attest._attesters.tpm_device._selection", lambda pcrs: "sha512:0,1")
    with pytest.raises(AttestationError, match="no SHA-256 bank"):
        device.read_pcrs((0, 1))


@pytest.mark.parametrize("tcti", ["device:/dev/no-such-tpm", "swtpm:host=127.0.0.1,port=1", "nonsense:x", ""])
def test_a_tpm_that_is_not_there_is_one_error(tcti):
    """And nothing but our error: the C library would write its own lines to stderr."""
    code = (
        "import sys\n"
        "from cloister.attest._attesters.vtpm import VtpmAttester\n"
        "from cloister.errors import CloisterError\n"
        "try:\n    VtpmAttester(sys.argv[1])\n"
        "except CloisterError as error:\n    print(error.code, error, '|', error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tcti], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith(f"attest no TPM at {tcti}")
    assert "driver" in done.stdout


def test_errors_are_ours(fresh):
    with pytest.raises(CloisterError):
        fresh.device().quote(b"x" * 65, (0,))
