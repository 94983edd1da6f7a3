"""The estimate of `cloister plan`: both methods beside computing everything in the TEE, in the clear, or on a TEE GPU.

Pure: numbers in, numbers out. `_estimate_words` says what follows from them; docs/plan.md explains every term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cloister.pad import PadMode

from . import _estimate_memory as memory
from ._estimate_cost import (
    N_PLANES,
    LinkBytes,
    accelerator_rates,
    break_even_hidden,
    enclave_rates,
    forward_seconds,
    linear_flops,
    link_bytes,
    masked_step,
    n_adapter,
    n_spf_rows,
    plain_seconds,
    rest_seconds,
)
from ._estimate_shapes import ModelShape, Workload
from ._machine import Machine

PRECISIONS = ("fp32", "bf16")
_INT8_SCALE_BYTES = 4  # of a boundary tensor's token; cloister.train's `bytes_per_token`


@dataclass(frozen=True)
class Baseline:
    """One place where everything is computed.

    Attributes:
        name: "all in the TEE, fp32", ...
        tokens_per_s: trained, forward and backward.
        memory: of the enclave; empty outside of one.
        fits: whether that is within the machine's.
    """

    name: str
    tokens_per_s: float
    memory: memory.Bill
    fits: bool


@dataclass(frozen=True)
class MaskedEstimate:
    """Method 1 with one pad mode and ring format.

    Attributes:
        pad, format: which.
        memory: of a client's enclave.
        fits: whether that is within the machine's.
        accelerator_bytes: integer weights on the accelerator.
        fits_accelerator: whether these are within its memory.
        link: bytes a token to and from the accelerator.
        helper_bytes: a token from the second accelerator of the mode otp-2, over a network.
        seconds: a token's, by what they go into; `rest` is what stays inside in any case.
        tokens_per_s: one step after another, as this release runs them.
        limit_tokens_per_s: with pads and masks on every core, and all that can be done at the same time.
        times_tee: the former over everything in the TEE, by precision.
        times_plain: over the plain accelerator.
        break_even_hidden: width from which on a masked layer beats the enclave's own, by precision; None for never.
    """

    pad: PadMode
    format: str
    memory: memory.Bill
    fits: bool
    accelerator_bytes: int
    fits_accelerator: bool
    link: LinkBytes
    helper_bytes: int
    seconds: dict[str, float]
    tokens_per_s: float
    limit_tokens_per_s: float
    times_tee: dict[str, float]
    times_plain: float
    break_even_hidden: dict[str, float | None]

    @property
    def is_usable(self) -> bool:
        """Whether it fits on both sides."""
        return self.fits and self.fits_accelerator


@dataclass(frozen=True)
class SplitEstimate:
    """Method 2 with LoRA (or a prefix), or with SPF + LoRA.

    Attributes:
        cut_layer: near-side blocks.
        n_trained: numbers that train.
        memory: of the server's enclave.
        fits: whether that is within the machine's.
        near_bytes: weights on each client's machine.
        boundary_bytes: a token's, as int8, once a run.
        tokens_per_s: the far side trains, in fp32 as this release does.
        times_tee: that over the whole model in the TEE, by precision.
        times_plain: over the plain accelerator.
        near_tokens_per_s: one client computes, on a processor like the enclave's; None where only embeddings are near.
        upload_tokens_per_s: all clients together send, at the server's end of the network.
    """

    cut_layer: int
    n_trained: int
    memory: memory.Bill
    fits: bool
    near_bytes: int
    boundary_bytes: int
    tokens_per_s: float
    times_tee: dict[str, float]
    times_plain: float
    near_tokens_per_s: float | None
    upload_tokens_per_s: float


@dataclass(frozen=True)
class Estimate:
    """Everything. A prediction, and as good as the machine's constants are.

    Attributes:
        model, machine, work: what it is of.
        n_adapter: numbers that train in the whole model, which is Method 1's adapter.
        update_bytes: Method 1's update of one client, up and down each round, before encryption.
        inside: everything in the TEE, by precision.
        plain: everything on the accelerator, in the clear.
        gpu_tee: everything on it in its confidential mode; None where it has none, or the TEE is no virtual machine.
        masked: Method 1, by pad mode and format.
        split: Method 2, with the same adapter.
        split_spf: Method 2 with SPF + LoRA; None where SPF does not know the model's layout.
    """

    model: ModelShape
    machine: Machine
    work: Workload
    n_adapter: int
    update_bytes: int
    inside: dict[str, Baseline]
    plain: Baseline
    gpu_tee: Baseline | None
    masked: tuple[MaskedEstimate, ...]
    split: SplitEstimate
    split_spf: SplitEstimate | None

    @property
    def best_inside(self) -> Baseline:
        """The faster precision in the TEE."""
        return max(self.inside.values(), key=lambda found: found.tokens_per_s)


def estimate(model: ModelShape, machine: Machine, work: Workload) -> Estimate:
    """Both methods and what they are compared with.

    Raises:
        AdapterError: a share of SPF selects nothing.
    """
    spf_work = replace(work, rank=work.spf.r, prefix_tokens=0) if work.spf and model.units else None
    asked, work = work, replace(work, spf=None)
    inside = {precision: _inside(model, machine, work, precision) for precision in PRECISIONS}
    plain_s = plain_seconds(model, model.linears, work, accelerator_rates(machine.accelerator))
    plain = Baseline("plain accelerator", 1 / plain_s, {}, fits=True)
    n_trained = n_adapter(model, model.linears, work)
    return Estimate(
        model=model,
        machine=machine,
        work=asked,
        n_adapter=n_trained,
        update_bytes=4 * n_trained,
        inside=inside,
        plain=plain,
        gpu_tee=_gpu_tee(machine, plain),
        masked=tuple(
            _masked(model, machine, work, (inside, plain), pad=pad, fmt=fmt) for pad in PadMode for fmt in N_PLANES
        ),
        split=_split(model, machine, work, inside, plain),
        split_spf=_split(model, machine, spf_work, inside, plain) if spf_work else None,
    )


def _inside(model: ModelShape, machine: Machine, work: Workload, precision: str) -> Baseline:
    seconds = plain_seconds(model, model.linears, work, enclave_rates(machine, precision))
    bill = memory.inside_bill(model, machine, work, precision)
    fits = memory.total(bill) <= machine.enclave.memory_bytes
    return Baseline(f"all in the TEE, {precision}", 1 / seconds, bill, fits)


def _gpu_tee(machine: Machine, plain: Baseline) -> Baseline | None:
    """In NVIDIA's confidential mode the whole GPU joins one TEE virtual machine; SGX enclaves cannot be joined."""
    if not machine.accelerator.confidential or machine.enclave.tee not in ("tdx", "snp"):
        return None
    share = machine.accelerator.confidential_share
    return Baseline("GPU confidential computing", plain.tokens_per_s * share, {}, fits=True)


