"""Work and time: the formulas of docs/plan.md sections 2 to 4. Pure; seconds, bytes and operations are plain numbers.

A step is one batch of T tokens, forward and backward, with a frozen backbone and LoRA. n_in and n_out are those of the
forward product. "Design" is the project's design of pads and masked offload, whose figures docs/plan.md repeats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace

from cloister.pad import PadMode

from ._estimate_shapes import LinearShape, ModelShape, Workload
from ._machine import AcceleratorSpec, Machine

N_PLANES: Mapping[str, int] = {"faithful": 4, "fast": 3}
"""Planes of an element, which are int8 products of a layer and bytes an element; spec/pad.md section 1.1."""
N_WEIGHT_PLANES: Mapping[str, int] = {"faithful": 4, "fast": 1}
"""Planes of a weight, a byte each; spec/pad.md section 1.1."""
MAX_FEATURES = 2**17 - 1
"""Width of a masked layer at most; spec/pad.md section 1.3."""
ANSWER_BYTES = 4
"""Of one element on its way back; spec/pad.md section 8."""

_NS = 1e-9
_GIGA = 1e9
_TERA = 1e12
_FLOAT_BYTES = 4
_ELEMENTWISE_PASSES = 6  # over what is kept for backward: written and read forwards, then read twice, written and read
_SKINNY_COLUMNS = 32  # a product with fewer takes as long; on one thread 30 to 60 were measured, with LoRA of rank 8
_FORWARD_OF_ATTENTION = 4 / 14  # two products of seven
_ROUNDING = 1e-9
_WIDTH = 1024  # any; of a size at which no term drowns in another's rounding
_ADAMW_PASSES = 7  # weight, gradient and two moments read; weight and moments written


@dataclass(frozen=True)
class Rates:
    """What computes without masks: operations and bytes a second."""

    flop_s: float
    byte_s: float


def enclave_rates(machine: Machine, precision: str) -> Rates:
    """Of the enclave's cores in "fp32" or "bf16"."""
    gflop_s = machine.enclave.fp32_gflop_s if precision == "fp32" else machine.enclave.bf16_gflop_s
    return Rates(gflop_s * _GIGA, machine.enclave.memory_gb_s * _GIGA)


def accelerator_rates(spec: AcceleratorSpec) -> Rates:
    """Of the accelerator in bf16."""
    return Rates(spec.bf16_tflop_s * spec.attained * _TERA, spec.memory_gb_s * _GIGA)


# --- work -------------------------------------------------------------------------------------------------------------


def linear_flops(linears: Iterable[LinearShape]) -> float:
    """Of the frozen linears, a token: 2 n_in n_out forwards, as many backwards, none for the weight's gradient."""
    return sum(2.0 * linear.n_weights * (2 if linear.has_backward else 1) for linear in linears)


def n_blocks(linears: Iterable[LinearShape]) -> int:
    """Blocks that these linears are of."""
    return len({linear.block for linear in linears if not linear.is_head})


def n_adapter(shape: ModelShape, linears: Iterable[LinearShape], work: Workload) -> int:
    """Numbers that train beside the frozen weights. LoRA: rank (n_in + n_out) for each linear that has it. A prefix: a
    key and a value for each of its tokens in each block."""
    linears = tuple(linears)
    return work.rank * lora_sides(shape, linears, work) + work.prefix_tokens * 2 * shape.kv_size * n_blocks(linears)


def n_spf_rows(shape: ModelShape, linears: Iterable[LinearShape], work: Workload) -> int:
    """Numbers of the backbone's own weights that train: SPF's rows.

    Raises:
        AdapterError: a share selects nothing.
    """
    if work.spf is None:
        return 0
    chosen = sum(work.spf.n_chosen(unit.name, unit.n_units) * unit.n_numbers for unit in shape.units)
    return chosen * n_blocks(linears)


def lora_sides(shape: ModelShape, linears: Iterable[LinearShape], work: Workload) -> int:
    """n_in + n_out of every linear that has LoRA; members of a group read n_in each. With SPF it is the attention's
    output projection alone."""
    if work.spf is not None:
        return (shape.query_size + shape.hidden_size) * n_blocks(linears)
    return sum(linear.n_members * linear.n_in + linear.n_out for linear in linears if not linear.is_head)


def adapter_flops(shape: ModelShape, linears: Iterable[LinearShape], work: Workload) -> float:
    """Of LoRA, a token: forwards 2 operations a number, backwards 2 for its gradient and 2 for the input's. Of SPF's
    rows 2 for their gradient; all else of them is in the linears.

    Products of few columns are bound by memory: they count as of 32.
    """
    linears = tuple(linears)
    columns = max(work.rank, _SKINNY_COLUMNS) if work.rank else 0
    return 6.0 * columns * lora_sides(shape, linears, work) + 2.0 * n_spf_rows(shape, linears, work)


def sequence_length(shape: ModelShape, work: Workload) -> int:
    """Tokens of the text that a batch is taken for."""
    return min(work.n_tokens, shape.max_length)


