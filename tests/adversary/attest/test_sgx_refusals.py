"""Every reason to refuse SGX evidence that a simulated platform can produce, each with a test of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from cloister.attest import INTEL_ROOT_SHA256, Decision, Policy, SimulatedAttester, SimulatedRoot, verify_evidence
from cloister.attest import _verify as verify_module
from cloister.attest._simulated.sgx_quote import (
    DEBUG_ATTRIBUTES,
    SIMULATED_MR_ENCLAVE,
    SIMULATED_MR_SIGNER,
    SimulatedEnclave,
    sgx_evidence,
)
from cloister.attest._verifiers import sgx as sgx_module
from cloister.attest._verifiers.dcap import verify_dcap
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

NOW = 1_800_000_000
DAY = 86400
REPORT_DATA = bytes(range(64))
ENCLAVE = f'mr_enclave = ["{SIMULATED_MR_ENCLAVE.hex()}"]'
SIGNER = f'mr_signer = ["{SIMULATED_MR_SIGNER.hex()}"]'
OTHER = "ab" * 32


@dataclass
class SgxWorld:
    """One simulated platform, and the policies that speak of its enclaves."""

    root: SimulatedRoot

    def evidence(self, *, declared: str = "simulated-sgx", report_data: bytes = REPORT_DATA, **enclave) -> Evidence:
        return sgx_evidence(self.root, SimulatedEnclave(**enclave), report_data=report_data, declared=declared)

    def policy(self, *, role: str = ENCLAVE, shared: str = "", accept: str = '"simulated-sgx"', **top: str) -> Policy:
        lines = {"version": "1", "accept": f"[{accept}]", "allow_simulated": "true", **top}
        text = "\n".join(f"{key} = {value}" for key, value in lines.items())
        text += f'\n[roots]\nintel_sha256 = ["{self.root.root_sha256}"]\n[sgx]\n{shared}\n[roles.server.sgx]\n{role}\n'
        return Policy.parse(text.encode())

    def verify(self, evidence: Evidence | None = None, policy: Policy | None = None, *, now: int = NOW) -> Decision:
        evidence, policy = evidence or self.evidence(), policy or self.policy()
        return verify_evidence(evidence, policy, role="server", report_data=REPORT_DATA, now=now)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRoot:
    return SimulatedRoot.create(tmp_path_factory.mktemp("sgx") / "root", now=NOW)


@pytest.fixture
def sgx(platform: SimulatedRoot) -> SgxWorld:
    platform.refresh(NOW, tee="sgx")
    return SgxWorld(platform)


def test_honest_enclave_is_accepted_and_stamped(sgx):
    decision = sgx.verify()
    claims = decision.claims
    assert (claims.tee, claims.evidence_type, claims.simulated, claims.debug) == ("sgx", "simulated-sgx", True, False)
    assert claims.measurements == {"mr_enclave": SIMULATED_MR_ENCLAVE.hex(), "mr_signer": SIMULATED_MR_SIGNER.hex()}
    assert claims.details == {
        "isv_prod_id": "1",
        "isv_svn": "1",
        "attributes": "0500000000000000",
        "xfrm": "e700000000000000",
        "tcb_evaluation_number": "1",
    }
    assert claims.platform_id
    assert any("SIMULATED" in reason for reason in decision.reasons)
    assert any("no TEE" in limit for limit in decision.limits)


def test_other_enclave(sgx):
    with pytest.raises(MeasurementMismatchError, match="mr_enclave"):
        sgx.verify(sgx.evidence(mr_enclave=b"\x01" * 32))


def test_policy_that_names_neither_enclave_nor_signer(sgx):
    with pytest.raises(PolicyRejectedError, match="allows nothing"):
        sgx.verify(policy=sgx.policy(role=""))


def test_policy_without_a_set_for_the_role(sgx):
    with pytest.raises(PolicyRejectedError, match='no measurement set for the role "client"'):
        verify_evidence(sgx.evidence(), sgx.policy(), role="client", report_data=REPORT_DATA, now=NOW)


def test_empty_list_of_enclaves_allows_nothing(sgx):
    with pytest.raises(PolicyRejectedError, match="allows nothing"):
        sgx.verify(policy=sgx.policy(role="mr_enclave = []"))


def test_any_enclave_of_signer_and_product(sgx):
    policy = sgx.policy(shared=f"{SIGNER}\nprod_id = 1\nmin_svn = 3", role="")
    assert sgx.verify(sgx.evidence(mr_enclave=b"\x07" * 32, svn=3), policy).accepted


def test_other_signer(sgx):
    policy = sgx.policy(shared=f"{SIGNER}\nprod_id = 1", role="")
    with pytest.raises(MeasurementMismatchError, match="mr_signer"):
        sgx.verify(sgx.evidence(mr_signer=b"\x01" * 32), policy)


def test_other_product_of_the_signer(sgx):
    policy = sgx.policy(shared=f"{SIGNER}\nprod_id = 1", role="")
    with pytest.raises(MeasurementMismatchError, match="product 2"):
        sgx.verify(sgx.evidence(prod_id=2), policy)


def test_old_version_of_the_product(sgx):
    policy = sgx.policy(shared=f"{SIGNER}\nprod_id = 1\nmin_svn = 3", role="")
    with pytest.raises(PolicyRejectedError, match="security version is 2"):
        sgx.verify(sgx.evidence(svn=2), policy)


def test_signer_that_only_a_role_names_without_a_product(sgx):
    with pytest.raises(PolicyRejectedError, match="without prod_id"):
        sgx.verify(policy=sgx.policy(role=SIGNER))


def test_both_named_and_only_the_signer_matches(sgx):
    policy = sgx.policy(shared=f"{SIGNER}\nprod_id = 1", role=f'mr_enclave = ["{OTHER}"]')
    with pytest.raises(MeasurementMismatchError, match="mr_enclave"):
        sgx.verify(policy=policy)


def test_both_named_and_only_the_enclave_matches(sgx):
    policy = sgx.policy(shared=f'mr_signer = ["{OTHER}"]\nprod_id = 1', role=ENCLAVE)
    with pytest.raises(MeasurementMismatchError, match="mr_signer"):
        sgx.verify(policy=policy)


def test_other_session(sgx):
    with pytest.raises(MeasurementMismatchError, match="report_data"):
        sgx.verify(sgx.evidence(report_data=bytes(64)))


def test_debug_enclave(sgx):
    with pytest.raises(PolicyRejectedError, match=r"[Dd]ebug"):
        sgx.verify(sgx.evidence(attributes=DEBUG_ATTRIBUTES))


def test_debug_is_refused_even_if_the_quote_library_would_let_it_pass(sgx, monkeypatch):
    evidence, policy = sgx.evidence(), sgx.policy()
    proven = verify_module.verify_sgx(evidence, policy, role="server", now=NOW)
    object.__setattr__(proven.claims, "debug", True)
    monkeypatch.setitem(verify_module.VERIFIERS, "simulated-sgx", lambda *_, **__: proven)
    with pytest.raises(PolicyRejectedError, match="debug enclave"):
        sgx.verify(evidence, policy)


def test_debug_bit_of_a_quote_that_the_library_let_pass(sgx, monkeypatch):
    def lenient(*args, **kwargs):
        proof = verify_dcap(*args, **kwargs)
        proof.found["report"]["SgxEnclave"]["attributes"] = DEBUG_ATTRIBUTES.hex()
        return proof

    monkeypatch.setattr(sgx_module, "verify_dcap", lenient)
    with pytest.raises(PolicyRejectedError, match="debug enclave"):
        sgx.verify()


def test_simulated_root_declared_as_sgx(sgx):
    policy = sgx.policy(accept='"sgx", "simulated-sgx"')
    with pytest.raises(PolicyRejectedError, match='declared "sgx", and its root is not Intel'):
        sgx.verify(sgx.evidence(declared="sgx"), policy)


def test_simulated_root_under_a_production_policy(sgx):
    policy = sgx.policy(accept='"sgx"', allow_simulated="false")
    with pytest.raises(PolicyRejectedError, match="does not allow simulated") as caught:
        sgx.verify(sgx.evidence(declared="sgx"), policy)
    assert any('declared "sgx"' in reason for reason in caught.value.reasons)


def test_simulated_type_needs_allow_simulated(sgx):
    with pytest.raises(Exception, match='"simulated-sgx" needs allow_simulated'):
        sgx.policy(allow_simulated="false")


def test_unpinned_root(sgx):
    policy = Policy.parse(
        f'version = 1\naccept = ["simulated-sgx"]\nallow_simulated = true\n[roots]\n'
        f'intel_sha256 = ["{INTEL_ROOT_SHA256}"]\n[roles.server.sgx]\n{ENCLAVE}\n'.encode()
    )
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        sgx.verify(policy=policy)


def test_tdx_quote_declared_as_sgx(sgx):
    sgx.root.refresh(NOW)
    quote = SimulatedAttester(sgx.root.provision(), rtmr3=bytes(48)).evidence(REPORT_DATA)
    with pytest.raises(MalformedEvidenceError, match="not of an SGX enclave"):
        sgx.verify(Evidence("simulated-sgx", quote.blob, quote.aux))


def test_sgx_quote_declared_as_tdx(sgx):
    evidence = sgx.evidence(declared="simulated")
    with pytest.raises(MalformedEvidenceError, match=r"not of a TDX 1\.0"):
        sgx.verify(evidence, sgx.policy(accept='"simulated"'))


def test_tdx_collateral_behind_an_sgx_quote(sgx):
    sgx.root.refresh(NOW)
    with pytest.raises(EvidenceSignatureError):
        sgx.verify(Evidence("simulated-sgx", sgx.evidence().blob, sgx.root.collateral_json()))


def test_missing_collateral(sgx):
    with pytest.raises(MalformedEvidenceError, match="collateral is missing"):
        sgx.verify(Evidence("simulated-sgx", sgx.evidence().blob, b""))


def test_expired_collateral(sgx):
    with pytest.raises(StaleEvidenceError):
        sgx.verify(now=NOW + 31 * DAY)


def test_old_collateral(sgx):
    with pytest.raises(StaleEvidenceError, match="days old"):
        sgx.verify(policy=sgx.policy(shared="collateral_max_age_d = 2"), now=NOW + 3 * DAY)


def test_future_collateral(sgx):
    with pytest.raises(StaleEvidenceError):
        sgx.verify(now=NOW - DAY)


def test_outdated_platform(sgx):
    sgx.root.refresh(NOW, status="OutOfDate", tee="sgx")
    with pytest.raises(PolicyRejectedError, match="OutOfDate"):
        sgx.verify()


def test_rejected_advisory(sgx):
    sgx.root.refresh(NOW, advisories=("INTEL-SA-00001",), tee="sgx")
    assert sgx.verify().claims.advisories == ("INTEL-SA-00001",)
    with pytest.raises(PolicyRejectedError, match="INTEL-SA-00001"):
        sgx.verify(policy=sgx.policy(shared='reject_advisories = ["INTEL-SA-00001"]'))


def test_generation_of_tcb_data(sgx):
    with pytest.raises(PolicyRejectedError):
        sgx.verify(policy=sgx.policy(shared="min_tcb_eval = 2"))


def test_platform_that_is_not_listed(sgx):
    policy = Policy.parse(
        f'version = 1\naccept = ["simulated-sgx"]\nallow_simulated = true\n[roots]\n'
        f'intel_sha256 = ["{sgx.root.root_sha256}"]\n[platforms]\nallow_piid = ["{"00" * 16}"]\n'
        f"[roles.server.sgx]\n{ENCLAVE}\n".encode()
    )
    with pytest.raises(PolicyRejectedError, match="allow_piid"):
        sgx.verify(policy=policy)


@pytest.mark.parametrize("at", range(0, 48 + 384, 17))
def test_bit_flip_in_the_signed_part(sgx, at):
    evidence = sgx.evidence()
    blob = bytearray(evidence.blob)
    blob[at] ^= 0x40
    with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
        sgx.verify(Evidence(evidence.type, bytes(blob), evidence.aux))


def test_signed_statement_that_was_changed(sgx):
    evidence = sgx.evidence()
    fields = json.loads(evidence.aux)
    fields["tcb_info"] = fields["tcb_info"].replace("UpToDate", "UpToDate ")
    with pytest.raises(EvidenceSignatureError):
        sgx.verify(Evidence(evidence.type, evidence.blob, json.dumps(fields).encode()))
