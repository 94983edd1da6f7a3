"""SPF + LoRA on a far side or a whole transformers model: choose what trains, place it, put it back.

Placing permutes heads and neurons so that the chosen ones come first, which changes no block's function, and replaces
the linears whose rows train by `SpfLinear`. `merge_spf` is the exact inverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cloister.adapters._attach import HEADS
from cloister.adapters._lora import draw_a, is_transposed, linears_of, lora_fields
from cloister.adapters._spf_layout import (
    BlockParts,
    Part,
    PlainLinear,
    block_parts,
    dense_weight,
    find_blocks,
    in_features,
    unit_sums,
)
from cloister.adapters._spf_linear import COLUMN_ORDER, SpfLinear, fold_columns, fold_rows, is_folded, plain
from cloister.adapters._spf_scores import BlockScores, check_scores
from cloister.adapters._spf_spec import PartName, SpfSpec, SpfSupport
from cloister.errors import AdapterError, StateMismatchError

_ADAPTER_NAME = "default"
_PLACED = "cloister_spf"
_COUNTS = ("head_groups", "attention_rows", "neurons", "feed_forward_rows")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Placed:
    """What was placed on some blocks; kept with them. As *secret* as the support."""

    spec: SpfSpec
    support: SpfSupport
    parts: tuple[BlockParts, ...] = field(repr=False)

    @property
    def outputs(self) -> list[str]:
        """Paths, in the blocks, of the attentions' output projections, which have LoRA."""
        return [f"{i}.{block.heads.column}" for i, block in enumerate(self.parts)]


# --- what trains ------------------------------------------------------------------------------------------------------


def check_spf(blocks: Iterable[nn.Module], spec: SpfSpec) -> None:
    """Refuse early what placing would refuse, before any score is taken.

    Raises:
        UnsupportedLayerError: a block's layout is not known.
        AdapterError: a share selects nothing; the hint has the least that selects one.
    """
    for block in blocks:
        for part in block_parts(block):
            spec.n_chosen(part.name, part.n_units)


def spf_units(block: nn.Module) -> dict[PartName, tuple[int, int]]:
    """What a block has for SPF to choose from: how many units of each part, and how many weights the rows of one hold.

    Args:
        block: without an adapter; on any device, the meta device too.

    Raises:
        UnsupportedLayerError: its layout is not known.
    """
    return {
        part.name: (
            part.n_units,
            sum(sum(widths) * in_features(cast("PlainLinear", block.get_submodule(path)))
                for path, widths in part.rows.items()),
        )
        for part in block_parts(block)
    }  # fmt: skip


def choose_support(
    blocks: Iterable[nn.Module], spec: SpfSpec, *, scores: Sequence[BlockScores] | None = None, seed: int = 0
) -> SpfSupport:
    """The best head groups and neurons of every block; of equal ones the first.

    Args:
        blocks: without an adapter; their weights are *public*.
        spec: shares and criterion.
        scores: from `RowScores`, for the criteria gradient and fisher. *Secret*, and so is then the result.
        seed: of the criterion random, a *public* choice.

    Raises:
        UnsupportedLayerError: a block's layout is not known.
        AdapterError: a share selects nothing, or scores are missing, of another model, or not asked for.
    """
    blocks = list(blocks)
    parts = [block_parts(block) for block in blocks]
    if spec.needs_scores != (scores is not None):
        problem = "needs scores" if spec.needs_scores else "takes no scores"
        raise AdapterError(
            f"the criterion {spec.criterion} {problem}", hint="they are RowScores' of gradient or fisher"
        )
    if scores is not None:
        check_scores(scores, parts)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[tuple[int, ...]]] = {"heads": [], "neurons": []}
    for i, block in enumerate(blocks):
        for part in parts[i]:
            if scores is not None:
                found = getattr(scores[i], part.name)
            elif spec.criterion == "random":
                found = torch.rand(part.n_units, generator=generator, dtype=torch.float64)
            else:
                found = _l1(block, part)
            chosen[part.name].append(_largest(found, spec.n_chosen(part.name, part.n_units)))
    return SpfSupport(tuple(chosen["heads"]), tuple(chosen["neurons"]))