def attention_flops(shape: ModelShape, work: Workload) -> float:
    """Of scores and their use, a token and block: 4 S q forwards and 10 S q backwards, where the scores are made again
    (Dao et al., 2022, arXiv 2205.14135). S is how many tokens the text and the prefix have, those included that a
    causal mask hides, since kernels of CPUs compute them too; q is the width of all heads."""
    return 14.0 * (sequence_length(shape, work) + work.prefix_tokens) * shape.query_size


def kept_elements(shape: ModelShape, linears: Iterable[LinearShape], work: Workload) -> float:
    """Numbers that backward needs of a token, in the blocks of `linears`; docs/plan.md section 3.

    What each linear reads (for LoRA and SPF) and gives (for attention and the activation), LoRA's inner features, and
    in each block what two norms keep, 2 hidden each. Checked against torch in tests.
    """
    inside = [linear for linear in linears if not linear.is_head]
    n_lora = sum(linear.n_members for linear in inside) if work.spf is None else n_blocks(inside)
    features = sum(linear.n_in + linear.n_out for linear in inside) + work.rank * n_lora
    return features + 4.0 * shape.hidden_size * n_blocks(inside)


def rest_seconds(shape: ModelShape, linears: tuple[LinearShape, ...], work: Workload, rates: Rates) -> float:
    """A token's time in everything but the frozen linears: attention, LoRA, norms and activations, loss, optimiser.

    Element-wise steps are taken to be bound by memory: so many passes over what backward needs, and over the logits.
    """
    flops = attention_flops(shape, work) * n_blocks(linears) + adapter_flops(shape, linears, work)
    logits = sum(linear.n_out for linear in linears if linear.is_head)
    passed = _ELEMENTWISE_PASSES * (kept_elements(shape, linears, work) + logits)
    n_trained = n_adapter(shape, linears, work) + n_spf_rows(shape, linears, work)
    stepped = _ADAMW_PASSES * n_trained / work.n_tokens
    return flops / rates.flop_s + _FLOAT_BYTES * (passed + stepped) / rates.byte_s


def plain_seconds(shape: ModelShape, linears: tuple[LinearShape, ...], work: Workload, rates: Rates) -> float:
    """A token's time where everything is computed in the clear, in one place."""
    return linear_flops(linears) / rates.flop_s + rest_seconds(shape, linears, work, rates)


def forward_seconds(shape: ModelShape, linears: tuple[LinearShape, ...], work: Workload, rates: Rates) -> float:
    """A token's time on a near side, which only goes forward: products, its part of attention's, two passes."""
    attention = _FORWARD_OF_ATTENTION * attention_flops(shape, work) * n_blocks(linears)
    flops = sum(2.0 * linear.n_weights for linear in linears) + attention
    kept = kept_elements(shape, linears, replace(work, rank=0, spf=None))
    return flops / rates.flop_s + 2 * _FLOAT_BYTES * kept / rates.byte_s


