"""Every reason to refuse evidence that a simulated platform can produce, each with a test of its own."""

from __future__ import annotations

import json
import ssl

import pytest

from cloister.attest import SimulatedAttester, _verify, verify_evidence
from cloister.attest._simulated import intel_pki as _simulated_pki
from cloister.attest._verifiers import tdx
from cloister.attest._verifiers.dcap import verify_dcap
from cloister.errors import (
    AttestationError,
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

DAY = 86400


def test_honest_evidence_is_accepted_and_stamped(world):
    decision = world.verify()
    assert decision.accepted
    assert decision.claims.simulated
    assert decision.claims.measurements["rtmr3"] == world.rtmr3.hex()
    assert decision.claims.layers == ("no_dump", "seccomp")
    assert decision.policy_sha384 == world.policy().sha384
    assert any("SIMULATED" in reason for reason in decision.reasons)
    assert any("binds the evidence" in reason for reason in decision.reasons)
    told = json.loads(json.dumps(decision.to_dict()))
    assert told["accepted"] is True
    assert told["claims"]["simulated"] is True
    assert told["claims"]["report_data"] == world.report_data.hex()


def test_unpinned_root(world, other_root):
    evidence = SimulatedAttester(other_root.provision(), rtmr3=world.rtmr3).evidence(world.report_data)
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        world.verify(evidence)


def test_no_pinned_root_at_all(world):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        world.verify(policy=world.policy((f'"{world.root.root_sha256}"', "")))


def test_quote_of_another_root_behind_pinned_collateral(world, other_root):
    quote = SimulatedAttester(other_root.provision(), rtmr3=world.rtmr3).evidence(world.report_data).blob
    with pytest.raises(EvidenceSignatureError):
        world.verify(Evidence("simulated", quote, world.root.collateral_json()))


def test_pinned_quote_behind_collateral_of_another_root(world, other_root):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        world.verify(Evidence("simulated", world.evidence().blob, other_root.collateral_json()))


def test_revocation_list_of_another_root(world, other_root):
    crl = json.loads(other_root.collateral_json())["root_ca_crl"]
    with pytest.raises(EvidenceSignatureError):
        world.verify(world.with_collateral(world.evidence(), root_ca_crl=crl))


def test_revocation_list_that_is_none(world):
    with pytest.raises(EvidenceSignatureError):
        world.verify(world.with_collateral(world.evidence(), pck_crl="00"))


def test_simulated_evidence_under_a_production_policy(world):
    production = world.policy(('accept = ["simulated"]', 'accept = ["tdx"]'), ("= true", "= false"))
    with pytest.raises(PolicyRejectedError, match="not accepted"):
        world.verify(policy=production)


def test_simulated_root_pinned_without_allow_simulated(world):
    production = world.policy(('accept = ["simulated"]', 'accept = ["tdx"]'), ("= true", "= false"))
    evidence = world.evidence()
    with pytest.raises(PolicyRejectedError, match="does not allow simulated") as caught:
        world.verify(Evidence("tdx", evidence.blob, evidence.aux), production)
    assert any('declared "tdx"' in reason for reason in caught.value.reasons)


def test_simulated_evidence_declared_as_real(world):
    policy = world.policy(('accept = ["simulated"]', 'accept = ["simulated", "tdx"]'))
    evidence = world.evidence()
    with pytest.raises(PolicyRejectedError, match='declared "tdx", and its root is not Intel'):
        world.verify(Evidence("tdx", evidence.blob, evidence.aux), policy)


def test_unknown_tee_type(world):
    evidence = world.evidence()
    with pytest.raises(PolicyRejectedError, match="unknown"):
        world.verify(Evidence("sev", evidence.blob, evidence.aux))


def test_empty_accept_list(world):
    with pytest.raises(PolicyRejectedError, match="accepts nothing"):
        world.verify(policy=world.policy(('accept = ["simulated"]', "accept = []")))


def test_debug_domain(world):
    evidence = world.evidence(td_attributes=bytes.fromhex("0100001000000000"))
    with pytest.raises(PolicyRejectedError, match="Debug"):
        world.verify(
            evidence, world.policy(('"ffffffffffffffff"', f'"{"0" * 16}"'), ('"0000001000000000"', f'"{"0" * 16}"'))
        )


def test_domain_with_reserved_attributes(world):
    with pytest.raises(PolicyRejectedError, match="Reserved"):
        world.verify(world.evidence(td_attributes=bytes.fromhex("0200001000000000")))


def test_domain_without_sept_ve_disable(world):
    with pytest.raises(PolicyRejectedError, match="SEPT_VE_DISABLE"):
        world.verify(world.evidence(td_attributes=bytes(8)))


def test_attributes_that_the_policy_does_not_allow(world):
    # PKS (bit 30) is a genuine attribute, and not one of this policy.
    with pytest.raises(PolicyRejectedError, match="td_attributes"):
        world.verify(world.evidence(td_attributes=bytes.fromhex("0000005000000000")))


def test_debug_is_refused_even_if_the_quote_library_would_let_it_pass(world, monkeypatch):
    # Defence in depth: the library refuses debug domains itself, so the claim has to be forged to get here.
    evidence, policy = world.evidence(), world.policy()
    proven = _verify.verify_tdx(evidence, policy, role="server", now=world.now)
    object.__setattr__(proven.claims, "debug", True)
    monkeypatch.setitem(_verify.VERIFIERS, "simulated", lambda *_, **__: proven)
    with pytest.raises(PolicyRejectedError, match="debug enclave"):
        world.verify(evidence, policy)


def test_debug_bit_of_a_quote_that_the_library_let_pass(world, monkeypatch):
    def lenient(*args, **kwargs):
        proof = verify_dcap(*args, **kwargs)
        proof.found["report"]["TD10"]["td_attributes"] = "0100001000000000"
        return proof

    evidence, policy = world.evidence(), world.policy()
    monkeypatch.setattr(tdx, "verify_dcap", lenient)
    with pytest.raises(PolicyRejectedError) as caught:
        world.verify(evidence, policy)
    assert any("debug enclave" in reason for reason in caught.value.reasons)


def test_wrong_code_job_or_weights(world):
    with pytest.raises(MeasurementMismatchError, match="rtmr3"):
        world.verify(world.evidence(rtmr3=b"\x01" * 48))


@pytest.mark.parametrize("register", ["mr_td", "mr_seam", "rtmr0", "rtmr1", "rtmr2"])
def test_wrong_platform_register(world, register):
    line = next(line for line in world.policy_text.splitlines() if line.startswith(register))
    with pytest.raises(MeasurementMismatchError, match=register):
        world.verify(policy=world.policy((line, f'{register} = ["{"ab" * 48}"]')))


@pytest.mark.parametrize("register", ["mr_td", "mr_seam", "rtmr0", "rtmr1", "rtmr2", "rtmr3"])
def test_empty_allow_list_of_a_register(world, register):
    line = next(line for line in world.policy_text.splitlines() if line.startswith(f"{register} ="))
    with pytest.raises(PolicyRejectedError, match=f"no value of {register}"):
        world.verify(policy=world.policy((line, f"{register} = []")))


@pytest.mark.parametrize("register", ["mr_td", "rtmr1", "rtmr2", "rtmr3"])
def test_required_register_that_the_policy_does_not_name(world, register):
    line = next(line for line in world.policy_text.splitlines() if line.startswith(f"{register} ="))
    with pytest.raises(PolicyRejectedError, match=f"no value of {register}"):
        world.verify(policy=world.policy((line, "")))


def test_role_without_a_measurement_set(world):
    with pytest.raises(PolicyRejectedError, match='role "client"'):
        world.verify(role="client")


def test_server_evidence_in_the_role_of_a_client(world):
    text = world.policy_text + f'\n[roles.client.tdx]\nrtmr3 = ["{"cd" * 48}"]\n'
    with pytest.raises(MeasurementMismatchError, match="role client"):
        world.verify(policy=world.policy(text=text), role="client")


def test_evidence_of_another_session(world):
    with pytest.raises(MeasurementMismatchError, match="relayed or replayed"):
        world.verify(world.evidence(report_data=b"\x07" * 64))


def test_xfam_that_the_policy_does_not_name(world):
    with pytest.raises(PolicyRejectedError, match="xfam"):
        world.verify(policy=world.policy(("e702060000000000", "e718060000000000")))


def test_another_platform_than_the_pinned_one(world):
    with pytest.raises(PolicyRejectedError, match="allow_piid"):
        world.verify(policy=world.policy(text=world.policy_text + f'\n[platforms]\nallow_piid = ["{"00" * 16}"]\n'))


def test_pinned_platform_is_accepted(world):
    piid = world.verify().claims.platform_id
    policy = world.policy(text=world.policy_text + f'\n[platforms]\nallow_piid = ["{piid}"]\n')
    assert world.verify(policy=policy).accepted


def test_missing_hardening_layer(world):
    policy = world.policy(("require_layers = []", 'require_layers = ["seccomp", "landlock"]'))
    with pytest.raises(PolicyRejectedError, match="landlock"):
        world.verify(policy=policy)


def test_required_hardening_layers_present(world):
    policy = world.policy(("require_layers = []", 'require_layers = ["seccomp"]'))
    assert world.verify(policy=policy).accepted


def test_outdated_platform(world):
    world.root.refresh(world.now, status="OutOfDate", advisories=("INTEL-SA-00001",))
    with pytest.raises(PolicyRejectedError, match="OutOfDate") as caught:
        world.verify()
    assert len(caught.value.reasons) == 2


def test_outdated_platform_under_a_policy_that_allows_it(world):
    world.root.refresh(world.now, status="OutOfDate", advisories=("INTEL-SA-00001",))
    decision = world.verify(policy=world.policy(('["UpToDate"]', '["UpToDate", "OutOfDate"]')))
    assert decision.claims.tcb_status == "OutOfDate"
    assert decision.claims.advisories == ("INTEL-SA-00001",)


def test_policy_that_accepts_no_tcb_status(world):
    with pytest.raises(PolicyRejectedError, match="accepts nothing"):
        world.verify(policy=world.policy(('tcb_status = ["UpToDate"]', "tcb_status = []")))


def test_rejected_advisory(world):
    world.root.refresh(world.now, advisories=("INTEL-SA-00001",))
    policy = world.policy(
        ('tcb_status = ["UpToDate"]', 'tcb_status = ["UpToDate"]\nreject_advisories = ["INTEL-SA-00001"]')
    )
    with pytest.raises(PolicyRejectedError, match="INTEL-SA-00001"):
        world.verify(policy=policy)


def test_older_tcb_evaluation_than_the_policy_wants(world):
    policy = world.policy(('tcb_status = ["UpToDate"]', 'tcb_status = ["UpToDate"]\nmin_tcb_eval = 2'))
    with pytest.raises(PolicyRejectedError, match="TCB eval"):
        world.verify(policy=policy)


def test_revoked_tcb_level(world):
    world.root.refresh(world.now, status="Revoked")
    with pytest.raises(PolicyRejectedError, match="Revoked"):
        world.verify()


def test_revoked_platform_key(world):
    world.root.revoke_platform(world.now)
    with pytest.raises(EvidenceSignatureError):
        world.verify()


def test_platform_below_every_tcb_level(world):
    levels = json.loads(json.loads(world.evidence().aux)["tcb_info"])["tcbLevels"]
    levels[0]["tcb"]["pcesvn"] = 9
    with pytest.raises(PolicyRejectedError, match="No matching TCB level"):
        world.verify(world.resigned(world.evidence(), "tcb_info", tcbLevels=levels))


def test_tcb_info_of_another_platform_family(world):
    with pytest.raises(EvidenceSignatureError, match="Fmspc"):
        world.verify(world.resigned(world.evidence(), "tcb_info", fmspc="00" * 6))


def test_quoting_enclave_of_another_signer(world):
    with pytest.raises(EvidenceSignatureError, match="MRSIGNER"):
        world.verify(world.resigned(world.evidence(), "qe_identity", mrsigner="00" * 32))


def test_tcb_info_changed_without_its_issuer(world):
    evidence = world.evidence()
    text = json.loads(evidence.aux)["tcb_info"]
    with pytest.raises(EvidenceSignatureError, match="tcb_info"):
        world.verify(world.with_collateral(evidence, tcb_info=text.replace('"pcesvn":1', '"pcesvn":0')))


def test_expired_collateral(world):
    with pytest.raises(StaleEvidenceError):
        world.verify(now=world.now + 30 * DAY)


@pytest.mark.parametrize(("statement", "name"), [("tcb_info", "TCBInfo"), ("qe_identity", "QE Identity")])
def test_one_expired_statement(world, statement, name):
    evidence = world.resigned(world.evidence(), statement, nextUpdate=_simulated_pki._rfc3339(world.now - 1))
    with pytest.raises(StaleEvidenceError, match=f"the {name} of the collateral has expired"):
        world.verify(evidence)


@pytest.mark.parametrize(
    ("crl", "issuer", "key"), [("root_ca_crl", "root", "root"), ("pck_crl", "platform", "platform")]
)
def test_expired_revocation_list(world, crl, issuer, key):
    name = {"root": "SIMULATED SGX Root CA", "platform": "SIMULATED SGX PCK Platform CA"}[issuer]
    old = _simulated_pki.issue_crl(name, world.root._state.keys[key], now=world.now - 31 * DAY).hex()
    with pytest.raises(StaleEvidenceError, match="revocation list"):
        world.verify(world.with_collateral(world.evidence(), **{crl: old}))


def test_collateral_from_the_future(world):
    with pytest.raises(StaleEvidenceError, match="future"):
        world.verify(now=world.now - 301)


def test_collateral_ahead_of_our_clock_within_the_allowed_skew(world):
    assert world.verify(now=world.now - 300).accepted


def test_skew_does_not_stretch_expiry(world):
    assert world.verify(now=world.now + 30 * DAY - 1).accepted
    with pytest.raises(StaleEvidenceError):
        world.verify(now=world.now + 30 * DAY)


def test_collateral_older_than_the_policy_allows(world):
    policy = world.policy(("collateral_max_age_d = 30", "collateral_max_age_d = 1"))
    assert world.verify(policy=policy, now=world.now + DAY).accepted
    with pytest.raises(StaleEvidenceError, match="1 days old, the policy allows 1"):
        world.verify(policy=policy, now=world.now + DAY + 1)


def test_missing_collateral(world):
    with pytest.raises(MalformedEvidenceError, match="missing"):
        world.verify(Evidence("simulated", world.evidence().blob, b""))


@pytest.mark.parametrize("aux", [b"{}", b"[]", b"\xff", b"null", b'{"tcb_info": 1}'])
def test_malformed_collateral(world, aux):
    with pytest.raises(MalformedEvidenceError):
        world.verify(Evidence("simulated", world.evidence().blob, aux))


@pytest.mark.parametrize(
    "statement",
    ["{}", "[]", "1", '{"issueDate": 1}', '{"issueDate": "x"}', "[" * 100_000, '{"issueDate": "0001-01-01"}'],
)
def test_malformed_statement_in_collateral(world, statement):
    with pytest.raises(AttestationError):
        world.verify(world.with_collateral(world.evidence(), qe_identity=statement))


@pytest.mark.parametrize("chain", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "x"])
def test_malformed_chain_in_collateral(world, chain):
    with pytest.raises(MalformedEvidenceError, match="chain"):
        world.verify(world.with_collateral(world.evidence(), tcb_info_issuer_chain=chain))


