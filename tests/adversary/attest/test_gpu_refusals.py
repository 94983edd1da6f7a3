"""Every reason to refuse a GPU's report, each with a test of its own."""

from __future__ import annotations

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attest import Policy, verify_evidence
from cloister.attest._simulated import gpu as simulated
from cloister.attest._simulated.gpu import CertificateOptions, SimulatedGpu, SimulatedGpuRoot
from cloister.attest._verifiers import gpu_report
from cloister.attest._verifiers.gpu import verify_gpu
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

NOW = 1_800_000_000
YEAR = 365 * 86400
NONCE = bytes(range(32))
ONE = simulated.simulated_measurement(1).hex()
FWID = (simulated.fwid_extension(), False)


@pytest.fixture(scope="module")
def root() -> SimulatedGpuRoot:
    return SimulatedGpuRoot(now=NOW)


@pytest.fixture(scope="module")
def gpu(root) -> SimulatedGpu:
    return root.device()


def policy_text(root: SimulatedGpuRoot, **changes: str) -> str:
    lines = {
        "driver": f'["{simulated.SIMULATED_DRIVER}"]',
        "vbios": f'["{simulated.SIMULATED_VBIOS}"]',
        "measurements.1": f'["{ONE}"]',
        **changes,
    }
    section = "\n".join(f"{key} = {value}" for key, value in lines.items() if value)
    return (
        f'version = 1\naccept = ["with-gpu"]\nallow_simulated = true\n[roots]\nnvidia_sha256 = ["{root.root_sha256}"]\n'
        f"[gpu]\n{section}\n"
    )


def verify(root: SimulatedGpuRoot, evidence: Evidence, text: str = "", *, now: int = NOW):
    return verify_gpu(evidence, Policy.parse((text or policy_text(root)).encode()), now=now)


def refusals(proven) -> dict[type, str]:
    return {finding.error: finding.text for finding in proven.findings.refused}


def test_honest_report_is_proven_and_stamped(root, gpu):
    proven = verify(root, gpu.evidence(NONCE))
    assert refusals(proven) == {}
    assert (proven.claims.tee, proven.claims.simulated, proven.claims.report_data) == ("gpu", True, NONCE)
    assert any("SIMULATED" in line for line in proven.findings.passed)
    assert any("SIMULATED" in line for line in proven.limits)


# The root.


def test_unpinned_root(root):
    other = SimulatedGpuRoot(now=NOW).device()
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        verify(root, other.evidence(NONCE))


def test_simulated_root_without_allow_simulated(root, gpu):
    with pytest.raises(PolicyRejectedError, match="does not allow simulated"):
        verify(root, gpu.evidence(NONCE), policy_text(root).replace("= true", "= false"))


def test_simulated_root_declared_as_real(root, gpu):
    found = gpu.evidence(NONCE)
    with pytest.raises(PolicyRejectedError, match='declared "gpu", and its root is not NVIDIA'):
        verify(root, Evidence("gpu", found.blob, found.aux))


# The chain.


def chain(gpu: SimulatedGpu, *certificates: x509.Certificate, report: bytes | None = None) -> Evidence:
    return Evidence("simulated-gpu", report or gpu.report(NONCE), simulated.pem(*certificates))


def test_missing_chain(root, gpu):
    with pytest.raises(MalformedEvidenceError, match="certificates are missing"):
        verify(root, Evidence("simulated-gpu", gpu.report(NONCE), b""))