# --- masked layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """Seconds of masked products, by what they go into.

    Attributes:
        pads: making r and u inside, on the threads that make pads.
        products: integer products inside, with the mode otp.
        masking: quantise, mask, unmask, check.
        sending: planes out.
        answering: elements back.
        accelerator: the products.
        helper: the second accelerator's products and link.
        helper_pads: making r a second time, on its side.
        latency: of messages that carry nothing.
    """

    pads: float = 0.0
    products: float = 0.0
    masking: float = 0.0
    sending: float = 0.0
    answering: float = 0.0
    accelerator: float = 0.0
    helper: float = 0.0
    helper_pads: float = 0.0
    latency: float = 0.0

    def __add__(self, other: Masked) -> Masked:
        return Masked(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def each(self, n_tokens: int) -> Masked:
        """The same of one token."""
        return Masked(*(value / n_tokens for value in astuple(self)))

    @property
    def serial(self) -> float:
        """One step after another, as this release runs them."""
        return sum(astuple(self))

    def limit(self, machine: Machine, rest: float) -> float:
        """If pads and masks were made on every core, and all that could ran at the same time: enclave, link in each
        direction, both accelerators."""
        shrink = machine.enclave.kernel_threads / machine.enclave.cores
        inside = self.products + (self.pads + self.masking) * shrink + rest
        helper = self.helper + self.helper_pads * shrink
        if machine.accelerator.shares_cpu:
            return max(inside + self.accelerator, helper)
        return max(inside, self.sending, self.answering, self.accelerator, helper)


def masked_product(machine: Machine, pad: PadMode, fmt: str, *, n_tokens: int, n_in: int, n_out: int) -> Masked:
    """One product of T tokens, in the direction that n_in and n_out are of. Design sections 1, 2 and 5.

    The enclave works on T n_in elements (pad, mask) and T n_out (unmasking term, unmask and check). P n_in bytes a
    token go out and 4 n_out come back. The accelerator computes P products of 2 T n_in n_out operations. Where r and u
    come from: `lattice` costs the same for an input and an output; `otp` repeats the P products inside; with `otp-2` a
    second accelerator like the first, on another host, gets keys, makes the pads again and sends u. It is asked before
    the first one, and waited for; a pool of pads (`pool_bytes`) lets both work at the same time.
    """
    costs, link, device = machine.kernels[fmt], machine.link, machine.accelerator
    operations = N_PLANES[fmt] * 2.0 * n_tokens * n_in * n_out
    product = operations / (device.int8_top_s * device.attained * _TERA) + device.combine_ns * _NS * n_tokens * n_out
    answered = ANSWER_BYTES * n_tokens * n_out
    thread_s = _NS / machine.enclave.kernel_threads
    made = n_tokens * n_in * thread_s * (costs.lattice_ns if pad is PadMode.LATTICE else costs.otp_ns)
    inside = helper = helper_pads = 0.0
    if pad is PadMode.LATTICE:
        made += n_tokens * n_out * thread_s * costs.lattice_ns
    else:
        encoded = n_tokens * n_in * thread_s * costs.encode_ns
        combined = n_tokens * n_out * thread_s * costs.combine_ns
        if pad is PadMode.OTP:
            made += encoded + combined
            inside = operations / (machine.enclave.int8_gop_s * _GIGA)
        else:
            away = machine.helper_link
            helper = product + answered / (away.gb_s * _GIGA) + away.latency_us * 1e-6
            helper_pads = made + encoded
    return Masked(
        pads=made,
        products=inside,
        masking=n_tokens * thread_s * (costs.mask_ns * n_in + costs.unmask_ns * n_out),
        sending=N_PLANES[fmt] * n_tokens * n_in / (link.gb_s * _GIGA),
        answering=answered / (link.gb_s * _GIGA),
        accelerator=product,
        helper=helper,
        helper_pads=helper_pads,
        latency=link.latency_us * 1e-6,
    )


def masked_step(machine: Machine, pad: PadMode, fmt: str, linears: Iterable[LinearShape], n_tokens: int) -> Masked:
    """A whole step: every linear forwards, and backwards with sides swapped."""
    total = Masked()
    for linear in linears:
        for n_in, n_out in linear.parts:
            total += masked_product(machine, pad, fmt, n_tokens=n_tokens, n_in=n_in, n_out=n_out)
            if linear.has_backward:
                total += masked_product(machine, pad, fmt, n_tokens=n_tokens, n_in=n_out, n_out=n_in)
    return total


def break_even_hidden(machine: Machine, pad: PadMode, fmt: str, precision: str, n_tokens: int) -> float | None:
    """The width d of a square layer from which on masking is faster than the enclave itself; None for no layer.

    Per token the plain product takes a' d^2 and the masked one a d^2 + b d + l, so d solves (a' - a) d^2 = b d + l.
    With nothing but the enclave's own work (a = 0, l = 0) that is d = b / a' = (c_in + c_out) / 2 * G, with c in ns and
    G in GFLOP/s: the design's 2.8 ns times GFLOP/s (section 6) for c_in + c_out = 5.6 ns.
    """
    zero, half, whole = (
        masked_product(machine, pad, fmt, n_tokens=n_tokens, n_in=width, n_out=width).serial
        for width in (0, _WIDTH, 2 * _WIDTH)
    )
    # The masked cost is a quadratic in the width, so three widths give it exactly.
    square = (whole - 2 * half + zero) / (2 * _WIDTH**2)
    linear = (half - zero) / _WIDTH - square * _WIDTH
    plain = 2.0 * n_tokens / enclave_rates(machine, precision).flop_s
    gain = plain - square
    if gain <= plain * _ROUNDING:
        return None
    width = (linear + math.sqrt(linear * linear + 4 * gain * zero)) / (2 * gain)
    return width if width <= MAX_FEATURES else None


# --- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkBytes:
    """What a token costs on the link to an accelerator, in bytes. Public, as every size is."""

    forward_out: int
    forward_back: int
    backward_out: int
    backward_back: int

    @property
    def total(self) -> int:
        return self.forward_out + self.forward_back + self.backward_out + self.backward_back


def link_bytes(fmt: str, linears: Iterable[LinearShape]) -> LinkBytes:
    """P bytes for each masked element on its way out and 4 for each on its way back; backward swaps the sides.

    With the mode otp-2 a second accelerator gets keys, 32 bytes for 2^16 elements, and sends as many elements back.
    """
    linears = tuple(linears)
    there = [part for linear in linears for part in linear.parts]
    back = [part for linear in linears if linear.has_backward for part in linear.parts]
    return LinkBytes(
        forward_out=N_PLANES[fmt] * sum(n_in for n_in, _ in there),
        forward_back=ANSWER_BYTES * sum(n_out for _, n_out in there),
        backward_out=N_PLANES[fmt] * sum(n_out for _, n_out in back),
        backward_back=ANSWER_BYTES * sum(n_in for n_in, _ in back),
    )