def _masked(
    model: ModelShape,
    machine: Machine,
    work: Workload,
    baselines: tuple[dict[str, Baseline], Baseline],
    *,
    pad: PadMode,
    fmt: str,
) -> MaskedEstimate:
    inside, plain = baselines
    linears, rates = model.offloaded(pad), enclave_rates(machine, "fp32")
    step = masked_step(machine, pad, fmt, linears, work.n_tokens)
    link = link_bytes(fmt, linears)
    each = step.each(work.n_tokens)
    rest = rest_seconds(model, model.linears, work, rates) + linear_flops(model.kept_inside(pad)) / rates.flop_s
    tokens_per_s = 1 / (each.serial + rest)
    bill = memory.masked_bill(model, machine, work, pad, fmt)
    held = memory.accelerator_bytes(fmt, linears)
    return MaskedEstimate(
        pad=pad,
        format=fmt,
        memory=bill,
        fits=memory.total(bill) <= machine.enclave.memory_bytes,
        accelerator_bytes=held,
        fits_accelerator=held <= machine.accelerator.memory_bytes,
        link=link,
        helper_bytes=link.forward_back + link.backward_back if pad is PadMode.OTP2 else 0,
        seconds={
            "pads": each.pads + each.products,
            "masking": each.masking,
            "link": each.sending + each.answering + each.latency,
            "accelerator": each.accelerator,
            "second accelerator": each.helper + each.helper_pads,
            "rest": rest,
        },
        tokens_per_s=tokens_per_s,
        limit_tokens_per_s=1 / each.limit(machine, rest),
        times_tee={name: tokens_per_s / found.tokens_per_s for name, found in inside.items()},
        times_plain=tokens_per_s / plain.tokens_per_s,
        break_even_hidden={name: break_even_hidden(machine, pad, fmt, name, work.n_tokens) for name in PRECISIONS},
    )


def _split(
    model: ModelShape, machine: Machine, work: Workload, inside: dict[str, Baseline], plain: Baseline
) -> SplitEstimate:
    far, near = model.from_block(work.cut_layer), model.below_block(work.cut_layer)
    rates = enclave_rates(machine, "fp32")
    tokens_per_s = 1 / plain_seconds(model, far, work, rates)
    near_s = forward_seconds(model, near, work, rates)
    bill = memory.far_bill(model, machine, work)
    boundary = model.hidden_size + _INT8_SCALE_BYTES
    return SplitEstimate(
        cut_layer=work.cut_layer,
        n_trained=n_adapter(model, far, work) + n_spf_rows(model, far, work),
        memory=bill,
        fits=memory.total(bill) <= machine.enclave.memory_bytes,
        near_bytes=memory.near_bytes(model, work),
        boundary_bytes=boundary,
        tokens_per_s=tokens_per_s,
        times_tee={name: tokens_per_s / found.tokens_per_s for name, found in inside.items()},
        times_plain=tokens_per_s / plain.tokens_per_s,
        near_tokens_per_s=1 / near_s if near_s else None,
        upload_tokens_per_s=machine.network_mbit_s * 1e6 / 8 / boundary,
    )
