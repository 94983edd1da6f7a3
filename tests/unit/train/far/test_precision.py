"""bf16: what it rounds and what it must not, the refusal where the processor has none, and that it learns the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from cloister.adapters import LoraSpec, SpfSpec, add_lora, placed_support, trainable_state
from cloister.errors import ConfigError, StateMismatchError
from cloister.slicing import inspect_backbone, load_far
from cloister.testing import TINY_FAMILIES, write_tiny_model
from cloister.train import (
    Checkpointer,
    FarTrainer,
    LocalTraining,
    TrainSpec,
    evaluate,
    export_release,
    predict,
    resolve_precision,
    set_precision,
)
from cloister.train import _precision as module
from cloister.train._importance import place_adapter
from cloister.train._lora_kernel import accelerate_lora
from cloister.train._loss import backward

SPEC = TrainSpec(epochs=2, batch_size=4, lr=3e-3, seed=5, precision="bf16")
ADAPTERS = {
    "own-kernel": LoraSpec(r=4, alpha=8),
    "peft": LoraSpec(r=4, alpha=8, dropout=0.1),
    "spf": SpfSpec(0.5, 0.25, r=4),
}

CASES = [(family, "sequence-classification") for family in TINY_FAMILIES]
CASES += [(family, "causal-lm") for family in TINY_FAMILIES if family != "bert"]  # an encoder


@pytest.fixture
def chip(monkeypatch):
    """Makes every processor one that has bf16, or has not: kernels compute it everywhere, only slower."""
    return lambda has: monkeypatch.setattr(module, "has_bf16", lambda _device="cpu": has)


@pytest.fixture
def bf16(chip):
    chip(True)


# --- which one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "has", "taken"),
    [("fp32", True, "fp32"), ("fp32", False, "fp32"), ("auto", True, "bf16"), ("auto", False, "fp32"),
     ("bf16", True, "bf16")],
)  # fmt: skip
def test_what_is_taken(chip, wanted, has, taken):
    chip(has)
    assert resolve_precision(wanted) == taken


def test_bf16_without_such_arithmetic_is_refused_with_key_and_hint(chip, make_job, lora):
    chip(False)
    job = make_job()
    for refused in (
        lambda: resolve_precision("bf16"),
        lambda: set_precision(job.far(), "bf16"),
        lambda: FarTrainer(job.far(), SPEC, lora, job.task, job.source()),
    ):
        with pytest.raises(ConfigError, match=r"training\.precision") as caught:
            refused()
        assert [problem.key for problem in caught.value.problems] == ["training.precision"]
        assert '"auto"' in caught.value.hint


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [({}, False), ({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
     ({"amx_bf16": True}, True), ({"architecture": "aarch64", "bf16": True}, True)],
)  # fmt: skip
def test_the_processor_says_what_it_has(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert module.has_bf16() is has


def test_a_gpu_is_asked_for_its_own_without_emulation(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    module.has_bf16("cuda")
    assert asked == [False]


def test_an_unknown_precision_is_a_config_error():
    with pytest.raises(ConfigError, match=r"training\.precision"):
        TrainSpec(precision="fp16")  # type: ignore[arg-type]


# --- what it does ---------------------------------------------------------------------------------------------------


def sides(family: str, folder, adapter: str, task: str = "sequence-classification"):
    """The same far side with adapter in both precisions; B is not 0, or half of LoRA would go untested."""
    info = inspect_backbone(write_tiny_model(folder, family, n_layers=4, seed=3))
    pooling = "mean" if info.is_encoder else "last"
    made = []
    for precision in ("fp32", "bf16"):
        far = load_far(info, 2, task=task, n_labels=None if task == "causal-lm" else 3, pooling=pooling)
        place_adapter(far, ADAPTERS[adapter], None, seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in far.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.05, generator=generator)
        assert set_precision(far, precision) == precision
        made.append(far.eval())  # a fresh dropout would draw
    return made


def batch(far, n: int = 3, tokens: int = 7):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(n, tokens, dtype=torch.int64)
    mask[1, 4:] = 0
    return torch.randn(n, tokens, far.info.hidden_size, generator=generator), mask


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_frozen_matrices_are_bf16_and_everything_else_stays_float32(tmp_path, family, adapter):
    _, far = sides(family, tmp_path, adapter)
    for name, parameter in far.named_parameters():
        frozen_matrix = parameter.dim() > 1 and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if frozen_matrix else torch.float32), name
    assert far.is_bf16
    before = {name: p.data_ptr() for name, p in far.named_parameters()}
    far.compute_in_bf16()  # again
    assert before == {name: p.data_ptr() for name, p in far.named_parameters()}


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(("family", "task"), CASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_and_gradients_are_near_float32s_and_in_float32(tmp_path, family, task, adapter):
    found = []
    for far in sides(family, tmp_path, adapter, task):
        accelerate_lora(far.blocks)
        hidden, mask = batch(far)
        out = far(hidden, mask)
        assert out.dtype == torch.float32
        real = out[mask.bool()] if task == "causal-lm" else out
        functional.cross_entropy(real, torch.arange(len(real)) % 3).backward()
        grads = {name: p.grad for name, p in far.named_parameters() if p.grad is not None}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        found.append((real.detach(), grads))
    (exact, exact_grads), (rounded, rounded_grads) = found
    assert not torch.equal(exact, rounded)
    assert far_apart(rounded, exact) < 0.03
    assert exact_grads.keys() == rounded_grads.keys()
    for name, grad in exact_grads.items():
        assert far_apart(rounded_grads[name], grad) < 0.06, name


def far_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm; bfloat16 rounds to 2^-9 relative."""
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.usefixtures("bf16")
def test_padding_and_neighbours_change_no_answer_by_more_than_rounding(make_job, lora):
    job = make_job()
    far, features = job.far(), job.features("east", "train")
    add_lora(far, lora, seed=1)
    set_precision(far, "bf16")
    together = predict(far, features, job.task)
    alone = torch.cat([predict(far, [feature], job.task) for feature in features])
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.01)
    assert together.dtype == torch.float32


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
def test_learns_what_float32_learns(make_job, lora, family, task):
    job, found = make_job(family, task), {}
    for precision in ("fp32", "bf16"):
        far = job.far(SPEC.seed)
        result = FarTrainer(far, replace(SPEC, precision=precision), lora, job.task, job.source()).train()
        found[precision] = result.losses, evaluate(far, job.source(), job.task).loss
        assert all(p.dtype == torch.float32 for p in far.parameters() if p.requires_grad)
        assert far.is_bf16 == (precision == "bf16")
    assert found["bf16"][0] != found["fp32"][0]
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], abs=0.03)
    assert found["bf16"][1] == pytest.approx(found["fp32"][1], abs=0.03)


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("gpt2", "causal-lm")])
@pytest.mark.parametrize("criterion", ["l1", "fisher"])
def test_spf_learns_what_it_learns_in_float32(make_job, family, task, criterion):
    """Which rows train is decided in float32 in both, so it is the same ones."""
    job, found = make_job(family, task), {}
    for precision in ("fp32", "bf16"):
        far = job.far(SPEC.seed)
        spec = replace(SPEC, precision=precision)
        result = FarTrainer(far, spec, SpfSpec(0.5, 0.25, criterion, r=4), job.task, job.source()).train()
        found[precision] = result.losses, placed_support(far)
        assert all(p.dtype == torch.float32 for p in far.parameters() if p.requires_grad)
    assert found["bf16"][1] == found["fp32"][1]
    assert found["bf16"][0] != found["fp32"][0]
    # Adam takes whole steps where gradients are nearly 0, so that rounding tells later on; not in the first step.
    assert found["bf16"][0][0] == pytest.approx(found["fp32"][0][0], abs=0.03)
    assert sum(found["bf16"][0]) == pytest.approx(sum(found["fp32"][0]), rel=0.05)