def _l1(block: nn.Module, part: Part) -> Tensor:
    """Sum of |W| over the rows of each unit, in float64 so that its order does not depend on how it was added up."""
    found = []
    for path, widths in part.rows.items():
        weight = dense_weight(block.get_submodule(path)).detach()
        by_row = torch.linalg.vector_norm(weight, ord=1, dim=1, dtype=torch.float64)
        found.append(unit_sums(by_row, part.n_units, widths))
    return torch.stack(found).sum(dim=0).cpu()


def _largest(scores: Tensor, n: int) -> tuple[int, ...]:
    return tuple(sorted(torch.argsort(scores, descending=True, stable=True)[:n].tolist()))


# --- placing ----------------------------------------------------------------------------------------------------------


def add_spf(far: nn.Module, spec: SpfSpec, support: SpfSupport, *, seed: int) -> None:
    """Place SPF and LoRA on the far side's blocks, in place, and choose what trains.

    Trains: the support's rows, LoRA on the attention's output projection, and the head where the task is
    classification (it is new). All else is frozen, biases too.

    Args:
        far: a `slicing.FarSide` without an adapter.
        spec: the adapter.
        support: from `choose_support`, or as a checkpoint had it.
        seed: of LoRA's A; the same seed gives the same A on every machine, for every support.

    Raises:
        UnsupportedLayerError: a block's layout is not known.
        StateMismatchError: the support does not fit the spec and the blocks.
        AdapterError: there is an adapter already.
    """
    side = cast("Any", far)
    _place(side.blocks, spec, support, seed)
    far.requires_grad_(False)
    _let_train(side.blocks)
    if side.task == "sequence-classification":
        side.head.requires_grad_(True)


def attach_spf(
    model: Model, spec: SpfSpec | None = None, *, scores: Sequence[BlockScores] | None = None, seed: int = 0
) -> Model:
    """Place SPF and LoRA on all blocks of a transformers model, in place, for ordinary training without a federation.

    Trains: the chosen rows, LoRA on the attention's output projections, and a classification head. All else is frozen.

    Args:
        model: a causal language model, sequence classifier or bare model of a family with a known layout, in any
            floating-point type, neither quantised nor adapted.
        spec: the adapter; SPF of half of the heads and neurons by their L1 norm if left out.
        scores: from `RowScores`, for the criteria gradient and fisher.
        seed: of LoRA's A and of the criterion random.

    Returns:
        the model itself.

    Raises:
        UnsupportedLayerError: the blocks are not found, or their layout is not known.
        AdapterError: a share selects nothing, scores are missing, or there is an adapter already.
    """
    spec, blocks = spec or SpfSpec(), find_blocks(model)
    linears_of(blocks)  # refuses an adapter before the layout of its modules is looked at
    _place(blocks, spec, choose_support(blocks, spec, scores=scores, seed=seed), seed)
    model.requires_grad_(False)
    _let_train(blocks)
    for name in HEADS:
        if isinstance(head := getattr(model, name, None), nn.Module):
            head.requires_grad_(True)
    return model