def test_certificate_of_an_unknown_version_in_collateral(world):
    """Found by the fuzzer: `cryptography` has an exception of its own for it."""
    root = world.root.root_der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020142"), 1)
    assert root != world.root.root_der
    with pytest.raises(MalformedEvidenceError, match="chain does not parse"):
        world.verify(world.with_collateral(world.evidence(), tcb_info_issuer_chain=ssl.DER_cert_to_PEM_cert(root)))


@pytest.mark.parametrize("cut", [0, 1, 47, 48, 631, 632, 700, 2000])
def test_truncated_quote(world, cut):
    evidence = world.evidence()
    with pytest.raises(MalformedEvidenceError):
        world.verify(Evidence("simulated", evidence.blob[:cut], evidence.aux))


def test_every_bit_flip_in_what_is_signed(world):
    """Header, body, signature, attestation key, QE report, its signature and the authentication data: byte by byte."""
    evidence = world.evidence()
    policy = world.policy()
    start = 48 + 584
    signed = [*range(start), *range(start + 4, start + 4 + 128), *range(start + 138, start + 138 + 384 + 64 + 2 + 32)]
    for at in signed:
        blob = bytearray(evidence.blob)
        blob[at] ^= 1 << (at % 8)
        with pytest.raises(AttestationError):
            world.verify(Evidence("simulated", bytes(blob), evidence.aux), policy)


