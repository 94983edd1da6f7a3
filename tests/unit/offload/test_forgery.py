"""Wrong answers are never accepted, and the first one is the end of the session: spec/pad.md section 5."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracle import slow_offload as slow

from cloister.errors import IntegrityError, OffloadError, PadError, RingOverflowError
from cloister.kernels import _native
from cloister.offload import OffloadSession
from cloister.pad import CheckKeys, Direction
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat, quantize_weight
from cloister.testing import FakeAccelerator, FakeLyingAccelerator

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
DIRECTIONS = pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.value)
N_TRIALS = 100_000
N_OUT, N_IN = 8, 6

Answer = np.ndarray


def weight_of(fmt: RingFormat, n_out: int = N_OUT, n_in: int = N_IN) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return quantize_weight(torch.randn(n_out, n_in, generator=generator) * 0.02, fmt, layer="l")


def worst_case(fmt: RingFormat) -> int:
    """The difference below m with the most factors of two: 2^31 or 2^23."""
    return 1 << (fmt.modulus - 1).bit_length() - 1


def whole(generator: torch.Generator, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randint(low, high, shape, generator=generator).numpy()


def run(session: OffloadSession, direction: Direction, n_tokens: int = 3) -> torch.Tensor:
    x = torch.randn(n_tokens, N_IN if direction is Direction.FORWARD else N_OUT)
    return (session.forward if direction is Direction.FORWARD else session.backward)("l", x)


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differences", [(1,), (2,), (3,), (4, 6), (16, 8), (12, 12), (128,)], ids=str)
def test_the_bound_is_exact_where_all_words_can_be_tried(differences: tuple[int, ...]) -> None:
    """A wrong answer passes for exactly 2^j of 2^w words, 2^j dividing all differences: here with w = 8."""
    words = itertools.product(range(256), repeat=len(differences))
    accepted = sum(sum(d * r for d, r in zip(differences, rho, strict=True)) % 256 == 0 for rho in words)
    shared = min(d & -d for d in differences)
    assert accepted / 256 ** len(differences) == shared / 256


@BOTH
@pytest.mark.parametrize("kind", ["one unit", "worst case", "half of the ring", "anything"])
def test_no_forged_answer_is_accepted(fmt: RingFormat, kind: str) -> None:
    """Each trial has words of its own, and goes through the kernel that sessions use."""
    generator = torch.Generator().manual_seed(5)
    weight = weight_of(fmt)
    m, y = fmt.modulus, np.empty((1, N_OUT), np.float32)
    change = {"one unit": 1, "worst case": worst_case(fmt), "half of the ring": m // 2}.get(kind, 0)
    half = m // 2
    integers = whole(generator, -half + 1, half + 1, (N_TRIALS, N_OUT))
    u = whole(generator, 0, m, (N_TRIALS, N_OUT))
    places = whole(generator, 0, N_OUT, (N_TRIALS,))
    signs = whole(generator, 0, 2, (N_TRIALS,)) * 2 - 1
    deltas = np.zeros((N_TRIALS, N_OUT), np.int64)
    deltas[np.arange(N_TRIALS), places] = signs * change
    if kind == "anything":
        deltas = whole(generator, -half, half, (N_TRIALS, N_OUT))
    honest = ((integers + u) % m).astype(np.uint32)
    forged = ((integers + deltas + u) % m).astype(np.uint32)
    words, scales = u.astype(np.uint32), np.ones(1)
    for start in range(0, N_TRIALS, 100):
        rho = CheckKeys.generate(weight, Direction.FORWARD).rho
        expected = (integers[start : start + 100].astype(np.uint64) * rho).sum(axis=1)
        for trial in range(start, start + 100):
            row = slice(trial, trial + 1)
            rest = (words[row], fmt.CODE, scales, None, None, rho, expected[trial - start : trial - start + 1], y)
            assert not _native.unmask(forged[row], *rest)
            assert not y.any()  # nothing of a refused answer comes out
        assert _native.unmask(honest[row], *rest)  # the check is not refusing everything


def test_the_kernel_decides_as_the_oracle() -> None:
    """With words of few bits there are accepted forgeries, and they are those that the oracle accepts."""
    generator = torch.Generator().manual_seed(6)
    accepted = 0
    for _ in range(2000):
        rho = whole(generator, 0, 4, (2,)).astype(np.uint64) << np.uint64(62)
        integers, deltas = whole(generator, -1000, 1000, (2, 1, 2))
        expected = (integers.astype(np.uint64) * rho).sum(axis=1)
        answer = ((integers + deltas) % FAST.modulus).astype(np.uint32)
        zero = np.zeros((1, 2), np.uint32)
        found = _native.unmask(
            answer, zero, FAST.CODE, np.ones(1), None, None, rho, expected, np.empty((1, 2), np.float32)
        )
        assert found == slow.is_accepted(deltas[0].tolist(), rho.tolist())
        accepted += found
    assert 300 < accepted < 900  # about one in four


# --- through a session ------------------------------------------------------------------------------------------------


def _one_unit(answer: Answer) -> None:
    answer[-1, -1] += 1


def _zero(answer: Answer) -> None:
    answer.fill(0)


def _swap_tokens(answer: Answer) -> None:
    answer[[0, 1]] = answer[[1, 0]]


def _swap_outputs(answer: Answer) -> None:
    answer[:, [0, 1]] = answer[:, [1, 0]]


def _negate(answer: Answer) -> None:
    answer[:] = -answer.view(np.int32).view(np.uint32)


def _highest_bit(answer: Answer) -> None:
    answer ^= np.uint32(1 << 23)


LIES = (_one_unit, _zero, _swap_tokens, _swap_outputs, _negate, _highest_bit)


@BOTH
@DIRECTIONS
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.strip("_"))
def test_a_lie_ends_the_session_in_one_way(fmt: RingFormat, direction: Direction, lie: Callable) -> None:
    accelerator = FakeLyingAccelerator(lambda _: None)
    session = OffloadSession(accelerator, fmt)
    session.add("l", weight_of(fmt))
    run(session, direction)
    accelerator.change = lie
    with pytest.raises(IntegrityError) as caught:
        run(session, direction)
    # Which token, which output and by how much is for nobody to learn.
    assert caught.value.cause == f"layer l, {direction.value}: the accelerator's answer is not the product"
    assert_ended(session)
    accelerator.change = lambda _: None
    for each in Direction:  # for honest ones it is too late
        with pytest.raises(OffloadError, match="an answer failed its check"):
            run(session, each)
    with pytest.raises(OffloadError, match="an answer failed its check"):
        session.add("k", weight_of(fmt))
    session.close()
    assert session.describe()["ended"] == "an answer failed its check"


def assert_ended(session: OffloadSession) -> None:
    """No key is left."""
    sides = [side for layer in session._layers.values() for side in layer.sides.values()]
    assert sides
    for side in sides:
        for read in (lambda check: check.rho, lambda check: check.v):
            with pytest.raises(PadError):
                read(side.source.check)
        with pytest.raises(PadError):
            side.source.take(1)
    with pytest.raises(PadError):
        session._sources.keys.stream("l", Direction.FORWARD)


def test_an_old_answer_is_no_answer() -> None:
    answers: list[Answer] = []

    def replay(answer: Answer) -> None:
        answers.append(answer.copy())
        answer[:] = answers[0]

    session = OffloadSession(FakeLyingAccelerator(replay), FAST)
    session.add("l", weight_of(FAST))
    x = torch.randn(3, N_IN)
    session.forward("l", x)
    with pytest.raises(IntegrityError):
        session.forward("l", x)  # the same input under another pad


def test_an_answer_of_another_form_is_no_answer() -> None:
    class Short(FakeAccelerator):
        def answer(self, layer: str, direction: Direction, planes: np.ndarray) -> Answer:
            return super().answer(layer, direction, planes)[:, :-1]

    session = OffloadSession(Short(), FAST)
    session.add("l", weight_of(FAST))
    with pytest.raises(IntegrityError):
        run(session, Direction.FORWARD)
    assert_ended(session)


def test_a_lie_about_the_buckets_zeros_is_not_read() -> None:
    def lie(answer: Answer) -> None:
        answer[3:] += 1

    with OffloadSession(FakeLyingAccelerator(lie), FAST, bucket=4) as session:
        session.add("l", weight_of(FAST))
        assert run(session, Direction.FORWARD).shape == (3, N_OUT)


@DIRECTIONS
def test_words_that_were_zeroed_meanwhile_accept_nothing(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may close the session between two lines; zeros times any answer are the zeros of no input."""
    session = OffloadSession(FakeLyingAccelerator(_one_unit), FAST)
    session.add("l", weight_of(FAST))

    def after_closing(*arguments: Any) -> bool:
        session.close()
        assert real(*arguments)
        return True

    real = _native.unmask
    monkeypatch.setattr(_native, "unmask", after_closing)
    call, width = (session.forward, N_IN) if direction is Direction.FORWARD else (session.backward, N_OUT)
    with pytest.raises(OffloadError, match="it was closed"):
        call("l", torch.zeros(3, width))


