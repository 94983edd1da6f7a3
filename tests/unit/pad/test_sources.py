"""Sources of pads: u against Python's integers, what is zeroed, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from tests.oracle import slow_pad

from cloister.errors import AcceleratorLostError, PadError, PadExhaustedError
from cloister.pad import (
    ASSUMPTIONS,
    BLOCK_POSITIONS,
    CheckKeys,
    Direction,
    Otp2Pads,
    OtpPads,
    Pad,
    PadKeys,
    PadMode,
    PadPool,
    PadSource,
    PadTicket,
    multiply_pad,
)
from cloister.pad import _otp as otp
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat
from cloister.testing import FakePadHelper

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
WAYS = pytest.mark.parametrize("direction", list(Direction))
MODES = pytest.mark.parametrize("mode", [PadMode.OTP, PadMode.OTP2])
MakeWeight = Callable[[RingFormat, int, int], QuantizedWeight]


@pytest.fixture
def pool():
    with PadPool(0) as pool:
        yield pool


def make(
    mode: PadMode,
    weight: QuantizedWeight,
    direction: Direction,
    keys: PadKeys,
    pool: PadPool,
    helper: FakePadHelper | None = None,
) -> PadSource:
    stream, check = keys.stream(weight.layer, direction), CheckKeys.generate(weight, direction)
    if mode is PadMode.OTP:
        return OtpPads(stream, weight, direction, check, pool=pool, planes=weight.forward_planes())
    helper = helper or FakePadHelper()
    helper.load(weight.layer, weight)
    return Otp2Pads(stream, weight, direction, check, pool=pool, helper=helper)


def use(ticket: PadTicket[Pad]) -> Pad:
    return ticket.use(ticket.shape)


@BOTH
@WAYS
@MODES
def test_u_is_the_product_with_python_integers(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, fmt: RingFormat, direction: Direction, mode: PadMode
):
    weight = make_weight(fmt, 5, 7)
    source = make(mode, weight, direction, keys, pool)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    n_used = 0
    for n_tokens in (1, 3, 1):
        ticket = source.take(n_tokens)
        pad = use(ticket)
        assert (ticket.start, pad.start) == (n_used, n_used)
        assert (ticket.shape, pad.r.shape) == ((n_tokens, len(w_q[0])), (fmt.n_planes, n_tokens, len(w_q[0])))
        assert pad.u.dtype == np.uint32
        assert pad.u.tolist() == slow_pad.unmask_term(w_q, pad.r.tolist(), fmt.name)
        assert not pad.correction.any() and pad.correction.shape == (n_tokens,)
        assert pad.n_bytes == source.pad_bytes(n_tokens)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in (pad.r, pad.u, pad.correction))
        n_used += n_tokens * len(w_q[0])
    assert source.n_used == n_used
    assert repr(source) == f"{type(source).__name__}(n_used={n_used})"
    assert source.mode is mode
    assert source.input_limit == (weight.forward_limit if direction is Direction.FORWARD else weight.backward_limit)


@BOTH
def test_a_pad_of_several_tiles(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, fmt: RingFormat, monkeypatch: pytest.MonkeyPatch
):
    weight = make_weight(fmt, 5, 7)
    r = keys.stream("a", Direction.FORWARD).draw((10, 7), fmt.pad_moduli).use((10, 7))
    before = r.copy()
    whole = multiply_pad(r, weight.forward_planes(), fmt)
    monkeypatch.setattr(otp, "_TILE_ELEMENTS", 5)
    monkeypatch.setattr(otp, "_MIN_TILE_TOKENS", 4)
    assert np.array_equal(jaxtyped(multiply_pad, typechecker=beartype)(r, weight.forward_planes(), fmt), whole)
    assert np.array_equal(r, before)


@BOTH
def test_a_pad_over_several_blocks_is_the_same_for_the_helper(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, fmt: RingFormat
):
    helper, weight = FakePadHelper(), make_weight(fmt, 2, 301)
    source = make(PadMode.OTP2, weight, Direction.FORWARD, keys, pool, helper)
    n_tokens = 2 * BLOCK_POSITIONS // 301
    for _ in range(2):
        pad = use(source.take(n_tokens))
        assert np.array_equal(pad.u, multiply_pad(pad.r, weight.forward_planes(), fmt))
    (_, _, first), (_, _, second) = helper.seen
    assert [part.first for part in first + second] == [0, 0, first[-1].n, 0, 0]
    assert first[-1].key == second[0].key
    assert len({part.key for part in first + second}) == 4
    assert sum(part.n for part in first) == n_tokens * 301
    assert first[0].key.hex() not in repr(first[0]) and str(first[0].key) not in repr(first)


def test_temporaries_are_zeroed(keys: PadKeys, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch):
    """What lies between r and u: planes and accumulators. Also when the product fails."""
    from cloister import ring

    seen: list[np.ndarray] = []
    real = ring.product

    def recorded(x, weight, fmt, *, out):
        real(x, weight, fmt, out=out)
        assert x.any() and out.any()
        seen.extend((x.numpy(), out.numpy()))
        if len(seen) > 2:
            raise ArithmeticError
        return out

    monkeypatch.setattr(ring, "product", recorded)
    weight = make_weight(FAST, 5, 7)
    r = keys.stream("a", Direction.FORWARD).draw((3, 7), FAST.pad_moduli).use((3, 7))
    multiply_pad(r, weight.forward_planes(), FAST)
    with pytest.raises(ArithmeticError):
        multiply_pad(r, weight.forward_planes(), FAST)
    assert len(seen) == 4
    assert not any(array.any() for array in seen)


@MODES
def test_r_is_zeroed_where_u_fails(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, mode: PadMode, monkeypatch: pytest.MonkeyPatch
):
    made: list[np.ndarray] = []

    def keep(real):
        def draw(*arguments):
            ticket = real(*arguments)

            def reveal():
                found = ticket.use(ticket.shape)
                made.append(found if mode is PadMode.OTP else found[0])
                return found

            return PadTicket(ticket.start, ticket.shape, reveal)

        return draw

    def fail(*_: object) -> None:
        assert made[-1].any()
        raise ArithmeticError

    stream_class = type(keys.stream("a", Direction.FORWARD))
    for name in ("draw", "draw_shared"):
        monkeypatch.setattr(stream_class, name, keep(getattr(stream_class, name)))
    monkeypatch.setattr(otp, "multiply_pad", fail)
    source = make(mode, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool, FakePadHelper(fail))
    with pytest.raises(ArithmeticError):
        source.take(3)
    assert len(made) == 1 and not made[0].any()
    assert source.n_used == 21  # gone


@pytest.mark.parametrize(
    "answer",
    [
        np.zeros((3, 4), np.uint32),
        np.zeros(15, np.uint32),
        np.zeros((3, 5), np.int64),
        np.broadcast_to(np.uint32(1), (3, 5)),
    ],
    ids=["width", "flat", "dtype", "read-only"],
)
def test_an_answer_of_another_form_is_refused(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, answer: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    helper = FakePadHelper()
    monkeypatch.setattr(helper, "multiply", lambda *_: answer)
    source = make(PadMode.OTP2, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool, helper)
    with pytest.raises(PadError, match="another form"):
        source.take(3)


def test_a_strided_answer_becomes_contiguous(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    helper = FakePadHelper()
    monkeypatch.setattr(helper, "multiply", lambda *_: np.zeros((5, 3), np.uint32).T)
    source = make(PadMode.OTP2, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool, helper)
    assert use(source.take(3)).u.flags.c_contiguous


def test_a_lost_helper_costs_the_positions_and_no_more(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    helper = FakePadHelper(lost=[0])
    source = make(PadMode.OTP2, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool, helper)
    with pytest.raises(AcceleratorLostError):
        source.take(3)
    assert use(source.take(3)).start == 21


@MODES
def test_pads_made_ahead(keys: PadKeys, make_weight: MakeWeight, mode: PadMode):
    weight = make_weight(FAITHFUL, 5, 7)
    n_bytes = 3 * (4 * 7 + 4 * 5 + 8)
    with PadPool(2 * n_bytes, wait_s=60) as pool:
        for direction in Direction:
            source = make(mode, weight, direction, keys, pool)
            planes = weight.forward_planes() if direction is Direction.FORWARD else weight.backward_planes()
            for _ in range(4):
                pad = use(source.take(3))
                assert np.array_equal(pad.u, multiply_pad(pad.r, planes, FAITHFUL))


@MODES
def test_a_closed_source(keys: PadKeys, make_weight: MakeWeight, mode: PadMode):
    with PadPool(10_000, wait_s=60) as pool:
        source = make(mode, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool)
        other = make(mode, make_weight(FAST, 5, 7), Direction.BACKWARD, keys, pool)
        use(source.take(3))
        rho = source.check.rho
        source.close()
        source.close()
        assert not rho.any()
        assert pool._shelves == {}
        with pytest.raises(PadExhaustedError, match="retired"):
            source.take(3)
        with pytest.raises(PadError, match="gone"):
            _ = source.check.v
        assert use(other.take(3)).r.any()


@MODES
@pytest.mark.parametrize("end", ["new job", "close"])
def test_a_retired_key_gives_no_pad_that_lies_ready(keys: PadKeys, make_weight: MakeWeight, mode: PadMode, end: str):
    with PadPool(10_000, wait_s=60) as pool:
        source = make(mode, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool)
        use(source.take(3))
        (keys.new_job if end == "new job" else keys.close)()
        with pytest.raises(PadExhaustedError, match="retired"):
            source.take(3)


@MODES
def test_an_exhausted_key(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, mode: PadMode):
    source = make(mode, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool)
    keys.stream("layers.0.q", Direction.FORWARD).ledger.take((1 << 40) - 21)
    use(source.take(3))
    with pytest.raises(PadExhaustedError, match="no positions"):
        source.take(1)


@MODES
@pytest.mark.parametrize("n_tokens", [0, -1])
def test_a_pad_of_nothing(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, mode: PadMode, n_tokens: int):
    source = make(mode, make_weight(FAST, 5, 7), Direction.FORWARD, keys, pool)
    with pytest.raises(PadError, match="at least one token"):
        source.take(n_tokens)
    assert source.n_used == 0


def test_check_keys_of_another_direction_or_layer(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    weight = make_weight(FAST, 5, 7)
    for check in (
        CheckKeys.generate(weight, Direction.BACKWARD),
        CheckKeys.generate(make_weight(FAST, 5, 6), Direction.FORWARD),
    ):
        with pytest.raises(PadError, match="keys of the check"):
            OtpPads(
                keys.stream("a", Direction.FORWARD),
                weight,
                Direction.FORWARD,
                check,
                pool=pool,
                planes=weight.forward_planes(),
            )


def test_both_directions_share_one_copy_of_the_planes(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    weight = make_weight(FAITHFUL, 5, 7)
    planes = weight.forward_planes()
    for direction in Direction:
        source = OtpPads(
            keys.stream("a", direction),
            weight,
            direction,
            CheckKeys.generate(weight, direction),
            pool=pool,
            planes=planes,
        )
        assert source._planes.data_ptr() == planes.data_ptr()


def test_accumulators_are_kept_and_grow():
    small = otp._scratch(1, 2, 3)
    again = otp._scratch(3, 2, 1)
    assert small.ctypes.data == again.ctypes.data
    large = otp._scratch(1, 2, 4_000_000)
    assert large.shape == (1, 2, 4_000_000)
    assert otp._scratch(1, 1, 1).ctypes.data == large.ctypes.data
    otp._kept.words = None


def test_every_mode_has_one_sentence():
    assert set(ASSUMPTIONS) == set(PadMode)
    assert all(text.endswith(".") and text.count(". ") == 0 and "\n" not in text for text in ASSUMPTIONS.values())


def test_the_product_does_not_depend_on_torchs_grad_mode(keys: PadKeys, make_weight: MakeWeight):
    r = keys.stream("a", Direction.FORWARD).draw((3, 7), FAST.pad_moduli).use((3, 7))
    planes = make_weight(FAST, 5, 7).forward_planes()
    with torch.inference_mode():
        inside = multiply_pad(r, planes, FAST)
    assert np.array_equal(inside, multiply_pad(r, planes, FAST))
