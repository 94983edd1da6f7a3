"""For arbitrary small layers: u is the oracle's, the helper's is the enclave's, and the words of the check hold."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_pad, slow_ring

from cloister.pad import BLOCK_POSITIONS, CheckKeys, Direction, Otp2Pads, OtpPads, PadKeys, PadPool
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight
from cloister.testing import FakePadHelper

_SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
_SIDES = st.integers(1, 9)
_FORMATS = st.sampled_from([FAITHFUL, FAST])
_WAYS = st.sampled_from(list(Direction))


def _dot(a: list[int], b: list[int]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _weight(fmt: RingFormat, n_out: int, n_in: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return quantize_weight(torch.randn(n_out, n_in, generator=generator), fmt, layer="q")


@_SETTINGS
@given(fmt=_FORMATS, direction=_WAYS, n_out=_SIDES, n_in=_SIDES, n_tokens=_SIDES, seed=st.integers(0, 99),
       skip=st.sampled_from([0, 1, BLOCK_POSITIONS - 7]), is_shared=st.booleans())  # fmt: skip
def test_u_is_the_oracles(fmt, direction, n_out, n_in, n_tokens, seed, skip, is_shared):
    weight, keys, pool = _weight(fmt, n_out, n_in, seed), PadKeys(), PadPool(0)
    stream, check = keys.stream("q", direction), CheckKeys.generate(weight, direction)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    if is_shared:
        helper = FakePadHelper()
        helper.load("q", weight)
        source = Otp2Pads(stream, weight, direction, check, pool=pool, helper=helper)
    else:
        source = OtpPads(stream, weight, direction, check, pool=pool, planes=weight.forward_planes())
    if skip:
        stream.ledger.take(skip)
    pad = source.take(n_tokens).use((n_tokens, check.n_in))
    assert pad.start == skip
    assert pad.u.tolist() == slow_pad.unmask_term(w_q, pad.r.tolist(), fmt.name)
    keys.close()


@_SETTINGS
@given(fmt=_FORMATS, direction=_WAYS, n_out=_SIDES, n_in=_SIDES, n_tokens=_SIDES, seed=st.integers(0, 99),
       where=st.integers(0, 10**6), by=st.integers(1, 2**31 - 1))  # fmt: skip
def test_the_check_holds_for_the_product_and_for_nothing_near_it(
    fmt, direction, n_out, n_in, n_tokens, seed, where, by
):
    weight = _weight(fmt, n_out, n_in, seed)
    keys = CheckKeys.generate(weight, direction)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31, (n_tokens, keys.n_in), generator=generator).tolist()
    y = slow_ring.integer_product(x, w_q)
    rho, v = keys.rho.tolist(), keys.v.tolist()

    def is_good(rows: list[list[int]]) -> list[bool]:
        sums = [(_dot(rho, row), _dot(v, given)) for row, given in zip(rows, x, strict=True)]
        return [(found - expected) % 2**64 == 0 for found, expected in sums]

    assert all(is_good(y))
    token, channel = where % n_tokens, where % keys.n_out
    y[token][channel] += by
    assert is_good(y) == [i != token for i in range(n_tokens)]