# --- head-room --------------------------------------------------------------------------------------------------------


HEAD_ROOM = 1.5  # a random token of 24 or 32 features stays below it, one that is aligned with a weight does not


def aligned(weight: QuantizedWeight, direction: Direction) -> torch.Tensor:
    """Two tokens of which the first has the largest product that its norm allows, and the second a small one."""
    w = weight.w_q.float() if direction is Direction.FORWARD else weight.w_q.float().T / weight.scales
    longest = int((w * (1 if direction is Direction.FORWARD else weight.scales)).norm(dim=1).argmax())
    generator = torch.Generator().manual_seed(3)
    return torch.stack([w[longest], torch.randn(w.shape[1], generator=generator)])


@BOTH
@DIRECTIONS
def test_overflow_with_head_room_is_computed_inside(fmt: RingFormat, direction: Direction) -> None:
    weight = weight_of(fmt, 32, 24)
    bias = torch.randn(32)
    x = aligned(weight, direction)
    accelerator = FakeLyingAccelerator(lambda _: None)
    with OffloadSession(accelerator, fmt, head_room=HEAD_ROOM) as session:
        session.add("l", weight, bias)
        call = session.forward if direction is Direction.FORWARD else session.backward
        expected = with_head_room(weight, bias, direction, x, fmt)
        assert call("l", x).tolist() == expected
        assert session.describe()["overflows"] == 1
        accelerator.change = _one_unit  # nobody can tell, and nobody is told anything false
        assert call("l", x).tolist() == expected
        assert session.describe()["overflows"] == 2
        accelerator.change = lambda _: None
        assert call("l", x[1:]).tolist() == expected[1:]
        assert session.describe()["overflows"] == 2


