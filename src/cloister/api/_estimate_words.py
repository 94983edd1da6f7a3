"""What an estimate means, in words: where offload pays, what does not fit, and what to choose. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from cloister._format import human_bytes
from cloister.pad import PadMode

from . import _estimate_memory as memory
from ._estimate import Estimate, MaskedEstimate

_WORTH_IT = 1.1  # below it, an estimate cannot tell the two apart
_SGX_PAGING = (
    "An SGX enclave that is larger pages its memory in and out encrypted, which was about five times slower on average "
    "where it was measured (Taassori et al., ASPLOS 2018)."
)


def method1_words(found: Estimate) -> str:
    """Method 1's verdict."""
    return " ".join(_method1(found))


def method2_words(found: Estimate) -> str:
    """Method 2's verdict."""
    return " ".join(_method2(found))


def recommendation(found: Estimate) -> str:
    """One line: what to do on this machine with this model."""
    line = _advice(found)
    if found.gpu_tee is not None:
        speed = _speed(found.gpu_tee.tokens_per_s)
        line = f"use GPU confidential computing (about {speed}) unless its maker is not trusted; otherwise {line}"
    note = " This machine has no TEE, so nothing on it is protected." if found.machine.enclave.tee == "none" else ""
    return f"{line[:1].upper()}{line[1:]}.{note}"


def _advice(found: Estimate) -> str:
    parts: list[str] = []
    usable = [row for row in found.masked if row.is_usable and _gain(found, row) >= _WORTH_IT]
    if usable:
        best = max(usable, key=lambda row: row.tokens_per_s)
        parts.append(f"Method 1 with {_name(best)} ({_speed(best.tokens_per_s)} at each client, each with a TEE)")
        if best.pad is PadMode.LATTICE:
            parts[-1] += ", if its computational assumption is accepted"
    if found.split.fits:
        parts.append(f"Method 2 ({_speed(found.split.tokens_per_s)}), which needs a TEE at the server only")
    if parts:
        return "use " + ", or ".join(parts)
    if fitting := [each for each in found.inside.values() if each.fits]:
        best = max(fitting, key=lambda each: each.tokens_per_s)
        return f"keep {best.name} ({_speed(best.tokens_per_s)}); neither method is faster and fits"
    need = human_bytes(min(memory.total(found.split.memory), *_needs(list(found.masked))))
    return f"nothing fits this enclave: take a TEE with at least {need}, a later cut layer, or a smaller model"


# --- Method 1 ---------------------------------------------------------------------------------------------------------


def _method1(found: Estimate) -> Iterator[str]:
    paying = [row for row in found.masked if _gain(found, row) >= _WORTH_IT]
    losing = [row for row in found.masked if row not in paying]
    base = found.best_inside
    if paying:
        best = max(paying, key=lambda row: row.tokens_per_s)
        yield (
            f"Offload pays with {_names(paying)}: at best {_times(_gain(found, best))} {base.name} and "
            f"{_times(best.times_plain)} the plain accelerator ({_name(best)})."
        )
        if found.work.n_clients > 1:
            yield f"{found.work.n_clients} clients train at the same time, each on a machine like this."
    else:
        yield f"Offload does not pay here: no mode is clearly faster than {base.name}."
    if losing and paying:
        yield f"It does not pay with {_names(losing)}."
    yield from _why(found, losing)
    yield from _widths(found)
    yield from _misfits(found)
    if found.gpu_tee is not None:
        times = found.gpu_tee.tokens_per_s / max(row.tokens_per_s for row in found.masked)
        yield (
            f"This accelerator has a confidential mode of its own, about {_times(times)} the fastest of these. Masking "
            "is for accelerators whose maker, operator or neighbours are not trusted."
        )
    yield (
        "The mode lattice is opt-in: its assumption is computational and no outsider has reviewed its parameters. No "
        "raw output of a masked layer may leave the enclave under it."
    )


def _why(found: Estimate, losing: list[MaskedEstimate]) -> Iterator[str]:
    if any(row.pad is PadMode.OTP for row in losing):
        yield (
            "otp multiplies each pad inside the enclave, as many integer products as the accelerator makes: ahead of "
            "time that hides a delay, in steady state it saves nothing."
        )
    if losing and found.machine.accelerator.shares_cpu:
        yield "The accelerator is a process on the enclave's own cores, so its products are not for free."
    slow = [row for row in losing if _largest(row) == "link"]
    if slow:
        yield f"What holds up {_names(slow)} is the link."
    enclave = found.machine.enclave
    if losing and enclave.kernel_threads < enclave.cores:
        best = max(found.masked, key=lambda row: row.limit_tokens_per_s)
        yield (
            f"This release makes pads and masks on {enclave.kernel_threads:.0f} of {enclave.cores:.0f} threads; on all "
            f"of them, and with everything at the same time, the limit is {_speed(best.limit_tokens_per_s)} "
            f"({_times(best.limit_tokens_per_s / found.best_inside.tokens_per_s)}, {_name(best)})."
        )