@pytest.mark.usefixtures("bf16")
def test_same_bits_every_time_and_a_checkpoint_is_of_its_precision(make_job, lora, tmp_path):
    job, states = make_job(), []
    for _ in range(2):
        far = job.far(SPEC.seed)
        checkpoint = Checkpointer(tmp_path / "checkpoint.sealed", bytes(32), "label")
        FarTrainer(far, SPEC, lora, job.task, job.source(), checkpoint=None if states else checkpoint).train()
        states.append(trainable_state(far))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    auto = FarTrainer(
        job.far(SPEC.seed), replace(SPEC, precision="auto"), lora, job.task, job.source(), checkpoint=checkpoint
    )
    with pytest.raises(StateMismatchError):
        other = replace(SPEC, precision="fp32")
        FarTrainer(job.far(SPEC.seed), other, lora, job.task, job.source(), checkpoint=checkpoint).train()
    assert auto.train().resumed_at > 0, "auto is bf16 here"


@pytest.mark.usefixtures("bf16")
def test_released_weights_are_float32_with_the_adapter_added_exactly(make_job, lora):
    from safetensors.torch import load

    job = make_job()
    far = job.far(SPEC.seed)
    FarTrainer(far, SPEC, lora, job.task, job.source()).train()
    weights = load(export_release(far, "weights"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    layers = {name: m for name, m in far.named_modules() if isinstance(m, LoraLinear)}
    assert layers
    for name, layer in layers.items():
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        torch.testing.assert_close(weights[f"{name}.weight"], layer.base_layer.weight.float() + delta)


@pytest.mark.usefixtures("bf16")
def test_an_example_without_a_target_costs_nothing(make_job, lora):
    from cloister.train import Feature

    job = make_job("llama", "causal-lm")
    far = job.far()
    FarTrainer(far, replace(SPEC, max_steps=1), lora, job.task, job.source())
    hidden = job.features("east", "train")[0].hidden
    silent = Feature(0, hidden, labels=torch.full((len(hidden),), -100))
    assert backward(far, [silent], [1.0]) == 0.0


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"precision": "auto"}, {"patience": 2}])
def test_method_1_refuses_what_is_the_far_sides(change):
    with pytest.raises(ConfigError, match="Method 2"):
        LocalTraining(None, None, TrainSpec(**change), None)  # type: ignore[arg-type]  # refused before it looks at them