def test_chain_that_is_none(root, gpu):
    with pytest.raises(MalformedEvidenceError, match="do not parse"):
        verify(root, Evidence("simulated-gpu", gpu.report(NONCE), b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END"))


def test_oversized_chain(root, gpu):
    with pytest.raises(MalformedEvidenceError, match="over the limit"):
        verify(root, Evidence("simulated-gpu", gpu.report(NONCE), gpu.chain_pem() + bytes(1 << 16)))


@pytest.mark.parametrize("extra", [-2, 5])
def test_chain_of_the_wrong_length(root, gpu, extra):
    certificates = [gpu.leaf, gpu.certificate, root.line] + [root.certificate] * max(extra, 0)
    if extra < 0:
        certificates = [gpu.leaf, root.certificate]
    else:
        certificates.append(root.certificate)
    with pytest.raises(MalformedEvidenceError, match="certificates, not 3 to 8"):
        verify(root, chain(gpu, *certificates))


def test_missing_intermediate(root, gpu):
    with pytest.raises(EvidenceSignatureError, match="an issuer is missing"):
        verify(root, chain(gpu, gpu.leaf, gpu.certificate, root.certificate))


def test_root_that_another_key_signed(root, gpu):
    # Only the last certificate is pinned, and it is pinned whole: what is forged here is the one below.
    stranger = ec.generate_private_key(ec.SECP384R1())
    options = CertificateOptions(is_authority=True)
    line = root.issue("product line", root.line_key.public_key(), "root", stranger, options)
    with pytest.raises(EvidenceSignatureError, match="signature of a certificate"):
        verify(root, chain(gpu, gpu.leaf, gpu.certificate, line, root.certificate))


def test_leaf_that_another_device_signed(root, gpu):
    other = root.device()
    with pytest.raises(EvidenceSignatureError, match="signature of a certificate"):
        verify(root, chain(gpu, gpu.leaf, other.certificate, root.line, root.certificate))


def test_device_whose_certificate_may_not_issue(root):
    gpu = root.device(device=CertificateOptions(is_authority=False, cert_sign=True))
    with pytest.raises(EvidenceSignatureError, match="may not issue"):
        verify(root, gpu.evidence(NONCE))


def test_device_whose_key_may_not_sign_certificates(root):
    gpu = root.device(device=CertificateOptions(is_authority=True, cert_sign=False))
    with pytest.raises(EvidenceSignatureError, match="may not sign certificates"):
        verify(root, gpu.evidence(NONCE))


def test_certificate_that_does_not_say_what_its_key_is_for(root):
    gpu = root.device(device=CertificateOptions(is_authority=True, key_usage=False))
    with pytest.raises(EvidenceSignatureError, match="what its key is for"):
        verify(root, gpu.evidence(NONCE))


def test_chain_deeper_than_the_device_may_issue(root, gpu):
    # A leaf below a leaf: the device's path length is 0, so nothing that it issued may issue.
    authority = CertificateOptions(is_authority=True)
    middle = gpu.issue_leaf(authority)
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = root.issue("deep", key.public_key(), "firmware", gpu.key, CertificateOptions(extensions=(FWID,)))
    with pytest.raises(EvidenceSignatureError, match="may not issue"):
        verify(root, chain(gpu, leaf, middle, gpu.certificate, root.line, root.certificate))


@pytest.mark.parametrize(
    "options",
    [
        CertificateOptions(is_authority=True, cert_sign=False, extensions=(FWID,)),
        CertificateOptions(cert_sign=True, extensions=(FWID,)),
    ],
    ids=["an authority whose key is for reports", "a key for certificates without authority"],
)
def test_report_signed_with_a_key_for_certificates(root, gpu, options):
    with pytest.raises(EvidenceSignatureError, match="not for signing reports"):
        verify(root, chain(gpu, gpu.issue_leaf(options), gpu.certificate, root.line, root.certificate))


def test_unknown_critical_extension(root, gpu):
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    leaf = gpu.issue_leaf(CertificateOptions(extensions=((unknown, True), FWID)))
    with pytest.raises(EvidenceSignatureError, match="critical extension"):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


def test_certificate_with_a_weaker_hash(root, gpu):
    leaf = gpu.issue_leaf(CertificateOptions(digest=hashes.SHA256(), extensions=(FWID,)))
    with pytest.raises(EvidenceSignatureError, match="SHA-384"):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


def test_certificate_of_another_curve(root, gpu):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = gpu.issue_leaf(public_key=key)
    with pytest.raises(EvidenceSignatureError, match="no P-384 key"):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


def test_certificate_whose_extensions_do_not_parse(root, gpu):
    broken = x509.UnrecognizedExtension(x509.KeyUsage.oid, b"\x04\x00")
    leaf = gpu.issue_leaf(CertificateOptions(key_usage=False, extensions=((broken, False),)))
    with pytest.raises(MalformedEvidenceError, match="certificate of the GPU does not parse"):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


def test_certificate_with_one_extension_twice(root, gpu):
    """Found by the fuzzer: `cryptography` has an exception of its own for it."""
    twice = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x04\x00")
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.5"), b"\x04\x00")
    leaf = gpu.issue_leaf(CertificateOptions(extensions=((twice, False), (other, False))))
    der = leaf.public_bytes(serialization.Encoding.DER).replace(
        bytes.fromhex("06032a0305"), bytes.fromhex("06032a0304")
    )
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    honest = chain(gpu, leaf, gpu.certificate, root.line, root.certificate)
    aux = honest.aux.replace(leaf.public_bytes(serialization.Encoding.PEM), pem)
    assert aux != honest.aux
    with pytest.raises(MalformedEvidenceError, match="certificate of the GPU does not parse"):
        verify(root, Evidence(honest.type, honest.blob, aux))


@pytest.mark.parametrize("now", [NOW - YEAR, NOW + 11 * YEAR])
def test_certificates_out_of_their_time(root, gpu, now):
    with pytest.raises(StaleEvidenceError, match="expired or is not valid yet"):
        verify(root, gpu.evidence(NONCE), now=now)


def test_one_certificate_from_the_future(root, gpu):
    start = datetime.datetime.fromtimestamp(NOW + 86400, datetime.UTC)
    leaf = gpu.issue_leaf(CertificateOptions(not_before=start, extensions=(FWID,)))
    with pytest.raises(StaleEvidenceError):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


# The report.


def test_report_of_another_gpu(root, gpu):
    with pytest.raises(EvidenceSignatureError, match="report does not verify"):
        verify(root, Evidence("simulated-gpu", root.device().report(NONCE), gpu.chain_pem()))


def test_nonce_that_was_changed(root, gpu):
    found = gpu.evidence(NONCE)
    blob = found.blob[:4] + bytes(32) + found.blob[36:]
    with pytest.raises(EvidenceSignatureError):
        verify(root, Evidence(found.type, blob, found.aux))


def test_report_that_names_no_firmware(root, gpu):
    fields = simulated.default_fields()
    del fields[gpu_report.FWID]
    with pytest.raises(MalformedEvidenceError, match="does not name its firmware"):
        verify(root, gpu.evidence(NONCE, fields=fields))


def test_certificate_that_names_no_firmware(root, gpu):
    leaf = gpu.issue_leaf(CertificateOptions())
    with pytest.raises(EvidenceSignatureError, match="does not name the firmware"):
        verify(root, chain(gpu, leaf, gpu.certificate, root.line, root.certificate))


def test_certificate_of_other_firmware(root, gpu):
    fields = {**simulated.default_fields(), gpu_report.FWID: b"\x01" * 48}
    with pytest.raises(EvidenceSignatureError, match="other firmware"):
        verify(root, gpu.evidence(NONCE, fields=fields))


BLOCK = simulated.measurement_record({1: b"\x01" * 48})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"request": bytes.fromhex("12e001ff")}, "SPDM 1.1 request"),
        ({"request": bytes.fromhex("11e000ff")}, "SPDM 1.1 request"),
        ({"response": bytes.fromhex("117f")}, "no SPDM 1.1 measurements response"),
        ({"record": b"", "count": 0}, "has 0 measurements"),
        ({"record": BLOCK * 65, "count": 65}, "has 65 measurements"),
        ({"record": BLOCK + b"\0", "count": 1}, "left over after the GPU report's measurements"),
        ({"record": BLOCK, "count": 2}, "cut short"),
        ({"record": BLOCK * 2, "count": 2}, "comes twice"),
        ({"measurements": {65: bytes(48)}}, "out of range"),
        ({"measurements": {0: bytes(48)}}, "out of range"),
        ({"measurements": {1: bytes(32)}}, "no DMTF digest"),
        ({"record": BLOCK[:1] + b"\2" + BLOCK[2:], "count": 1}, "no DMTF digest"),
        ({"record": BLOCK[:2] + b"\x34" + BLOCK[3:], "count": 1}, "no DMTF digest"),
        ({"opaque": simulated.opaque_data({3: b"1"}) * 2}, "comes twice"),
        ({"opaque": simulated.opaque_data(dict.fromkeys(range(65), b""))}, "too many"),
        ({"opaque": b"\3\0\xff\xff"}, "cut short"),
        ({"opaque": b"\3\0\1"}, "cut short"),
        ({"fields": {**simulated.default_fields(), gpu_report.DRIVER: b"5\n0\0"}}, "field 3 .* no text"),
        ({"fields": {**simulated.default_fields(), gpu_report.DRIVER: b""}}, "field 3 .* no text"),
        ({"fields": {**simulated.default_fields(), gpu_report.VBIOS: bytes(7)}}, "VBIOS"),
        ({"fields": {**simulated.default_fields(), gpu_report.VBIOS: bytes(7) + b"\1"}}, "VBIOS"),
    ],
)
def test_malformed_report(root, gpu, changes, match):
    with pytest.raises(MalformedEvidenceError, match=match):
        verify(root, gpu.evidence(NONCE, **changes))


