"""Every reason to refuse a CPU's evidence with that of GPUs beside it, each with a test of its own."""

from __future__ import annotations

import pytest

from cloister.attest import Policy, _verify
from cloister.attest._simulated import gpu as simulated
from cloister.attest._simulated.gpu import SimulatedGpu, SimulatedGpuRoot
from cloister.attest._verifiers.composite import pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.errors import MalformedEvidenceError, MeasurementMismatchError, PolicyRejectedError
from cloister.wire import Evidence, pack

NOW = 1_800_000_000
NONCE = bytes(range(32))
REPORT_DATA = bytes(range(64))


@pytest.fixture(scope="module")
def root() -> SimulatedGpuRoot:
    return SimulatedGpuRoot(now=NOW)


@pytest.fixture(scope="module")
def gpu(root) -> SimulatedGpu:
    return root.device()


@pytest.fixture
def both(world, root, gpu):
    """A policy for the simulated CPU with the simulated GPU, and the means to ask it."""

    def text(*, accept: str = '["simulated", "with-gpu"]', required: str = "true", platforms: str = "") -> str:
        changes = (
            ('accept = ["simulated"]', f"accept = {accept}"),
            ("[roots]", f'[roots]\nnvidia_sha256 = ["{root.root_sha256}"]'),
        )
        base = world.policy_text
        for old, new in changes:
            assert old in base
            base = base.replace(old, new)
        section = f'driver = ["{simulated.SIMULATED_DRIVER}"]\nvbios = ["{simulated.SIMULATED_VBIOS}"]\n'
        section += f'measurements.1 = ["{simulated.simulated_measurement(1).hex()}"]\n'
        return f"{base}\n[gpu]\nrequired = {required}\n{section}{platforms}"

    return text


def decide(world, evidence: Evidence, text: str):
    return world.verify(evidence, Policy.parse(text.encode()))


def composite(world, gpu, *, nonce: bytes | None = None, more: list[Evidence] | None = None) -> Evidence:
    nonce = gpu_nonce(REPORT_DATA) if nonce is None else nonce
    return pack_composite(world.evidence(), [gpu.evidence(nonce), *(more or [])])


def test_cpu_with_gpu_is_accepted(world, gpu, both):
    decision = decide(world, composite(world, gpu), both())
    claims = decision.claims
    assert (claims.tee, claims.evidence_type, claims.simulated) == ("tdx", "simulated", True)
    assert [part.tee for part in claims.parts] == ["gpu"]
    assert claims.parts[0].report_data == gpu_nonce(REPORT_DATA)
    assert any("answer the CPU's session" in reason for reason in decision.reasons)
    assert "a GPU is part of the evidence" in decision.reasons
    assert any("about a GPU" in limit for limit in decision.limits)


def test_two_gpus(world, root, gpu, both):
    evidence = composite(world, gpu, more=[root.device().evidence(gpu_nonce(REPORT_DATA))])
    assert len(decide(world, evidence, both()).claims.parts) == 2


def test_simulated_gpu_beside_a_real_cpu_is_simulated(world, gpu, both, monkeypatch):
    # What a real CPU would prove is played here; a simulated part must never disappear behind it.
    proven = _verify.verify_tdx(world.evidence(), Policy.parse(both().encode()), role="server", now=NOW)
    object.__setattr__(proven.claims, "simulated", False)
    monkeypatch.setitem(_verify.VERIFIERS, "simulated", lambda *_, **__: proven)
    assert decide(world, composite(world, gpu), both()).claims.simulated


def test_plain_cpu_evidence_where_a_gpu_is_required(world, both):
    with pytest.raises(PolicyRejectedError, match=r"\[gpu\]\.required"):
        decide(world, world.evidence(), both())
    assert decide(world, world.evidence(), both(required="false")).accepted


def test_with_gpu_must_be_accepted(world, gpu, both):
    with pytest.raises(PolicyRejectedError, match='"with-gpu" is not accepted'):
        decide(world, composite(world, gpu), both(accept='["simulated"]'))


def test_the_cpus_type_must_be_accepted_too(world, gpu, both):
    with pytest.raises(PolicyRejectedError, match='"simulated" beside a GPU is not accepted; the policy accepts noth'):
        decide(world, composite(world, gpu), both(accept='["with-gpu"]'))


def test_unknown_cpu_type_beside_a_gpu(world, gpu, both):
    cpu = world.evidence()
    evidence = pack_composite(Evidence("sev", cpu.blob, cpu.aux), [gpu.evidence(gpu_nonce(REPORT_DATA))])
    with pytest.raises(PolicyRejectedError, match='"sev" beside a GPU'):
        decide(world, evidence, both())


def test_report_for_another_session(world, gpu, both):
    with pytest.raises(MeasurementMismatchError, match="nonce of a report"):
        decide(world, composite(world, gpu, nonce=gpu_nonce(bytes(64))), both())


def test_second_report_for_another_session(world, root, gpu, both):
    with pytest.raises(MeasurementMismatchError, match="nonce of a report"):
        decide(world, composite(world, gpu, more=[root.device().evidence(NONCE)]), both())


