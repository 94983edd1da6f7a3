"""What one element of a masked product costs this process, measured on the code that runs; for `cloister plan`.

Nothing secret is in it: inputs are ones, and the pads are thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cloister.kernels import _native
from cloister.pad import CheckKeys, Direction, PadKeys, PadPool

if TYPE_CHECKING:
    from cloister.ring import RingFormat

_TOKENS = 256
_FEATURES = 2048
_LEAST_CALLS = 3
_LATTICE_TOKENS = 1024  # of a block of lattice pads
_LATTICE_WIDTH = 512


@dataclass(frozen=True)
class KernelCosts:
    """Nanoseconds an element, on the calling thread.

    Attributes:
        otp: a one-time pad, all its planes.
        encode: its planes, for a product.
        combine: a ring element of its accumulators.
        lattice: a lattice pad of an input, or its term of an output.
        mask: quantise, mask and the check's part of an input.
        unmask: unmask, scale and the check's part of an output.
    """

    otp: float
    encode: float
    combine: float
    lattice: float
    mask: float
    unmask: float


def measure_kernels(fmt: RingFormat, *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> KernelCosts:
    """Time each kernel at a size of an ordinary layer.

    Args:
        fmt: the ring.
        seconds: to spend on each.
        clock: in seconds; another one than the wall's, such as `time.process_time`, on a machine that is busy.
    """
    shape, planes_shape = (_TOKENS, _FEATURES), (fmt.n_planes, _TOKENS, _FEATURES)
    keys = PadKeys()
    stream = keys.stream("measure", Direction.FORWARD)

    def draw() -> object:
        return stream.draw(shape, fmt.pad_moduli).use(shape)

    x, y = np.ones(shape, np.float32), np.empty(shape, np.float32)
    r, planes = np.zeros(planes_shape, np.uint8), np.empty(planes_shape, np.int8)
    accumulators, answer = np.zeros(planes_shape, np.int32), np.zeros(shape, np.uint32)
    scales, sums = np.ones(_TOKENS), np.zeros(_TOKENS, np.uint64)
    words, channel = np.zeros(_FEATURES, np.uint64), np.ones(_FEATURES, np.float32)
    flat = (fmt.n_planes, x.size)

    def cost(run: Callable[[], object]) -> float:
        return least_seconds(run, seconds=seconds, clock=clock) / x.size * 1e9

    try:
        return KernelCosts(
            otp=cost(draw),
            encode=cost(lambda: _native.encode_pad(r.reshape(flat), fmt.CODE, planes.reshape(flat))),
            combine=cost(lambda: _native.combine(accumulators.reshape(flat), fmt.CODE, answer.reshape(-1))),
            lattice=_lattice(keys, fmt, seconds, clock),
            mask=cost(lambda: _native.mask(x, None, 2.0**16, r, fmt.CODE, words, planes, scales, sums)),
            unmask=cost(lambda: _native.unmask(answer, answer, fmt.CODE, scales, channel, None, words, sums * 0, y)),
        )
    finally:
        keys.close()


def _lattice(keys: PadKeys, fmt: RingFormat, seconds: float, clock: Callable[[], float]) -> float:
    """Of whole blocks, so that no row is kept for later."""
    import torch

    from cloister.ring import quantize_weight

    weight = quantize_weight(torch.ones((_LATTICE_WIDTH, _LATTICE_WIDTH)), fmt, layer="measure")
    check = CheckKeys.generate(weight, Direction.FORWARD)
    with PadPool(0) as pool:
        source = keys.lattice("measure", Direction.FORWARD, weight, check, pool=pool)

        def make() -> None:
            ticket = source.take(_LATTICE_TOKENS)
            ticket.use(ticket.shape)

        return least_seconds(make, seconds=seconds, clock=clock) / (2 * _LATTICE_TOKENS * _LATTICE_WIDTH) * 1e9


def least_seconds(
    run: Callable[[], object], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The least time of `run`, called for so long and at least three times, after one call that does not count.

    Whatever else a machine does only adds to it.

    Args:
        run: what is timed.
        seconds: on the wall's clock.
        clock: what `run` is timed with.
    """
    run()
    least = math.inf
    n_calls, began = 0, time.perf_counter()
    while n_calls < _LEAST_CALLS or time.perf_counter() - began < seconds:
        start = clock()
        run()
        least = min(least, clock() - start)
        n_calls += 1
    return least
