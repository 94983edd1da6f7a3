"""What must fit: the formulas of docs/plan.md section 3. Pure; everything in bytes, by what it is kept for."""

from __future__ import annotations

from collections.abc import Iterable

from cloister.pad import PadMode

from ._estimate_cost import ANSWER_BYTES, N_PLANES, N_WEIGHT_PLANES, kept_elements, n_adapter, n_spf_rows
from ._estimate_shapes import LinearShape, ModelShape, Workload
from ._machine import Machine

Bill = dict[str, int]
"""Bytes by what they are kept for."""

LATTICE_COEFFICIENTS = 2048
"""Of a lattice key, for each feature: 1024 coefficients in a module of rank 2; spec/pad.md section 9.1."""
LATTICE_PRIMES = {"faithful": 2, "fast": 1}
"""Words of 4 bytes that a coefficient takes in the transformed domain, one a prime."""

LATTICE_LANES = 16
"""Features that the kernels take together: keys are kept for a multiple of them."""

LATTICE_TOKENS = 1024
"""Of a block of lattice pads."""

_FLOAT_BYTES = 4
_KEPT_BYTES = 2  # of an integer weight, which the accelerator's client keeps for `revive`; public, and yet inside
_WORD_BYTES = 8  # of a check key, for each input and each output
_ADAMW_BYTES = 16  # of a number that trains: itself, its gradient and two moments in fp32
_ROW_BYTES = 12  # the same of SPF's rows, which are among the weights already
_LOGIT_COPIES = 3  # logits, their log-softmax and their gradient


def total(bill: Bill) -> int:
    """All of it."""
    return sum(bill.values())


def lattice_key_bytes(fmt: str, n_in: int, n_out: int) -> int:
    """S and W S of a layer in one direction: 8 KB for each input and each output with `fast`, 16 KB with `faithful`.

    Design section 2: 17 GB for a 7B model with `fast`; that is one direction, and the other takes as much again.
    """
    n_features = sum(-(-n // LATTICE_LANES) * LATTICE_LANES for n in (n_in, n_out))
    return n_features * LATTICE_COEFFICIENTS * LATTICE_PRIMES[fmt] * _FLOAT_BYTES


def masked_bill(shape: ModelShape, machine: Machine, work: Workload, pad: PadMode, fmt: str) -> Bill:
    """Method 1, a client's enclave."""
    linears = shape.offloaded(pad)
    sides = [side for linear in linears for side in _sides(linear)]
    bill = {
        "runtime": round(machine.enclave.runtime_bytes),
        "what is not offloaded": _FLOAT_BYTES * (_no_linears(shape) + shape.n_stored(shape.kept_inside(pad))),
        "scales and check keys": sum(_WORD_BYTES * (n_in + n_out) for n_in, n_out in sides)
        + _FLOAT_BYTES * sum(linear.n_out for linear in linears),
    }
    bill["integer weights to load again"] = _KEPT_BYTES * sum(linear.n_weights for linear in linears)
    if pad is PadMode.OTP:
        bill["integer weights for W r"] = N_WEIGHT_PLANES[fmt] * sum(linear.n_weights for linear in linears)
    if pad is PadMode.LATTICE:
        each = sum(lattice_key_bytes(fmt, *part) for linear in linears for part in linear.parts)
        bill |= {"pad keys, forward": each, "pad keys, backward": each}
        if work.n_tokens % LATTICE_TOKENS:  # the rows of a block that are left, for each layer and direction
            each = sum(N_PLANES[fmt] * n_in + ANSWER_BYTES * n_out + _WORD_BYTES for n_in, n_out in sides)
            bill["pads begun"] = LATTICE_TOKENS * each
    bill["pad in use"] = work.n_tokens * max(N_PLANES[fmt] * n_in + ANSWER_BYTES * n_out + 8 for n_in, n_out in sides)
    return bill | _training(shape, shape.linears, work)


def inside_bill(shape: ModelShape, machine: Machine, work: Workload, precision: str) -> Bill:
    """Everything inside one enclave."""
    each = _FLOAT_BYTES if precision == "fp32" else 2
    weights = {"runtime": round(machine.enclave.runtime_bytes), "weights": each * shape.n_parameters}
    return weights | _training(shape, shape.linears, work)


def far_bill(shape: ModelShape, machine: Machine, work: Workload) -> Bill:
    """Method 2, the server's enclave: the far side in fp32, what it trains, and decrypted features."""
    far = shape.from_block(work.cut_layer)
    n_weights = sum(linear.n_weights for linear in far)  # a tied head is a copy here: the embedding is near
    n_others = round(shape.n_other * (shape.n_layers - work.cut_layer)) + shape.n_after
    return {
        "runtime": round(machine.enclave.runtime_bytes),
        "weights": _FLOAT_BYTES * (n_weights + n_others),
        "features": work.feature_bytes,
        **_training(shape, far, work),
    }


def near_bytes(shape: ModelShape, work: Workload) -> int:
    """Method 2, a client's machine: weights of the near side in fp32. Public, outside of any enclave."""
    near = sum(linear.n_weights for linear in shape.below_block(work.cut_layer))
    return _FLOAT_BYTES * (shape.n_embedding + near + round(shape.n_other * work.cut_layer))


def accelerator_bytes(fmt: str, linears: Iterable[LinearShape]) -> int:
    """Integer weights on the accelerator, one copy for both directions."""
    return N_WEIGHT_PLANES[fmt] * sum(linear.n_weights for linear in linears)


def _sides(linear: LinearShape) -> list[tuple[int, int]]:
    """Inputs and outputs of its layers in both directions. A layer has keys for both, used or not."""
    return [side for n_in, n_out in linear.parts for side in ((n_in, n_out), (n_out, n_in))]


def _no_linears(shape: ModelShape) -> int:
    return shape.n_embedding + round(shape.n_other * shape.n_layers) + shape.n_after


def _training(shape: ModelShape, linears: tuple[LinearShape, ...], work: Workload) -> Bill:
    """Activations of a batch that backward needs, and what trains with its gradients and AdamW's moments, all fp32."""
    logits = sum(linear.n_out for linear in linears if linear.is_head)
    kept = kept_elements(shape, linears, work) + _LOGIT_COPIES * logits
    adapter = _ADAMW_BYTES * n_adapter(shape, linears, work) + _ROW_BYTES * n_spf_rows(shape, linears, work)
    return {"activations": round(_FLOAT_BYTES * work.n_tokens * kept), "adapter and optimiser": adapter}