def with_head_room(
    weight: QuantizedWeight, bias: torch.Tensor, direction: Direction, x: torch.Tensor, fmt: RingFormat
) -> list[list[float]]:
    """By the oracle, over the integers."""
    w_q, scales = weight.w_q.tolist(), weight.scales.tolist()
    if direction is Direction.FORWARD:
        rows = slow.layer(w_q, x.tolist(), fmt.name, HEAD_ROOM)
        return [
            [slow.float32(slow.float32(y * t * s) + b) for y, s, b in zip(row, scales, bias.tolist(), strict=True)]
            for row, t in rows
        ]
    folded = [[slow.float32(a * b) for a, b in zip(row, scales, strict=True)] for row in x.tolist()]
    transposed = [list(column) for column in zip(*w_q, strict=True)]
    return [[slow.float32(y * t) for y in row] for row, t in slow.layer(transposed, folded, fmt.name, HEAD_ROOM)]


@BOTH
@DIRECTIONS
def test_a_lie_without_an_overflow_is_a_lie_under_head_room_too(fmt: RingFormat, direction: Direction) -> None:
    weight = weight_of(fmt, 32, 24)
    session = OffloadSession(FakeLyingAccelerator(_one_unit), fmt, head_room=HEAD_ROOM)
    session.add("l", weight)
    with pytest.raises(IntegrityError):
        (session.forward if direction is Direction.FORWARD else session.backward)("l", aligned(weight, direction)[1:])
    assert_ended(session)


@pytest.mark.parametrize("bits", [2, 12])
def test_head_room_never_leaves_the_kernels_32_bits(bits: int) -> None:
    """Short rows have limits near 2^31; times the head-room their inputs would not fit, and the honest would lie."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        weight = quantize_weight(torch.randn(3, 2, generator=generator), FAITHFUL, layer="l", weight_bits=bits)
        with OffloadSession(FakeAccelerator(), FAITHFUL, head_room=16.0) as session:
            session.add("l", weight)
            x = torch.randn(4, 2, generator=generator)
            expected = x @ (weight.w_q * weight.scales[:, None]).T
            torch.testing.assert_close(session.forward("l", x), expected, rtol=1e-4, atol=1e-5)


# --- nothing else ends it ---------------------------------------------------------------------------------------------


@BOTH
@DIRECTIONS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_input_that_is_not_finite(fmt: RingFormat, direction: Direction, bad: float) -> None:
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, fmt) as session:
        session.add("l", weight_of(fmt))
        x = torch.randn(3, N_IN if direction is Direction.FORWARD else N_OUT)
        x[1, 2] = bad
        call = session.forward if direction is Direction.FORWARD else session.backward
        with pytest.raises(RingOverflowError, match=f"layer l, {direction.value}: the input holds NaN"):
            call("l", x)
        assert accelerator.seen == []  # nothing left
        assert session.describe()["pad_elements"] == x.numel()  # and its pad is gone
        x[1, 2] = 0
        call("l", x)
        assert session.describe()["pad_elements"] == 2 * x.numel()
