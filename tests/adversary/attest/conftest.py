"""A world with one simulated platform, its policy, and the means to forge what an attacker could."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloister.attest import (
    Decision,
    Policy,
    SimulatedAttester,
    SimulatedRoot,
    expected_rtmr3,
    render_policy,
    verify_evidence,
)
from cloister.attest._simulated import intel_pki as pki
from cloister.testing import shared_dir
from cloister.wire import Evidence

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))


@dataclass
class World:
    """One simulated platform and a policy that accepts exactly its server enclave."""

    root: SimulatedRoot
    rtmr3: bytes
    policy_text: str
    now: int = NOW
    report_data: bytes = REPORT_DATA

    def evidence(self, *, report_data: bytes = REPORT_DATA, rtmr3: bytes | None = None, **options) -> Evidence:
        options.setdefault("layers", ("no_dump", "seccomp"))
        attester = SimulatedAttester(self.root.provision(), rtmr3=rtmr3 or self.rtmr3, **options)
        return attester.evidence(report_data)

    def policy(self, *changes: tuple[str, str], text: str | None = None) -> Policy:
        text = text or self.policy_text
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        return Policy.parse(text.encode())

    def verify(
        self, evidence: Evidence | None = None, policy: Policy | None = None, *, role="server", now: int = NOW
    ) -> Decision:
        evidence = evidence or self.evidence()
        return verify_evidence(evidence, policy or self.policy(), role=role, report_data=self.report_data, now=now)

    def with_collateral(self, evidence: Evidence, **changes: str) -> Evidence:
        fields = json.loads(evidence.aux)
        fields.update(changes)
        return Evidence(evidence.type, evidence.blob, json.dumps(fields).encode())

    def resigned(self, evidence: Evidence, statement: str, **changes: object) -> Evidence:
        """The evidence with a field of its TCB info or QE identity changed by the issuer itself."""
        body = json.loads(json.loads(evidence.aux)[statement])
        body.update(changes)
        text = json.dumps(body)
        signature = pki.sign_raw(self.root._state.keys["tcb"], text.encode()).hex()
        return self.with_collateral(evidence, **{statement: text, f"{statement}_signature": signature})


@pytest.fixture(scope="session")
def two_roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[SimulatedRoot, SimulatedRoot]:
    folder = tmp_path_factory.mktemp("roots")
    return SimulatedRoot.create(folder / "a", now=NOW), SimulatedRoot.create(folder / "b", now=NOW)


@pytest.fixture
def world(two_roots: tuple[SimulatedRoot, SimulatedRoot]) -> World:
    root = two_roots[0]
    root.refresh(NOW)
    draft = Policy.parse(render_policy(root_sha256=root.root_sha256))
    rtmr3 = expected_rtmr3(
        package=b"p" * 48, job_sha384=b"j" * 48, policy_template=draft.template_sha384, weights=b"w" * 48
    )
    return World(root, rtmr3, render_policy(root_sha256=root.root_sha256, server_rtmr3=[rtmr3]).decode())


@pytest.fixture
def other_root(two_roots: tuple[SimulatedRoot, SimulatedRoot]) -> SimulatedRoot:
    return two_roots[1]


@pytest.fixture(scope="session")
def samples() -> Path:
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)")
    return shared / "vectors" / "attestation" / "dcap"
