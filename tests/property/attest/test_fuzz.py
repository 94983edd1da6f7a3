"""Whatever bytes a peer sends as evidence: a decision or an `AttestationError`, nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy, verify_evidence
from cloister.errors import AttestationError, ConfigError
from cloister.wire import Evidence

NOW = 1_800_000_000
RTMR3 = bytes(range(48))
REPORT_DATA = bytes(64)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Policy]:
    root = SimulatedRoot.create(tmp_path_factory.mktemp("root") / "root", now=NOW)
    policy = Policy.parse(render_policy(root_sha256=root.root_sha256, server_rtmr3=[RTMR3]))
    return SimulatedAttester(root.provision(), rtmr3=RTMR3).evidence(REPORT_DATA), policy


def refused_or_equal(evidence: Evidence, policy: Policy, honest: Evidence) -> None:
    def decide(candidate: Evidence):
        return verify_evidence(candidate, policy, role="server", report_data=REPORT_DATA, now=NOW).claims

    try:
        claims = decide(evidence)
    except AttestationError:
        return
    assert claims == decide(honest)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(blob=st.binary(max_size=6000), aux=st.binary(max_size=2000))
def test_arbitrary_bytes(genuine, blob, aux):
    honest, policy = genuine
    for evidence in (
        Evidence("simulated", blob, honest.aux),
        Evidence("simulated", honest.blob, aux),
        Evidence("simulated", honest.blob[:700] + blob, honest.aux),
    ):
        refused_or_equal(evidence, policy, honest)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_collateral_with_fields_replaced(genuine, data):
    honest, policy = genuine
    fields = json.loads(honest.aux)
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        inner = data.draw(json_values)
        fields[name] = data.draw(st.sampled_from([inner, json.dumps(inner), str(inner), str(inner).encode().hex()]))
    evidence = Evidence("simulated", honest.blob, json.dumps(fields).encode())
    refused_or_equal(evidence, policy, honest)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_signed_statements_with_fields_replaced(genuine, data):
    honest, policy = genuine
    fields = json.loads(honest.aux)
    name = data.draw(st.sampled_from(["tcb_info", "qe_identity"]))
    statement = json.loads(fields[name])
    key = data.draw(st.sampled_from(sorted(statement)))
    statement[key] = data.draw(st.none() | st.integers() | st.text(max_size=30) | st.lists(st.integers(), max_size=3))
    fields[name] = json.dumps(statement)
    with pytest.raises(AttestationError):
        verify_evidence(
            Evidence("simulated", honest.blob, json.dumps(fields).encode()),
            policy,
            role="server",
            report_data=REPORT_DATA,
            now=NOW,
        )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=400) | st.text(alphabet='abc.=[]{}"0123456789\n _', max_size=400).map(str.encode))
def test_policy_parser_is_total(blob):
    try:
        policy = Policy.parse(blob)
    except ConfigError:
        return
    assert len(policy.sha384) == 48
