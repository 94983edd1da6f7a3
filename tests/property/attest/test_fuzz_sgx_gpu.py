"""Whatever bytes a peer sends as SGX or GPU evidence: a decision or an `AttestationError`, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest import Policy, SimulatedRoot, verify_evidence
from cloister.attest._simulated.gpu import SIMULATED_DRIVER, SIMULATED_VBIOS, SimulatedGpuRoot
from cloister.attest._simulated.sgx_quote import SIMULATED_MR_ENCLAVE, SimulatedEnclave, sgx_evidence
from cloister.attest._verifiers.composite import pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce, verify_gpu
from cloister.attest._verifiers.gpu_report import parse_report
from cloister.errors import AttestationError, MalformedEvidenceError
from cloister.wire import Evidence, pack

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))


@dataclass(frozen=True)
class Honest:
    policy: Policy
    cpu: Evidence
    gpu: Evidence


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    root = SimulatedRoot.create(tmp_path_factory.mktemp("root") / "root", now=NOW)
    root.refresh(NOW, tee="sgx")
    vendor = SimulatedGpuRoot(now=NOW)
    policy = Policy.parse(
        f'version = 1\naccept = ["simulated-sgx", "with-gpu"]\nallow_simulated = true\n[roots]\n'
        f'intel_sha256 = ["{root.root_sha256}"]\nnvidia_sha256 = ["{vendor.root_sha256}"]\n'
        f'[gpu]\ndriver = ["{SIMULATED_DRIVER}"]\nvbios = ["{SIMULATED_VBIOS}"]\n'
        f'[roles.server.sgx]\nmr_enclave = ["{SIMULATED_MR_ENCLAVE.hex()}"]\n'.encode()
    )
    cpu = sgx_evidence(root, SimulatedEnclave(), report_data=REPORT_DATA)
    return Honest(policy, cpu, vendor.device().evidence(gpu_nonce(REPORT_DATA)))


def decide(honest: Honest, evidence: Evidence):
    return verify_evidence(evidence, honest.policy, role="server", report_data=REPORT_DATA, now=NOW).claims


def refused_or_equal(honest: Honest, evidence: Evidence, good: Evidence) -> None:
    try:
        claims = decide(honest, evidence)
    except AttestationError:
        return
    assert claims == decide(honest, good)


def mutated(draw, blob: bytes) -> bytes:
    """The blob with a piece of it replaced."""
    at = draw(st.integers(0, len(blob)))
    size = draw(st.integers(0, 8))
    return blob[:at] + draw(st.binary(max_size=8)) + blob[at + size :]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(blob=st.binary(max_size=6000), aux=st.binary(max_size=2000))
def test_arbitrary_bytes(honest, blob, aux):
    both = pack_composite(honest.cpu, [honest.gpu])
    for evidence, good in (
        (Evidence("simulated-sgx", blob, honest.cpu.aux), honest.cpu),
        (Evidence("simulated-sgx", honest.cpu.blob, aux), honest.cpu),
        (Evidence("with-gpu", blob, b""), both),
        (pack_composite(honest.cpu, [Evidence("simulated-gpu", blob, honest.gpu.aux)]), both),
        (pack_composite(honest.cpu, [Evidence("simulated-gpu", honest.gpu.blob, aux)]), both),
    ):
        refused_or_equal(honest, evidence, good)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_sgx_quotes(honest, data):
    blob = mutated(data.draw, honest.cpu.blob)
    refused_or_equal(honest, Evidence("simulated-sgx", blob, honest.cpu.aux), honest.cpu)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_composites(honest, data):
    both = pack_composite(honest.cpu, [honest.gpu])
    refused_or_equal(honest, Evidence("with-gpu", mutated(data.draw, both.blob), b""), both)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_reports_are_refused(honest, data):
    blob = mutated(data.draw, honest.gpu.blob)
    if blob != honest.gpu.blob:
        with pytest.raises(AttestationError):
            verify_gpu(Evidence("simulated-gpu", blob, honest.gpu.aux), honest.policy, now=NOW)


# Parsing a certificate with, say, a serial number of zero warns, and a warning is an error in tests alone.
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_chains(honest, data):
    aux = mutated(data.draw, honest.gpu.aux)
    both = pack_composite(honest.cpu, [honest.gpu])
    refused_or_equal(honest, pack_composite(honest.cpu, [Evidence("simulated-gpu", honest.gpu.blob, aux)]), both)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.binary(max_size=400).map(lambda tail: bytes.fromhex("11e001ff") + bytes(33) + b"\x11\x60\0\0" + tail))
def test_report_parser_is_total(blob):
    try:
        report = parse_report(blob)
    except MalformedEvidenceError:
        return
    assert report.signed + report.signature == blob


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_composites_of_any_value(honest, data):
    values = st.recursive(
        st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=9) | st.binary(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    part = st.fixed_dictionaries({"type": values, "blob": values, "aux": values}) | values
    body = data.draw(st.fixed_dictionaries({"cpu": part, "gpus": st.lists(part, max_size=3) | values}))
    with pytest.raises(AttestationError):
        decide(honest, Evidence("with-gpu", pack("attest.with-gpu", body), b""))