def test_bit_flips_elsewhere_change_nothing_that_was_proven(world):
    """Encodings around the signed parts are malleable; whatever still verifies proves the very same claims."""
    evidence, policy = world.evidence(), world.policy()
    expected = world.verify(evidence, policy).claims
    for part in ("blob", "aux"):
        original = getattr(evidence, part)
        for at in range(48 + 584 + 4 + 128 if part == "blob" else 0, len(original), 37):
            changed = bytearray(original)
            changed[at] ^= 1 << (at % 8)
            forged = {"blob": evidence.blob, "aux": evidence.aux, part: bytes(changed)}
            try:
                decision = world.verify(Evidence("simulated", **forged), policy)
            except AttestationError:
                continue
            assert decision.claims == expected


def test_bytes_after_the_quote_change_no_claim(world):
    """So a quote's hash identifies nothing: replay protection is in report_data alone."""
    evidence = world.evidence()
    decision = world.verify(Evidence("simulated", evidence.blob + b"tail", evidence.aux))
    assert decision.claims == world.verify(evidence).claims


def test_all_reasons_are_told(world):
    policy = world.policy(("require_layers = []", 'require_layers = ["landlock"]'))
    with pytest.raises(MeasurementMismatchError) as caught:
        world.verify(world.evidence(rtmr3=b"\x02" * 48, report_data=b"\x03" * 64), policy)
    told = " | ".join(caught.value.reasons)
    assert "landlock" in told
    assert "rtmr3" in told
    assert "report_data" in told


def test_refusal_names_the_policy_file(world, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(world.policy_text)
    policy = type(world.policy()).load(path)
    with pytest.raises(MeasurementMismatchError) as caught:
        verify_evidence(world.evidence(), policy, role="server", report_data=bytes(64), now=world.now)
    assert str(path) in caught.value.hint


def test_nothing_under_an_unpinned_root_is_verified(world, other_root, monkeypatch):
    """Refused before any signature is looked at."""
    from cloister.attest._verifiers import dcap as _tdx

    def never(*_: object) -> None:
        raise AssertionError("the quote verifier was called")

    monkeypatch.setattr(_tdx.dcap_qvl, "QuoteVerifier", never)
    with pytest.raises(PolicyRejectedError):
        world.verify(SimulatedAttester(other_root.provision(), rtmr3=world.rtmr3).evidence(world.report_data))