def _widths(found: Estimate) -> Iterator[str]:
    precision = max(found.inside, key=lambda name: found.inside[name].tokens_per_s)
    width, parts = found.model.hidden_size, list[str]()
    for row in found.masked:
        even = row.break_even_hidden[precision]
        parts.append(f"{_name(row)} {'never' if even is None else f'{even:,.0f}'}")
    yield f"Break-even hidden size against {precision} in the TEE: {', '.join(parts)}; this model has {width:,}."


def _misfits(found: Estimate) -> Iterator[str]:
    enclave, device = found.machine.enclave, found.machine.accelerator
    outside = [row for row in found.masked if not row.fits]
    if outside:
        least, most = min(_needs(outside)), max(_needs(outside))
        yield (
            f"The enclave's {human_bytes(enclave.memory_bytes)} do not hold {_names(outside)}, which need "
            f"{human_bytes(least)} to {human_bytes(most)}."
        )
        keys = {row.format: _keys(row) for row in outside if row.pad is PadMode.LATTICE}
        if too_large := {fmt: size for fmt, size in keys.items() if size > enclave.memory_bytes}:
            sizes = ", ".join(f"{human_bytes(size)} for {fmt}" for fmt, size in too_large.items())
            yield f"The keys of the lattice pad alone are too large: {sizes}."
        if enclave.runtime_bytes > enclave.memory_bytes:
            yield f"Python and torch alone take {human_bytes(enclave.runtime_bytes)}."
        if enclave.tee == "sgx":
            yield _SGX_PAGING
    full = [row for row in found.masked if not row.fits_accelerator]
    for fmt in dict.fromkeys(row.format for row in full):
        held = next(row.accelerator_bytes for row in full if row.format == fmt)
        yield (
            f"The accelerator's {human_bytes(device.memory_bytes)} do not hold the integer weights of {fmt}, "
            f"{human_bytes(held)}."
        )


# --- Method 2 ---------------------------------------------------------------------------------------------------------


def _method2(found: Estimate) -> Iterator[str]:
    split, enclave = found.split, found.machine.enclave
    yield (
        f"The far side of {found.model.n_layers - split.cut_layer} blocks trains in the server's TEE, in fp32: "
        f"{_times(split.times_tee['fp32'])} all in the TEE in fp32, {_times(split.times_tee['bf16'])} in bf16, and "
        f"{_times(split.times_plain)} the plain accelerator. Each example crosses once, whatever the number of epochs, "
        "and no client needs a TEE."
    )
    if not split.fits:
        need = memory.total(split.memory)
        yield (
            f"It does not fit: the server's enclave needs {human_bytes(need)} and has "
            f"{human_bytes(enclave.memory_bytes)}. Cut later, or use a TDX or SEV-SNP machine with more memory."
        )
        if enclave.tee == "sgx":
            yield _SGX_PAGING
    yield from _spf(found)
    if split.upload_tokens_per_s < split.tokens_per_s:
        yield (
            f"The network brings {_speed(split.upload_tokens_per_s)}, less than one pass of training takes in: "
            "the first epoch waits for it, later ones do not."
        )
    near = split.near_tokens_per_s
    if near is not None and near * found.work.n_clients < split.tokens_per_s:
        yield "All clients together compute their near sides more slowly than the server trains: the first epoch waits."


def _spf(found: Estimate) -> Iterator[str]:
    split, spf = found.split, found.split_spf
    if spf is None:
        if not found.model.units:
            yield "SPF does not know this model's layout of heads and neurons; LoRA works."
        return
    need, limit = memory.total(spf.memory), found.machine.enclave.memory_bytes
    yield (
        f"SPF + LoRA trains {spf.n_trained / split.n_trained:,.0f} times as many numbers, at "
        f"{_times(spf.tokens_per_s / split.tokens_per_s)} the speed, in {human_bytes(need)} for "
        f"{human_bytes(memory.total(split.memory))}."
    )
    if split.fits and not spf.fits:
        yield f"That does not fit the server's enclave, which has {human_bytes(limit)}: train smaller shares."


# --- words ------------------------------------------------------------------------------------------------------------


def _gain(found: Estimate, row: MaskedEstimate) -> float:
    return row.tokens_per_s / found.best_inside.tokens_per_s


def _largest(row: MaskedEstimate) -> str:
    return max(row.seconds, key=lambda name: row.seconds[name])


def _needs(rows: list[MaskedEstimate]) -> list[int]:
    return [memory.total(row.memory) for row in rows]


def _keys(row: MaskedEstimate) -> int:
    return sum(size for name, size in row.memory.items() if name.startswith("pad keys"))


def _name(row: MaskedEstimate) -> str:
    return f"{row.pad.value}/{row.format}"


def _names(rows: list[MaskedEstimate]) -> str:
    """Modes by name; without their format where both are there."""
    modes = {row.pad: [other.format for other in rows if other.pad is row.pad] for row in rows}
    return ", ".join(
        mode.value if len(formats) > 1 else f"{mode.value}/{formats[0]}" for mode, formats in modes.items()
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 10 else f"{tokens_per_s:.2g} tokens/s"