def test_bytes_after_the_signature(root, gpu):
    found = gpu.evidence(NONCE)
    with pytest.raises(MalformedEvidenceError, match="left over after the GPU report's signature"):
        verify(root, Evidence(found.type, found.blob + b"\0", found.aux))


def test_oversized_report(root, gpu):
    with pytest.raises(MalformedEvidenceError, match="the limit is 16384"):
        verify(root, Evidence("simulated-gpu", bytes(16385), gpu.chain_pem()))


def test_every_cut_is_malformed(root, gpu):
    found = gpu.evidence(NONCE)
    for size in range(0, len(found.blob), 7):
        with pytest.raises(MalformedEvidenceError):
            verify(root, Evidence(found.type, found.blob[:size], found.aux))


# The policy.


@pytest.mark.parametrize("name", ["driver", "vbios"])
def test_version_that_is_not_allowed(root, gpu, name):
    found = refusals(verify(root, gpu.evidence(NONCE), policy_text(root, **{name: '["1.2"]'})))
    assert f"gpu: {name} is" in found[PolicyRejectedError]


@pytest.mark.parametrize("name", ["driver", "vbios"])
def test_empty_list_allows_nothing(root, gpu, name):
    found = refusals(verify(root, gpu.evidence(NONCE), policy_text(root, **{name: "[]"})))
    assert "the policy allows nothing" in found[PolicyRejectedError]


