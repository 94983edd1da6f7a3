"""What may leave the enclave when a job says so: the adapter, or the tuned weights of the far side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from cloister.adapters import load_trainable_state, merged_tensors, trainable_state
from cloister.errors import ConfigError, Problem, StateMismatchError
from cloister.train._checkpoint import SUPPORT, require_support, support_tensors

if TYPE_CHECKING:
    from torch import nn


def export_release(far: nn.Module, what: str) -> bytes:
    """The tuned far side as safetensors. *secret* until the job's parties receive it, each over its own session.

    Args:
        far: the tuned far side.
        what: "none" gives nothing, "adapter" what `export_far_state` does, "weights" every weight of the far side with
            LoRA merged into it and SPF's rows put back, under the backbone's own names below `blocks`, `norm` and
            `head`, in float32 (where the far side computes in bf16: the rounded weights that it computes with).

    Raises:
        ConfigError: `what` is none of these.
    """
    if what == "none":
        return b""
    if what == "adapter":
        return export_far_state(far)
    if what == "weights":
        return save_safetensors({name: tensor.float() for name, tensor in merged_tensors(far).items()})
    raise ConfigError([Problem("release.what", f"{what!r} is not none, adapter or weights")])


def export_far_state(far: nn.Module) -> bytes:
    """Adapter and head as safetensors, named as in the far side. *secret*.

    LoRA's matrices and the head. Of SPF also the rows that train, one tensor for each run of them, and under `support/`
    the indices of the head groups and neurons that they belong to, by block (`saved_support` reads them). Rows, and
    columns of LoRA's A, are in the order that SPF with this support gives them (`adapters.add_spf`).
    """
    tensors = {name: tensor.contiguous() for name, tensor in trainable_state(far).items()}
    return save_safetensors(tensors | support_tensors(far))


def import_far_state(far: nn.Module, blob: bytes) -> None:
    """Puts what `export_far_state` gave into a far side with the same adapter placed.

    Raises:
        StateMismatchError: it is no such state, or of another model, adapter, SPF support or set of labels.
    """
    try:
        state = load_safetensors(blob)
    except (SafetensorError, ValueError, TypeError):
        raise StateMismatchError("the saved far side is not a safetensors file") from None
    require_support(far, state)
    load_trainable_state(far, {name: tensor for name, tensor in state.items() if not name.startswith(SUPPORT)})
