"""SPF + LoRA on whole models of every family: what is chosen, what it computes and learns, and the way back."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracle import slow_spf as slow
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cloister.adapters import (
    LoraSpec,
    SpfLinear,
    SpfSpec,
    SpfSupport,
    add_lora,
    add_spf,
    attach_spf,
    check_spf,
    choose_support,
    merge_spf,
    merged_tensors,
    n_trainable,
    placed_support,
    spf_facts,
    trainable_state,
)
from cloister.adapters._spf_layout import find_blocks
from cloister.errors import AdapterError, StateMismatchError, UnsupportedLayerError
from cloister.slicing import inspect_backbone, load_far

from .conftest import Load, batch, disturb, logits

SPEC = SpfSpec(heads=0.5, neurons=0.3, criterion="random", r=2)
"""A random choice permutes heads and neurons of every block in another way."""

SHORT = ("llama-causal-lm", "bert-sequence-classification", "gpt2-causal-lm", "gpt_neox-causal-lm")


@pytest.fixture(params=SHORT)
def short_case(request: pytest.FixtureRequest) -> str:
    return request.param


def family_of(case: str) -> str:
    return case.partition("-")[0]


def loss_of(model: Any) -> Tensor:
    out = model(**batch()).logits
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def spf_linears(model: Any) -> dict[str, SpfLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpfLinear)}


def trained_rows(spf: SpfLinear) -> Tensor:
    return torch.cat([spf.row_order[start:stop] for start, stop in spf.segments])


def same_bits(model: Any, state: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ."""
    found = model.state_dict()
    assert found.keys() == state.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, found[name])]


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_l1_is_the_sum_over_all_rows_of_a_unit(load: Load, case: str) -> None:
    model, family = load(case), family_of(case)
    support = choose_support(slow.blocks_of(model, family), replace(SPEC, criterion="l1"))
    heads, neurons = slow.units_of(model, family)
    for i, block in enumerate(slow.blocks_of(model, family)):
        for chosen, units, share in ((support.heads[i], heads, 0.5), (support.neurons[i], neurons, 0.3)):
            scores = [
                sum(slow.dense(m, m.weight)[rows].double().abs().sum().item() for path, rows in unit.items()
                    for m in [block.get_submodule(path)])
                for unit in units
            ]  # fmt: skip
            assert chosen == slow.largest(scores, math.floor(share * len(units) + 0.5))