@pytest.mark.parametrize("field", [gpu_report.DRIVER, gpu_report.VBIOS, gpu_report.PROTECTED_PCIE])
def test_report_that_does_not_state_what_the_policy_asks(root, gpu, field):
    fields = simulated.default_fields()
    del fields[field]
    text = policy_text(root, driver='[""]', vbios='[""]') if field != gpu_report.PROTECTED_PCIE else ""
    found = verify(root, gpu.evidence(NONCE, fields=fields), text)
    assert any("not stated" in finding.text for finding in found.findings.refused)


def test_mode_that_is_not_allowed(root, gpu):
    fields = {**simulated.default_fields(), gpu_report.PROTECTED_PCIE: gpu_report.STATUS_ON}
    found = refusals(verify(root, gpu.evidence(NONCE, fields=fields)))
    assert "cc_mode is protected_pcie" in found[PolicyRejectedError]


def test_unknown_mode(root, gpu):
    fields = {**simulated.default_fields(), gpu_report.PROTECTED_PCIE: b"\x00"}
    assert "cc_mode is not stated" in refusals(verify(root, gpu.evidence(NONCE, fields=fields)))[PolicyRejectedError]


def test_measurement_of_other_firmware(root, gpu):
    found = refusals(verify(root, gpu.evidence(NONCE, measurements={1: b"\x01" * 48})))
    assert "measurement 1" in found[MeasurementMismatchError]


def test_measurement_that_the_report_lacks(root, gpu):
    found = refusals(verify(root, gpu.evidence(NONCE, measurements={2: b"\x01" * 48})))
    assert "measurement 1 is missing" in found[MeasurementMismatchError]


def test_measurement_without_an_allowed_value(root, gpu):
    found = refusals(verify(root, gpu.evidence(NONCE), policy_text(root, **{"measurements.1": "[]"})))
    assert "measurement 1" in found[PolicyRejectedError]


def test_a_report_alone_is_no_evidence(gpu, root):
    with pytest.raises(PolicyRejectedError, match="unknown"):
        verify_evidence(
            gpu.evidence(NONCE), Policy.parse(policy_text(root).encode()), role="server", report_data=NONCE, now=NOW
        )
