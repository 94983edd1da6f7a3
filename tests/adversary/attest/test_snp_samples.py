"""Real SNP reports of real machines, at a time when their certificates were valid: the production path."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest import Policy, verify_evidence
from cloister.attest._simulated.amd_root import certificate_table, pem_chain
from cloister.attest._verifiers.snp import AMD_ARK_SHA256
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.testing import shared_dir
from cloister.wire import Evidence

NOW = 1_717_200_000  # 2024-06-01
VLEK_NOW = 1_748_736_000  # 2025-06-01
REPORT = "trustee/test-report.bin"
VLEK_REPORT = "trustee/test-vlek-report.bin"
DEBUG_REPORT = "attestation.bin"
MEASUREMENTS = {
    DEBUG_REPORT: "b07af9620f3b839b47996422ddec6058338951d984e312115131ea82705eaf5b6bdf8a9ece31a5a608eb0cf2e4872b01",
    REPORT: "a1f3930413247bb38cfc171579ea3c12d5fe4901f0c792f63fd75d98f1ef827c23500644e0e692e6be917f9050d3d38c",
    VLEK_REPORT: "8922ebbdd00ec2c541f36a6e7a82a8773a7accb451ed67bc94e740dbe92c93c4e8c9af857f5ceeb5a493df2a570d7bf0",
}
LEAVES = {DEBUG_REPORT: "vcek.testcer", REPORT: "trustee/test-vcek.der", VLEK_REPORT: "trustee/test-vlek.der"}
POLICY = f"""
version = 1
accept = ["snp"]
[roots.amd_ark_sha256]
milan = ["{AMD_ARK_SHA256["milan"]}"]
genoa = ["{AMD_ARK_SHA256["genoa"]}"]
turin = ["{AMD_ARK_SHA256["turin"]}"]
[snp]
signer = ["vcek", "vlek"]
max_vmpl = 1
guest_policy = {{ smt = true }}
measurement = [{", ".join(f'"{value}"' for value in MEASUREMENTS.values())}]
[snp.min_tcb.milan]
bootloader = 2
snp = 5
microcode = 68
[roles.server.snp]
host_data = ["{"0" * 64}"]
"""


@pytest.fixture(scope="session")
def samples():
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)")
    return shared / "vectors" / "attestation" / "snp"


def certificates(path) -> list[bytes]:
    return [c.public_bytes(Encoding.DER) for c in x509.load_pem_x509_certificates(path.read_bytes())]


def leaf_der(path) -> bytes:
    content = path.read_bytes()
    if content.startswith(b"-----"):
        return base64.b64decode(b"".join(content.split(b"-----")[2].split()))
    return content


def parts(samples, report: str, *, leaf: str = "", chain: str = "") -> dict[str, bytes]:
    vlek = report == VLEK_REPORT
    issuer, ark = certificates(samples / (chain or ("milanvlek.testcer" if vlek else "milan.testcer")))
    return {"vlek" if vlek else "vcek": leaf_der(samples / (leaf or LEAVES[report])), "issuer": issuer, "ark": ark}


def sample(samples, report: str, *, declared: str = "snp", leaf: str = "", chain: str = "") -> Evidence:
    aux = pem_chain(parts(samples, report, leaf=leaf, chain=chain))
    return Evidence(declared, (samples / report).read_bytes(), aux)


def verify(evidence: Evidence, text: str = POLICY, *, now: int = NOW):
    report_data = evidence.blob[0x50:0x90]
    return verify_evidence(evidence, Policy.parse(text.encode()), role="server", report_data=report_data, now=now)


@pytest.mark.parametrize("form", [pem_chain, certificate_table])
def test_real_vcek_report_is_accepted_at_its_time(samples, form):
    evidence = Evidence("snp", (samples / REPORT).read_bytes(), form(parts(samples, REPORT)))
    decision = verify(evidence)
    claims = decision.claims
    assert not claims.simulated
    assert not claims.debug
    assert claims.root_sha256 == AMD_ARK_SHA256["milan"]
    assert claims.platform_id.startswith("c38427a30d4c7af9")
    assert claims.measurements == {"measurement": MEASUREMENTS[REPORT], "host_data": "0" * 64}
    assert claims.details | {"reported_tcb": "", "id_key_digest": ""} == {
        "product": "milan",
        "report_version": "2",
        "signer": "vcek",
        "vmpl": "0",
        "guest_policy": "0x3001f",
        "guest_svn": "4",
        "platform_info": "0x1",
        "family_id": "01" + "00" * 15,
        "image_id": "02" + "00" * 15,
        "id_key_digest": "",
        "author_key_digest": "",
        "reported_tcb": "",
        "committed_tcb": "bootloader=3 tee=0 snp=8 microcode=115",
        "launch_tcb": "bootloader=3 tee=0 snp=8 microcode=115",
        "current_tcb": "bootloader=3 tee=0 snp=8 microcode=206",
    }
    assert claims.details["id_key_digest"].startswith("0356215882a825279a85")
    assert not any("SIMULATED" in reason for reason in decision.reasons)
    assert any("host_data" in limit for limit in decision.limits)
    assert any("memory bus" in limit for limit in decision.limits)


def test_real_vlek_report_is_accepted_at_its_time(samples):
    claims = verify(sample(samples, VLEK_REPORT), now=VLEK_NOW).claims
    assert claims.platform_id == ""
    assert claims.details["csp_id"] == "CN=cc-us-east-2.amazonaws.com"
    assert (claims.details["signer"], claims.details["report_version"]) == ("vlek", "3")
    assert claims.details["vmpl"] == "1"


def test_real_vlek_report_after_its_certificate(samples):
    with pytest.raises(StaleEvidenceError, match="VLEK certificate expired 2025-12-10"):
        verify(sample(samples, VLEK_REPORT), now=1_767_225_600)


def test_real_vlek_report_before_its_certificate(samples):
    with pytest.raises(StaleEvidenceError, match="not valid before 2024-12-10"):
        verify(sample(samples, VLEK_REPORT))


def test_real_vlek_report_at_a_privilege_level_that_is_not_allowed(samples):
    with pytest.raises(PolicyRejectedError, match="VMPL 1"):
        verify(sample(samples, VLEK_REPORT), POLICY.replace("max_vmpl = 1", ""), now=VLEK_NOW)


def test_real_vlek_report_where_only_a_vcek_is_accepted(samples):
    with pytest.raises(PolicyRejectedError, match="signed by a VLEK"):
        verify(sample(samples, VLEK_REPORT), POLICY.replace(', "vlek"', ""), now=VLEK_NOW)


def test_real_vlek_report_behind_the_signing_key_of_vceks(samples):
    with pytest.raises(EvidenceSignatureError, match="ASVK certificate is of another product or key"):
        verify(sample(samples, VLEK_REPORT, chain="milan.testcer"), now=VLEK_NOW)


def test_real_debug_guest(samples):
    with pytest.raises(PolicyRejectedError, match="debug") as caught:
        verify(sample(samples, DEBUG_REPORT))
    assert len(caught.value.reasons) == 1, "all but the debug bit is well"


@pytest.mark.parametrize("leaf", ["legacy", "new"])
def test_real_report_with_a_tampered_vcek(samples, leaf):
    with pytest.raises(EvidenceSignatureError, match="not signed by the ASK"):
        verify(sample(samples, REPORT, leaf=f"trustee/test-vcek-invalid-{leaf}.der"))


def test_real_report_with_the_vcek_of_another_chip(samples):
    with pytest.raises(EvidenceSignatureError, match="another chip"):
        verify(sample(samples, REPORT, leaf="vcek.testcer"))


@pytest.mark.parametrize("product", ["genoa", "turin"])
def test_real_report_behind_the_chain_of_another_product(samples, product):
    chain = "ask_ark_genoa.pem" if product == "genoa" else "ask_ark_turin_vcek.pem"
    evidence = sample(samples, REPORT, chain=chain)
    with pytest.raises(PolicyRejectedError, match=r"not pinned in \[roots\]\.amd_ark_sha256\.milan"):
        verify(evidence)
    # Even a policy that pins it for this product by mistake.
    with pytest.raises(EvidenceSignatureError, match="another product"):
        verify(evidence, POLICY.replace(AMD_ARK_SHA256["milan"], AMD_ARK_SHA256[product]))


def test_real_report_behind_the_signing_key_of_another_product(samples):
    mixed = parts(samples, REPORT) | {"issuer": certificates(samples / "ask_ark_genoa.pem")[0]}
    with pytest.raises(EvidenceSignatureError, match="ASK certificate is of another product"):
        verify(Evidence("snp", (samples / REPORT).read_bytes(), pem_chain(mixed)))


def test_amd_root_not_pinned(samples):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        verify(sample(samples, REPORT), POLICY.replace(AMD_ARK_SHA256["milan"], "00" * 32))


def test_real_report_declared_simulated(samples):
    text = POLICY.replace('accept = ["snp"]', 'accept = ["simulated-snp"]\nallow_simulated = true')
    with pytest.raises(PolicyRejectedError, match="its root is AMD's"):
        verify(sample(samples, REPORT, declared="simulated-snp"), text)


def test_real_report_under_a_policy_of_other_measurements(samples):
    with pytest.raises(MeasurementMismatchError, match="measurement"):
        verify(sample(samples, REPORT), POLICY.replace("a1f39304", "00000000"))


def test_real_report_of_an_older_firmware_than_the_policy_asks_for(samples):
    with pytest.raises(PolicyRejectedError) as caught:
        verify(sample(samples, REPORT), POLICY.replace("microcode = 68", "microcode = 116"))
    assert [reason.split(" is ")[0] for reason in caught.value.reasons] == [
        "microcode of the reported TCB",
        "microcode of the committed TCB",
        "microcode of the launch TCB",
    ]


def test_real_report_with_smt_where_it_is_not_allowed(samples):
    with pytest.raises(PolicyRejectedError, match="allows smt"):
        verify(sample(samples, REPORT), POLICY.replace("smt = true", "smt = false"))


def test_bit_flips_in_a_real_report(samples):
    evidence = sample(samples, REPORT)
    for at in range(0, 0x4A0, 17):
        blob = bytearray(evidence.blob)
        blob[at] ^= 0x40
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
            verify(Evidence("snp", bytes(blob), evidence.aux))


def test_amd_roots_are_the_published_ones(samples):
    files = {"milan": "milan", "genoa": "genoa", "turin": "turin_vcek"}
    for product, name in files.items():
        ark = certificates(samples / f"ask_ark_{name}.pem")[1]
        assert hashlib.sha256(ark).hexdigest() == AMD_ARK_SHA256[product]
