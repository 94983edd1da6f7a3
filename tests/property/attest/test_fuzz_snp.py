"""Whatever bytes a peer sends as an SNP report or its certificates: the same decision or an `AttestationError`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest import Policy, verify_evidence
from cloister.attest._simulated.amd_root import (
    SIMULATED_MEASUREMENT,
    SimulatedAmdRoot,
    SimulatedSnpAttester,
    certificate_table,
    pem_chain,
)
from cloister.attest._verifiers.snp_certs import load_certificate
from cloister.errors import AttestationError, MalformedEvidenceError
from cloister.wire import Evidence

NOW = 1_800_000_000
HOST_DATA = bytes(range(32))
REPORT_DATA = bytes(64)


@pytest.fixture(scope="module")
def genuine() -> tuple[SimulatedAmdRoot, Evidence, Policy]:
    root = SimulatedAmdRoot(now=NOW)
    text = f"""
version = 1
accept = ["simulated-snp"]
allow_simulated = true
[roots.amd_ark_sha256]
milan = ["{root.root_sha256}"]
[snp]
measurement = ["{SIMULATED_MEASUREMENT.hex()}"]
[roles.server.snp]
host_data = ["{HOST_DATA.hex()}"]
"""
    evidence = SimulatedSnpAttester(root, host_data=HOST_DATA).evidence(REPORT_DATA)
    return root, evidence, Policy.parse(text.encode())


def decide(evidence: Evidence, policy: Policy):
    return verify_evidence(evidence, policy, role="server", report_data=REPORT_DATA, now=NOW).claims


def refused_or_equal(evidence: Evidence, policy: Policy, honest: Evidence) -> None:
    try:
        claims = decide(evidence, policy)
    except AttestationError:
        return
    # Without a revocation list, which is optional, the proof lasts longer; nothing else may differ.
    lasting = {"collateral_issued": 0, "collateral_expires": 0}
    assert replace(claims, **lasting) == replace(decide(honest, policy), **lasting)


mutations = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "truncate"]), st.integers(0, 1 << 16), st.binary(max_size=40)),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, value in changes:
        at %= len(content) + 1
        if kind == "set":
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "cut":
            content = content[:at] + content[at + len(value) :]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        else:
            content = content[:at]
    return content


@settings(max_examples=200, deadline=None, derandomize=True)
@given(blob=st.binary(max_size=1300), aux=st.binary(max_size=2000))
def test_arbitrary_bytes(genuine, blob, aux):
    _, honest, policy = genuine
    for evidence in (
        Evidence("simulated-snp", blob, honest.aux),
        Evidence("simulated-snp", honest.blob, aux),
        Evidence("simulated-snp", honest.blob, b"-----BEGIN CERTIFICATE-----\n" + aux),
        Evidence("simulated-snp", (blob + honest.blob[len(blob) :])[:1184], honest.aux),
    ):
        refused_or_equal(evidence, policy, honest)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=mutations)
def test_mutated_reports(genuine, changes):
    _, honest, policy = genuine
    refused_or_equal(Evidence("simulated-snp", mutate(honest.blob, changes), honest.aux), policy, honest)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=mutations, form=st.sampled_from([certificate_table, pem_chain]), with_crl=st.booleans())
def test_mutated_frames_of_certificates(genuine, changes, form, with_crl):
    root, honest, policy = genuine
    parts = root.parts("vcek", **({"crl": root.crl()} if with_crl else {}))
    refused_or_equal(Evidence("simulated-snp", honest.blob, mutate(form(parts), changes)), policy, honest)


@pytest.mark.parametrize("slot", ["vcek", "issuer", "crl"])
def test_mutated_certificates_in_whole_frames(genuine, slot):
    root, honest, policy = genuine
    whole = root.parts("vcek", crl=root.crl())

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(changes=mutations)
    def check(changes):
        parts = whole | {slot: mutate(whole[slot], changes)}
        refused_or_equal(Evidence("simulated-snp", honest.blob, certificate_table(parts)), policy, honest)

    check()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=mutations, name=st.sampled_from(["ark", "ask", "vcek", "vlek"]))
def test_certificate_parser_is_total(genuine, changes, name):
    root, _, _ = genuine
    try:
        load_certificate(mutate(root.certificates[name], changes), name)
    except MalformedEvidenceError:
        return