def test_whole_evidence_for_another_session(world, gpu, both):
    other = bytes(64)
    evidence = pack_composite(world.evidence(report_data=other), [gpu.evidence(gpu_nonce(other))])
    with pytest.raises(MeasurementMismatchError, match="report_data is not of this session"):
        decide(world, evidence, both())


def test_one_device_as_two(world, gpu, both):
    with pytest.raises(MeasurementMismatchError, match="one device answers as several"):
        decide(world, composite(world, gpu, more=[gpu.evidence(gpu_nonce(REPORT_DATA))]), both())


def test_one_device_as_two_under_another_leaf(world, root, gpu, both):
    leaf = gpu.issue_leaf()
    again = Evidence(
        "simulated-gpu",
        gpu.report(gpu_nonce(REPORT_DATA)),
        simulated.pem(leaf, gpu.certificate, root.line, root.certificate),
    )
    with pytest.raises(MeasurementMismatchError, match="one device answers as several"):
        decide(world, composite(world, gpu, more=[again]), both())


def test_wrong_code_beside_a_good_gpu(world, gpu, both):
    evidence = pack_composite(world.evidence(rtmr3=b"\1" * 48), [gpu.evidence(gpu_nonce(REPORT_DATA))])
    with pytest.raises(MeasurementMismatchError, match="rtmr3"):
        decide(world, evidence, both())


def test_bad_gpu_beside_good_code(world, gpu, both):
    bad = gpu.evidence(gpu_nonce(REPORT_DATA), measurements={1: b"\1" * 48})
    with pytest.raises(MeasurementMismatchError, match="measurement 1"):
        decide(world, pack_composite(world.evidence(), [bad]), both())


def test_a_gpu_does_not_stand_in_for_the_platform_list(world, gpu, both):
    text = both(platforms=f'\n[platforms]\nallow_piid = ["{"00" * 16}"]\n')
    with pytest.raises(PolicyRejectedError, match="allow_piid"):
        decide(world, composite(world, gpu), text)


def test_nested_composite(world, gpu, both):
    inner = composite(world, gpu)
    with pytest.raises(MalformedEvidenceError, match="does not belong"):
        decide(world, pack_composite(inner, [gpu.evidence(gpu_nonce(REPORT_DATA))]), both())


def test_gpu_in_the_place_of_the_cpu(world, gpu, both):
    part = gpu.evidence(gpu_nonce(REPORT_DATA))
    with pytest.raises(MalformedEvidenceError, match="does not belong"):
        decide(world, pack_composite(part, [part]), both())


def test_cpu_in_the_place_of_a_gpu(world, both):
    with pytest.raises(MalformedEvidenceError, match="does not belong"):
        decide(world, pack_composite(world.evidence(), [world.evidence()]), both())


def test_no_gpu_at_all(world, both):
    with pytest.raises(MalformedEvidenceError, match="1 to 16 GPUs"):
        decide(world, pack_composite(world.evidence(), []), both())


def test_seventeen_gpus(world, gpu, both):
    parts = [gpu.evidence(gpu_nonce(REPORT_DATA))] * 17
    with pytest.raises(MalformedEvidenceError, match="1 to 16 GPUs"):
        decide(world, pack_composite(world.evidence(), parts), both())


def test_something_beside_the_parts(world, gpu, both):
    found = composite(world, gpu)
    with pytest.raises(MalformedEvidenceError, match="nothing reads"):
        decide(world, Evidence(found.type, found.blob, b"x"), both())


def fields(evidence: Evidence, **changes: object) -> dict[str, object]:
    return {"type": evidence.type, "blob": evidence.blob, "aux": evidence.aux, **changes}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda cpu, gpu: {"cpu": fields(cpu), "gpus": [fields(gpu)], "more": 1}, "one CPU and"),
        (lambda cpu, gpu: {"cpu": fields(cpu)}, "one CPU and"),
        (lambda cpu, gpu: {"cpu": fields(cpu), "gpus": fields(gpu)}, "one CPU and"),
        (lambda cpu, gpu: {"gpus": [fields(gpu)]}, "other fields"),
        (lambda cpu, gpu: {"cpu": fields(cpu), "gpus": [1]}, "other fields"),
        (lambda cpu, gpu: {"cpu": fields(cpu, more=1), "gpus": [fields(gpu)]}, "other fields"),
        (lambda cpu, gpu: {"cpu": fields(cpu, blob="text"), "gpus": [fields(gpu)]}, "evidence blob is not"),
        (lambda cpu, gpu: {"cpu": fields(cpu), "gpus": [fields(gpu, type="A B")]}, "evidence type is not"),
    ],
)
def test_malformed_composite(world, gpu, both, change, match):
    blob = pack("attest.with-gpu", change(world.evidence(), gpu.evidence(gpu_nonce(REPORT_DATA))))
    with pytest.raises(MalformedEvidenceError, match=match):
        decide(world, Evidence("with-gpu", blob, b""), both())


def test_composite_that_is_none(world, both):
    with pytest.raises(MalformedEvidenceError, match="does not parse"):
        decide(world, Evidence("with-gpu", b"x", b""), both())
