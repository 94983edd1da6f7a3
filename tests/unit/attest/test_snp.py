from __future__ import annotations

import json
import warnings

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest import Attester
from cloister.attest._simulated import snpreport
from cloister.attest._simulated.amd_root import (
    GUEST_POLICY,
    SIMULATED_MEASUREMENT,
    TCB_LEVELS,
    SimulatedAmdRoot,
    SimulatedSnpAttester,
)
from cloister.attest._verifiers import snp_certs
from cloister.attest._verifiers.snp_report import _product, parse_report, tcb_parts
from cloister.errors import AttestationError, MalformedEvidenceError

NOW = 1_800_000_000
HOST_DATA = b"\x5a" * 32
PSS = padding.PSS(padding.MGF1(SHA384()), 48)


@pytest.fixture(scope="module")
def amd() -> SimulatedAmdRoot:
    return SimulatedAmdRoot(now=NOW)


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("version", [2, 3, 5])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_what_is_written_is_what_is_read(product, version, kind):
    levels = {name: dict.fromkeys(snpreport.TCB_LAYOUTS[product], 0) for name in ("tcb", "current", "launch")}
    for i, name in enumerate(levels):
        levels[name] = {part: 10 * i + j for j, part in enumerate(levels[name])}
    fields = snpreport.SnpFields(
        product=product,
        signing_key=snpreport.SIGNING_KEYS[kind],
        report_data=bytes(range(64)),
        measurement=b"m" * 48,
        host_data=b"h" * 32,
        chip_id=b"c" * 64,
        guest_policy=GUEST_POLICY,
        version=version,
        vmpl=2,
        author_key=True,
        **levels,
    )
    body = snpreport.report_body(fields)
    assert len(body) == 0x2A0
    report = parse_report(body + snpreport.signature(7, 9))
    assert (report.version, report.vmpl, report.guest_svn, report.signer) == (version, 2, 4, kind)
    assert (report.report_data, report.measurement, report.host_data) == (bytes(range(64)), b"m" * 48, b"h" * 32)
    assert (report.chip_id, report.guest_policy, report.r, report.s) == (b"c" * 64, GUEST_POLICY, 7, 9)
    assert (report.family_id, report.image_id) == (b"SIMULATED family", b"SIMULATED image ")
    assert (report.id_key_digest, report.author_key_digest) == (bytes(48), b"\xaa" * 48)
    assert report.author_key_enabled
    assert report.platform_info == 1
    assert report.product == (None if version == 2 else product)
    assert report.signed == body
    parts = {name: tcb_parts(raw, product) for name, raw in report.tcb.items()}
    expected = {"reported": levels["tcb"], "committed": levels["tcb"]}
    assert parts == expected | {"current": levels["current"], "launch": levels["launch"]}


def test_fields_are_where_the_abi_puts_them(amd):
    """By the published offsets, apart from the tables of writer and reader."""
    blob = SimulatedSnpAttester(amd, host_data=HOST_DATA, kind="vlek", vmpl=3).evidence(b"r" * 64).blob
    assert len(blob) == 1184
    assert blob[0:4] == b"\x03\0\0\0"
    assert blob[0x08:0x10] == GUEST_POLICY.to_bytes(8, "little")
    assert blob[0x30:0x38] == b"\x03\0\0\0\x01\0\0\0"
    assert blob[0x48:0x4C] == b"\x04\0\0\0"
    assert blob[0x50:0x90] == b"r" * 64
    assert blob[0x90:0xC0] == SIMULATED_MEASUREMENT
    assert blob[0xC0:0xE0] == HOST_DATA
    assert blob[0x188:0x18B] == b"\x19\x01\x01"
    assert blob[0x1A0:0x1E0] == amd.chip_id
    for at in (0x38, 0x180, 0x1E0, 0x1F0):
        assert blob[at : at + 8] == bytes([4, 1, 0, 0, 0, 0, 24, 219])
    assert snpreport.tcb_version(TCB_LEVELS, "turin") == bytes([2, 4, 1, 24, 0, 0, 0, 219])


@pytest.mark.parametrize(
    ("family", "model", "product"),
    [
        (0x19, 0x00, "milan"),
        (0x19, 0x0F, "milan"),
        (0x19, 0x10, "genoa"),
        (0x19, 0x1F, "genoa"),
        (0x19, 0xA0, "genoa"),
        (0x19, 0xAF, "genoa"),
        (0x1A, 0x02, "turin"),
        (0x1A, 0x11, "turin"),
    ],
)
def test_products_by_cpuid(family, model, product):
    assert _product(family, model) == product