def test_random_is_of_the_seed_alone(load: Load) -> None:
    blocks = find_blocks(load(SHORT[0]))
    one = choose_support(blocks, SPEC, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert choose_support(blocks, SPEC, seed=1) == one
    assert torch.equal(torch.get_rng_state(), state)
    assert choose_support(blocks, SPEC, seed=2) != one
    assert one.neurons[0] != one.neurons[1]


def test_of_equal_units_the_first_are_chosen(load: Load) -> None:
    blocks = find_blocks(load(SHORT[0]))
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.fill_(-1.0)
    support = choose_support(blocks, SpfSpec(heads=0.5, neurons=0.05))
    assert support.heads[0] == (0,)
    assert support.neurons[0] == (0, 1, 2)


def test_the_rows_that_train_are_the_chosen_units(load: Load, case: str) -> None:
    model, family = load(case), family_of(case)
    heads, neurons = slow.units_of(model, family)
    attach_spf(model, SPEC, seed=3)
    support = placed_support(model)
    assert support is not None
    expected = dict.fromkeys(("head_groups", "attention_rows", "neurons", "feed_forward_rows"), 0)
    for i, path, spf in slow.linears(model, family):
        units = [heads[g] for g in support.heads[i]] + [neurons[n] for n in support.neurons[i]]
        rows = sorted(row for unit in units for row in unit.get(path, []))
        assert sorted(trained_rows(spf).tolist()) == rows
        expected["attention_rows" if path in heads[0] else "feed_forward_rows"] += len(rows)
    expected["head_groups"] = sum(map(len, support.heads))
    expected["neurons"] = sum(map(len, support.neurons))
    facts = spf_facts(model)
    assert facts is not None
    assert facts["chosen"] == expected
    assert facts["of"]["neurons"] == 3 * len(neurons)
    assert (facts["criterion"], facts["heads"], facts["neurons"]) == ("random", 0.5, 0.3)


# --- placing ----------------------------------------------------------------------------------------------------------


def test_placing_changes_no_function(load: Load, case: str) -> None:
    model = load(case)
    before = logits(model)
    assert attach_spf(model, SPEC, seed=3) is model
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_what_trains(load: Load, case: str) -> None:
    model = attach_spf(load(case), SPEC, seed=3)
    out = slow.out_path(family_of(case))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    rest = {name for name in trains if "rows_" not in name and f".{out}.lora_" not in name}
    assert rest <= {"classifier.weight", "classifier.bias", "score.weight"}
    assert bool(rest) == case.endswith("classification")
    assert sum(f".{out}.lora_A" in name for name in trains) == 3
    loss_of(model.eval()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_gradients_are_those_of_the_plain_model(load: Load, case: str) -> None:
    whole, model = load(case).eval(), attach_spf(load(case), SPEC, seed=3).eval()
    loss_of(whole).backward()
    loss_of(model).backward()
    spfs = spf_linears(model)
    grads = {name: slow.dense(m := whole.get_submodule(name), m.weight.grad) for name in spfs}
    scale = max(float(grad.abs().max()) for grad in grads.values())
    for name, spf in spfs.items():
        grad = grads[name]
        for row, (start, stop) in zip(spf.rows, spf.segments, strict=True):
            torch.testing.assert_close(row.grad, grad[spf.row_order[start:stop]], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("spec", "folded"),
    [
        (SpfSpec(heads=0, neurons=0.5), {"mlp.gate_proj", "mlp.up_proj"}),
        (SpfSpec(heads=0.5, neurons=0), {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
    ],
    ids=["neurons", "heads"],
)
def test_a_share_of_0_leaves_its_part_alone(load: Load, spec: SpfSpec, folded: set[str]) -> None:
    model = load(SHORT[0])
    before = logits(model)
    attach_spf(model, spec)
    assert {name.split(".", 3)[3] for name in spf_linears(model)} == folded
    assert len([name for name, _ in model.named_parameters() if ".lora_A." in name]) == 3
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    whole = load(SHORT[0])
    assert same_bits(merge_spf(model), whole.state_dict()) == []


def test_a_share_of_1_trains_all_rows(load: Load, short_case: str) -> None:
    model = attach_spf(load(short_case), SpfSpec(heads=1, neurons=1))
    assert all(sum(row.numel() for row in spf.rows) == spf.weight.numel() for spf in spf_linears(model).values())


def test_the_seed_alone_decides_lora(load: Load) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        found = trainable_state(attach_spf(load(SHORT[0]), seed=seed))
        return {name: tensor for name, tensor in found.items() if ".lora_A." in name}

    first = state(5)
    torch.manual_seed(99)
    generator = torch.get_rng_state()
    again, other = state(5), state(6)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_lora_starts_the_same_whatever_the_support(load: Load, short_case: str) -> None:
    out = slow.out_path(family_of(short_case))

    def drawn(model: Any) -> list[Tensor]:
        layers = [block.get_submodule(out) for block in find_blocks(model)]
        order = [layer.base_layer._buffers.get("column_order") for layer in layers]
        found = [layer.lora_A["default"].weight for layer in layers]
        return [a if o is None else a[:, torch.argsort(o)] for a, o in zip(found, order, strict=True)]

    one, other = (drawn(attach_spf(load(short_case), spec, seed=4)) for spec in (SPEC, SpfSpec(heads=0, r=2)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_training_helps_and_a_copy_trains_apart(load: Load, short_case: str) -> None:
    model = attach_spf(load(short_case), SPEC).eval()
    twin = copy.deepcopy(model)
    labels = torch.tensor([0, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        out = model(**batch()).logits
        loss = nn.functional.cross_entropy(out if out.dim() == 2 else out[:, 0], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(logits(twin), logits(attach_spf(load(short_case), SPEC)))
    assert placed_support(twin) == placed_support(model)


def test_a_state_dict_has_every_number_once(load: Load, short_case: str) -> None:
    """What saves a model in the midst of training (safetensors) refuses memory that two names share."""
    model = attach_spf(load(short_case), SPEC)
    tied = {"lm_head.weight"}
    tensors = [tensor for name, tensor in model.state_dict().items() if name not in tied]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_in_bfloat16_it_comes_back_bit_for_bit(load: Load) -> None:
    model, whole = attach_spf(load(SHORT[0]).bfloat16(), SPEC), load(SHORT[0]).bfloat16()
    loss_of(model).float().backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_bits(merge_spf(model), whole.state_dict()) == []


def test_activation_checkpointing_changes_nothing(load: Load) -> None:
    model, saving = attach_spf(load(SHORT[0]), SPEC).train(), attach_spf(load(SHORT[0]), SPEC).train()
    saving.activation_checkpointing_enable()
    for each in (model, saving):
        loss_of(each).backward()
    for one, other in zip(model.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


# --- back again -------------------------------------------------------------------------------------------------------


def test_untrained_it_comes_back_bit_for_bit(load: Load, case: str) -> None:
    model, whole = attach_spf(load(case), SPEC, seed=3), load(case)
    kinds = {name: type(module) for name, module in whole.named_modules()}
    assert merge_spf(model) is model
    assert same_bits(model, whole.state_dict()) == []
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(logits(model), logits(whole))


def test_tuned_it_comes_back_with_frozen_rows_bit_for_bit(load: Load, case: str) -> None:
    model, whole = attach_spf(load(case), SPEC, seed=3), load(case)
    disturb(model)
    tuned, spfs = logits(model), {name: trained_rows(spf) for name, spf in spf_linears(model).items()}
    tensors = merged_tensors(model)
    merge_spf(model)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-3, atol=1e-3)
    state = model.state_dict()
    assert tensors.keys() <= state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items() if ".lora" not in name)
    changed = set(same_bits(whole, state))
    outs = {name for name in state if name.endswith(f"{slow.out_path(family_of(case))}.weight")}
    heads = {name for name in state if name.startswith(("classifier.", "score."))}
    assert changed == {f"{name}.weight" for name in spfs} | outs | heads
    for name, rows in spfs.items():
        old, new = (m.get_submodule(name) for m in (whole, model))
        frozen = torch.ones(len(slow.dense(old, old.weight)), dtype=torch.bool)
        frozen[rows] = False
        assert torch.equal(slow.dense(old, old.weight)[frozen], slow.dense(new, new.weight)[frozen])
        assert (slow.dense(old, old.weight)[rows] != slow.dense(new, new.weight)[rows]).any(dim=1).all()


def test_a_merged_model_can_be_tuned_and_saved_like_any(load: Load, tmp_path: Path) -> None:
    model = attach_spf(load(SHORT[0]), SPEC)
    disturb(model)
    merge_spf(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert n_trainable(attach_spf(model, SPEC)) > 0


def test_a_model_without_spf_cannot_be_merged(load: Load) -> None:
    with pytest.raises(AdapterError, match="no SPF to merge"):
        merge_spf(load(SHORT[0]))


# --- a far side -------------------------------------------------------------------------------------------------------


def far_of(folder: Path, task: str = "sequence-classification") -> Any:
    return load_far(inspect_backbone(folder), 1, task=task, n_labels=3)


def test_a_far_side_trains_its_new_head_too(whole_folders: dict[str, Path]) -> None:
    far = far_of(whole_folders["llama"])
    add_spf(far, SPEC, choose_support(far.blocks, SPEC, seed=1), seed=0)
    trains = {name for name, p in far.named_parameters() if p.requires_grad}
    assert {name for name in trains if not name.startswith("blocks.")} == {"head.weight", "head.bias"}
    far = far_of(whole_folders["llama"], "causal-lm")
    add_spf(far, SPEC, choose_support(far.blocks, SPEC, seed=1), seed=0)
    assert not any(p.requires_grad for p in far.head.parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_second_adapter_is_refused(load: Load, whole_folders: dict[str, Path]) -> None:
    model = attach_spf(load(SHORT[0]))
    with pytest.raises(AdapterError, match="already"):
        attach_spf(model)
    far = far_of(whole_folders["llama"])
    add_lora(far, LoraSpec(), seed=0)
    with pytest.raises(AdapterError, match="already"):
        add_spf(far, SPEC, SupportOf.blocks(2), seed=0)


class SupportOf:
    """Supports of so many blocks with 2 head groups and 64 neurons each."""

    @staticmethod
    def blocks(n: int, heads: tuple[int, ...] = (1,), n_neurons: int = 19) -> SpfSupport:
        return SpfSupport((heads,) * n, (tuple(range(n_neurons)),) * n)


@pytest.mark.parametrize(
    ("support", "key"),
    [
        (SupportOf.blocks(1), "support"),
        (SupportOf.blocks(2, heads=(0, 1)), "heads.0"),
        (SupportOf.blocks(2, heads=(2,)), "heads.0"),
        (SupportOf.blocks(2, n_neurons=20), "neurons.0"),
    ],
    ids=["blocks", "too-many", "beyond", "another-share"],
)
def test_a_support_of_another_model_or_share_changes_nothing(
    whole_folders: dict[str, Path], support: SpfSupport, key: str
) -> None:
    far = far_of(whole_folders["llama"])
    with pytest.raises(StateMismatchError) as caught:
        add_spf(far, SPEC, support, seed=0)
    assert caught.value.key == key
    assert not spf_linears(far)
    add_spf(far, SPEC, SupportOf.blocks(2), seed=0)


@pytest.mark.parametrize("part", ["heads", "neurons"])
def test_a_share_that_selects_nothing_is_refused(load: Load, part: str) -> None:
    model, spec = load(SHORT[0]), replace(SPEC, **{part: 0.001})
    for refused in (lambda: attach_spf(model, spec), lambda: check_spf(find_blocks(model), spec)):
        with pytest.raises(AdapterError, match=f"adapter.{part} = 0.001 selects none") as caught:
            refused()
        assert "least share" in caught.value.hint
    assert not spf_linears(model)


class Unknown(nn.Module):
    """A block with heads and neurons that no layout describes."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Linear(8, 8)


def test_a_family_without_a_known_layout_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="knows no layout of heads and neurons for Unknown") as caught:
        choose_support([Unknown()], SPEC)
    assert "Llama" in caught.value.hint and "LoRA" in caught.value.hint


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="blocks of Unknown are not found"):
        attach_spf(Unknown())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: setattr(b.self_attn, "sinks", nn.Parameter(torch.zeros(4))), "self_attn.sinks"),
        (lambda b: setattr(b.self_attn, "q_norm", nn.LayerNorm(32)), "self_attn.q_norm.weight"),
        (lambda b: setattr(b.mlp, "scale", nn.Parameter(torch.zeros(64))), "mlp.scale"),
        (lambda b: setattr(b.self_attn, "is_kv_shared_layer", True), "is_kv_shared_layer"),
        (lambda b: setattr(b.mlp, "up_proj", nn.Bilinear(32, 32, 64)), "mlp.up_proj is a Bilinear"),
        (lambda b: setattr(b.mlp, "up_proj", nn.Linear(32, 60)), "64 columns and another number of rows"),
        (lambda b: setattr(b.self_attn, "head_dim", 7), "heads of 7"),
        (lambda b: setattr(b.self_attn, "v_proj", nn.Linear(32, 8)), "query, key and value"),
        (lambda b: setattr(b.self_attn, "o_proj", nn.Linear(24, 32)), "query, key and value"),
    ],
    ids=["sinks", "norm-over-heads", "scale-by-neuron", "shared-keys", "not-linear", "rows", "head-size", "values",
         "output"],
)  # fmt: skip
def test_what_permuting_would_not_reach_is_refused(load: Load, change: Any, said: str) -> None:
    model = load(SHORT[0])
    change(find_blocks(model)[1])
    with pytest.raises(UnsupportedLayerError, match=said):
        attach_spf(model)
    assert not spf_linears(model)


def test_a_norm_of_single_heads_is_no_hindrance(load: Load) -> None:
    model = load(SHORT[0])
    for block in find_blocks(model):
        block.self_attn.q_norm = nn.RMSNorm(8)
    assert spf_linears(attach_spf(model))


def test_a_transposed_weight_stays_transposed(load: Load) -> None:
    model = merge_spf(attach_spf(load("gpt2-causal-lm"), SPEC))
    kinds = [type(module) for module in find_blocks(model).modules()]
    assert kinds.count(Conv1D) == 3 * 4
