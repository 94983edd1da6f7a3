"""`plan_model`: from a model's folder or name and a machine to the estimate. Reads configurations, and no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister.adapters import SpfSpec
from cloister.errors import ConfigError, Problem

from ._estimate import Estimate, estimate
from ._estimate_shapes import LinearShape, ModelShape, UnitShape, Workload
from ._machine import Machine

if TYPE_CHECKING:
    from cloister.slicing import BackboneInfo

SPF = SpfSpec()
_MIB = 1 << 20
_MOST = {"tokens": 1 << 20, "rank": 1024, "prefix-tokens": 1 << 16, "clients": 1000}


def plan_model(
    model: str | Path,
    machine: Machine,
    *,
    n_tokens: int = 512,
    cut_layer: int | None = None,
    rank: int = 8,
    prefix_tokens: int = 0,
    heads: float = SPF.heads,
    neurons: float = SPF.neurons,
    n_clients: int = 3,
    feature_bytes: int = 2048 * _MIB,
) -> Estimate:
    """What training this model takes on this machine, by every method: `cloister plan`. Starts nothing.

    Args:
        model: a local folder with a config.json, or a name on the hub, of which only the configuration is fetched.
        machine: from `load_machine` or `measure_machine`.
        n_tokens: tokens of a batch.
        cut_layer: Method 2's near-side blocks; half of them where it is None.
        rank: of LoRA on every linear of the blocks.
        prefix_tokens: train a prefix of so many tokens in place of LoRA, where that is above 0.
        heads, neurons: shares that SPF trains, in Method 2 with SPF + LoRA.
        n_clients: institutions.
        feature_bytes: what Method 2's server may keep of decrypted features.

    Raises:
        ConfigError: a number out of range; all of them at once.
        AdapterError: a share of SPF is out of range or selects nothing.
        ModelError: there is no such model, or the cut is outside of its layers.
        UnsupportedFamilyError: slicing has not been proven on its family or variant.
    """
    from cloister.slicing import inspect_backbone, resolve_cut

    given = {"tokens": n_tokens, "rank": rank, "prefix-tokens": prefix_tokens, "clients": n_clients}
    least = {"prefix-tokens": 0}
    problems = [
        Problem(f"--{name}", f"must be a whole number from {least.get(name, 1)} to {most}, not {given[name]}")
        for name, most in _MOST.items()
        if not least.get(name, 1) <= given[name] <= most
    ]
    if problems:
        raise ConfigError(problems)
    info = inspect_backbone(model, needs_tokenizer=False)
    work = Workload(
        n_tokens=n_tokens,
        rank=0 if prefix_tokens else rank,
        prefix_tokens=prefix_tokens,
        cut_layer=resolve_cut(info, cut_layer),
        n_clients=n_clients,
        feature_bytes=feature_bytes,
        spf=SpfSpec(heads=heads, neurons=neurons, r=rank),
    )
    return estimate(read_shape(info), machine, work)


def read_shape(info: BackboneInfo) -> ModelShape:
    """The shape of a backbone, by the definition of its linears that offload has.

    Raises:
        ModelError: transformers refuses the configuration.
    """
    from cloister.slicing import outline_backbone

    found = outline_backbone(info)
    return ModelShape(
        path=info.path,
        family=info.family,
        n_layers=info.n_layers,
        hidden_size=info.hidden_size,
        query_size=found.query_size,
        kv_size=found.kv_size,
        vocab_size=info.vocab_size,
        max_length=info.max_length,
        is_encoder=info.is_encoder,
        has_tied_head=found.has_tied_head,
        linears=tuple(
            LinearShape(
                name=group.names[0] if len(group.names) == 1 else f"{group.names[0]} +{len(group.names) - 1}",
                n_in=group.n_in,
                n_out=group.n_out,
                n_members=len(group.names),
                block=group.block,
                has_backward=not group.reads_embeddings,
            )
            for group in found.groups
        ),
        units=tuple(UnitShape(name, *numbers) for name, numbers in found.units.items()),
        n_embedding=found.n_embedding,
        n_other=found.n_in_blocks / info.n_layers,
        n_after=found.n_outside,
    )