def _place(blocks: nn.ModuleList, spec: SpfSpec, support: SpfSupport, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linears_of(blocks)  # refuses an adapter that is there already
    parts = [block_parts(block) for block in blocks]
    _check_fits(support, spec, parts)
    for i, block in enumerate(blocks):
        for part in parts[i]:
            _fold(block, part, getattr(support, part.name)[i])
    placed = _Placed(spec, support, tuple(parts))
    outputs = placed.outputs
    config = LoraConfig(
        **lora_fields(spec.lora),
        target_modules=outputs,
        fan_in_fan_out=is_transposed({path: blocks.get_submodule(path) for path in outputs}, outputs),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws a first A from the global generator, which is not ours to move
        inject_adapter_in_model(config, blocks, _ADAPTER_NAME)
    draw_a([parameter for name, parameter in blocks.named_parameters() if ".lora_A." in name], seed)
    for path in outputs:
        _fold_a(blocks.get_submodule(path))
    setattr(blocks, _PLACED, placed)


@torch.no_grad()
def _fold_a(layer: Any) -> None:
    """A reads the folded heads; for the backbone's own it is what the seed drew, whatever the support."""
    columns = layer.base_layer._buffers.get(COLUMN_ORDER)
    if columns is not None:
        a = layer.lora_A[_ADAPTER_NAME].weight
        a.copy_(a[:, columns])


def _fold(block: nn.Module, part: Part, chosen: tuple[int, ...]) -> None:
    if not chosen:
        return
    rest = sorted(set(range(part.n_units)) - set(chosen))
    order = torch.tensor([*chosen, *rest])
    for path, widths in part.rows.items():
        linear = cast("PlainLinear", block.get_submodule(path))
        _replace(block, path, fold_rows(linear, part, widths, order, len(chosen)))
    fold_columns(cast("PlainLinear", block.get_submodule(part.column)), part, order)


def _check_fits(support: SpfSupport, spec: SpfSpec, parts: Sequence[BlockParts]) -> None:
    if len(support.heads) != len(parts):
        raise StateMismatchError(f"the SPF support is of {len(support.heads)} blocks, not {len(parts)}", key="support")
    for i, block in enumerate(parts):
        for part in block:
            chosen, due = getattr(support, part.name)[i], spec.n_chosen(part.name, part.n_units)
            if len(chosen) != due or any(unit >= part.n_units for unit in chosen):
                raise StateMismatchError(
                    f"the SPF support has {len(chosen)} {part.name} of block {i}, expected {due} of {part.n_units}",
                    key=f"{part.name}.{i}",
                )


def _let_train(blocks: nn.ModuleList) -> None:
    for name, parameter in blocks.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for module in blocks.modules():
        if isinstance(module, SpfLinear):
            for row in module.rows:
                row.requires_grad_(True)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


# --- putting it back --------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_spf(model: Model) -> Model:
    """Make a plain model of a tuned one, in place: no trace of SPF or its LoRA is left, and nothing trains.

    Every linear is an `nn.Linear` or `Conv1D` again, in the backbone's own order. Rows that did not train are the very
    bits that were there before; LoRA is added into the output projection.

    Args:
        model: a far side after `add_spf`, or a model after `attach_spf`. *Secret* once it is tuned.

    Returns:
        the model itself.

    Raises:
        AdapterError: it has no SPF.
    """
    blocks = find_blocks(model)
    placed = _placed(blocks)
    if placed is None:
        raise AdapterError("the model has no SPF to merge", hint="attach_spf or add_spf places it")
    for path in placed.outputs:
        layer: Any = blocks.get_submodule(path)
        layer.base_layer.weight.add_(layer.get_delta_weight(_ADAPTER_NAME))
        _replace(blocks, path, layer.base_layer)
    for path, module in list(blocks.named_modules()):
        if is_folded(module):
            _replace(blocks, path, plain(module))
    delattr(blocks, _PLACED)
    del cast("Any", blocks).peft_config  # PEFT's note on the blocks
    return cast("Model", model.requires_grad_(False))


# --- what was placed --------------------------------------------------------------------------------------------------


def placed_support(model: nn.Module) -> SpfSupport | None:
    """The support of a far side or model; None if it has no SPF. *Secret* with the criteria gradient and fisher."""
    placed = _placed(find_blocks(model))
    return placed.support if placed else None


def spf_facts(model: nn.Module) -> dict[str, Any] | None:
    """What of a model's SPF is *public* whatever the criterion; None if it has none.

    Returns:
        `criterion` and the shares `heads` and `neurons`; under `chosen` and `of`, how many `head_groups`, `neurons`,
        and rows of weights (`attention_rows`, `feed_forward_rows`) train, and how many there are.
    """
    placed = _placed(find_blocks(model))
    if placed is None:
        return None
    chosen, of = dict.fromkeys(_COUNTS, 0), dict.fromkeys(_COUNTS, 0)
    for i, block in enumerate(placed.parts):
        for part, (units, rows) in zip(block, (_COUNTS[:2], _COUNTS[2:]), strict=True):
            n_rows = sum(sum(widths) for widths in part.rows.values())
            for counts, n in ((chosen, len(getattr(placed.support, part.name)[i])), (of, part.n_units)):
                counts[units] += n
                counts[rows] += n * n_rows
    spec = placed.spec
    return {"criterion": spec.criterion, "heads": spec.heads, "neurons": spec.neurons, "chosen": chosen, "of": of}


def _placed(blocks: nn.ModuleList) -> _Placed | None:
    return getattr(blocks, _PLACED, None)