@pytest.mark.parametrize(("family", "model"), [(0x17, 0x31), (0x19, 0x20), (0x19, 0x9F), (0x19, 0xB0), (0x1A, 0x50)])
def test_processors_that_are_none_of_them(family, model):
    with pytest.raises(MalformedEvidenceError, match="unknown processor"):
        _product(family, model)


def test_certificates_are_byte_true(amd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of the serial number 0, which is AMD's
        leaf = x509.load_der_x509_certificate(amd.certificates["vcek"])
        assert leaf.serial_number == 0
    ask = x509.load_der_x509_certificate(amd.certificates["ask"])
    key = ask.public_key()
    assert key.key_size == 4096
    key.verify(leaf.signature, leaf.tbs_certificate_bytes, PSS, SHA384())
    values = {e.oid.dotted_string.removeprefix("1.3.6.1.4.1.3704.1."): e.value.value for e in leaf.extensions}
    assert values["2"] == b"\x16\x08Milan-B0"
    assert values["3.1"] == b"\x02\x01\x04"
    assert values["3.8"] == b"\x02\x02\x00\xdb"
    assert values["4"] == amd.hw_id
    for der in amd.certificates.values():
        assert snp_certs.load_certificate(der, "").subject.rfc4514_string().startswith(("CN=SIMULATED", "O=cloister"))


def test_serial_number_0_is_read_without_a_warning(amd):
    leaf = snp_certs.load_certificate(amd.certificates["vcek"], "VCEK")
    assert leaf.serial == 0
    assert leaf.signed[11] == 0
    assert leaf.signed == amd.certificates["vcek"][4 : 4 + len(leaf.signed)]
    assert snp_certs.load_certificate(amd.certificates["ask"], "ASK").serial > 0


def test_lengths_of_signed_parts():
    for size, header in ((5, b"\x30\x05"), (200, b"\x30\x81\xc8"), (300, b"\x30\x82\x01\x2c")):
        inner = header + bytes(size)
        whole = b"\x30\x82" + (len(inner) + 3).to_bytes(2) + inner + b"sig"
        assert snp_certs._signed_part(whole) == inner


def test_two_roots_share_a_key_and_no_pin(amd):
    other = SimulatedAmdRoot(now=NOW)
    assert other.root_sha256 != amd.root_sha256
    assert other.hw_id != amd.hw_id
    assert amd.root_sha256[:16] in repr(amd)


def test_is_an_attester(amd):
    made: Attester = SimulatedSnpAttester(amd, host_data=HOST_DATA)
    assert made.type == "simulated-snp"
    assert "SIMULATED" in made.binding
    claims = made.claims()
    assert claims["simulated"] is True
    assert claims["host_data"] == HOST_DATA.hex()
    assert json.loads(json.dumps(claims)) == claims


def test_sealing_key_is_bound_to_chip_code_and_label(amd):
    key = SimulatedSnpAttester(amd, host_data=HOST_DATA).sealing_key("checkpoint")
    keys = {
        key,
        SimulatedSnpAttester(amd, host_data=HOST_DATA).sealing_key("report"),
        SimulatedSnpAttester(amd, host_data=bytes(32)).sealing_key("checkpoint"),
        SimulatedSnpAttester(amd, host_data=HOST_DATA, measurement=bytes(48)).sealing_key("checkpoint"),
        SimulatedSnpAttester(SimulatedAmdRoot(now=NOW), host_data=HOST_DATA).sealing_key("checkpoint"),
    }
    assert len(key) == 32
    assert len(keys) == 5
    assert SimulatedSnpAttester(amd, host_data=HOST_DATA).sealing_key("checkpoint") == key


def test_nothing_secret_is_shown(amd):
    made = SimulatedSnpAttester(amd, host_data=HOST_DATA)
    shown = repr(amd) + repr(made) + json.dumps(made.claims())
    assert amd.fuse_key.hex() not in shown
    assert repr(amd.fuse_key)[2:-1] not in shown


def test_wrong_lengths(amd):
    for registers in ({"host_data": bytes(31)}, {"host_data": HOST_DATA, "measurement": bytes(32)}):
        with pytest.raises(AttestationError, match="host_data is"):
            SimulatedSnpAttester(amd, **registers)
    with pytest.raises(AttestationError, match="report_data"):
        SimulatedSnpAttester(amd, host_data=HOST_DATA).evidence(bytes(32))
