"""Rule 3: a row of a block is used once, whatever the lengths, threads, failures and retries."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.adversary.lattice.conftest import OpenSource

from cloister.errors import PadError, PadReuseError
from cloister.offload import OffloadSession
from cloister.pad import LatticePads, Pad, PadMode, PadPool
from cloister.pad import _lattice_pads as pads
from cloister.ring import FAST, quantize_weight
from cloister.testing import FakeAccelerator, FakeStallingAccelerator

N = 1024
_LAYERS = itertools.count()
LENGTHS = (1, 1023, 1024, 1025, 5000)
_SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Numbered:
    """The kernel, but every row that it makes gets a number of its own, in r, u and the correction."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.fails_at: set[int] = set()
        self.n_calls = 0
        self._lock = threading.Lock()

    def lattice_block(self, *arguments: Any) -> bool:
        r, u, correction, first = arguments[7:]
        with self._lock:
            start, call = self.n_rows + 1, self.n_calls
            self.n_rows += N
            self.n_calls += 1
        rows = np.arange(start, start + N)
        r[:, first : first + N] = np.stack([rows >> shift & 0xFF for shift in (0, 8, 16)])[:, :, None]
        u[first : first + N] = rows[:, None]
        correction[first : first + N] = rows
        if call in self.fails_at:
            raise MemoryError
        return True


def numbers(pad: Pad) -> list[int]:
    """The rows that a pad is made of."""
    found = pad.u[:, 0].tolist()
    assert pad.correction.tolist() == found
    assert (pad.u == pad.u[:, :1]).all()
    whole = pad.r.astype(np.int64)
    assert ((whole[0] + (whole[1] << 8) + (whole[2] << 16)) == np.array(found)[:, None]).all()
    return found


def use(source: LatticePads, n_tokens: int) -> Pad:
    ticket = source.take(n_tokens)
    return ticket.use(ticket.shape)


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> Numbered:
    kernel = Numbered()
    monkeypatch.setattr(pads, "_native", kernel)
    return kernel


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_lengths(open_source: OpenSource, numbered: Numbered, n_tokens: int):
    """Every row of every block but those left of the last one; the next pad goes on where this one ended."""
    source, seen = open_source(), []
    for _ in range(4):
        seen += numbers(use(source, n_tokens))
    assert len(seen) == len(set(seen)) == 4 * n_tokens
    assert numbered.n_rows == -(-4 * n_tokens // N) * N
    assert set(seen) <= set(range(1, numbered.n_rows + 1))


@_SETTINGS
@given(data=st.data())
def test_any_lengths_with_failures(open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, data: st.DataObject):
    """Calls that fail at any block or any move take rows with them; none of these ever comes back."""
    kernel, source, seen, moves = Numbered(), open_source(f"layer {next(_LAYERS)}"), [], [0]
    kernel.fails_at = data.draw(st.sets(st.integers(0, 8), max_size=4))
    bad_moves = data.draw(st.sets(st.integers(0, 8), max_size=3))
    real = pads._Rest.move

    def move(*arguments: Any) -> int:
        moves[0] += 1
        moved = real(*arguments)
        if moves[0] - 1 in bad_moves:
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(pads, "_native", kernel)
        patch.setattr(pads._Rest, "move", move)
        for n_tokens in data.draw(st.lists(st.sampled_from(LENGTHS) | st.integers(1, 3000), min_size=1, max_size=8)):
            try:
                seen += numbers(use(source, n_tokens))
            except (MemoryError, KeyboardInterrupt):
                continue
    assert len(seen) == len(set(seen)) and 0 not in seen


@pytest.mark.parametrize("capacity", [0, 1 << 18], ids=["on the spot", "made ahead"])
def test_threads(open_source: OpenSource, numbered: Numbered, capacity: int):
    with PadPool(capacity) as pool:
        source = open_source(using=pool)
        seen: list[list[int]] = [[] for _ in range(4)]
        barrier = threading.Barrier(4)

        def work(mine: list[int], lengths: tuple[int, ...]) -> None:
            barrier.wait(60)
            for _ in range(5):
                for n_tokens in lengths:
                    mine.extend(numbers(use(source, n_tokens)))

        lengths = [(1, 700), (1023,), (1024, 3), (1025, 400)]
        threads = [threading.Thread(target=work, args=pair) for pair in zip(seen, lengths, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        source.close()
    rows = [row for mine in seen for row in mine]
    assert [len(mine) for mine in seen] == [5 * sum(each) for each in lengths]
    assert len(rows) == len(set(rows)) and 0 not in rows


def test_a_failed_pad_is_zeroed(open_source: OpenSource, numbered: Numbered, monkeypatch: pytest.MonkeyPatch):
    source, made = open_source(), []
    real = LatticePads._empty

    def recorded(source: LatticePads, n_tokens: int) -> Pad:
        made.append(real(source, n_tokens))
        return made[-1]

    monkeypatch.setattr(LatticePads, "_empty", recorded)
    numbered.fails_at = {1}
    with pytest.raises(MemoryError):
        source.take(2 * N)
    with pytest.raises(MemoryError):
        numbered.fails_at = {2}
        source.take(5)
    assert len(made) == 3
    assert not any(array.any() for pad in made for array in (pad.r, pad.u, pad.correction))


def test_a_ticket_is_used_once(open_source: OpenSource):
    ticket = open_source().take(3)
    ticket.use((3, 5))
    with pytest.raises(PadReuseError):
        ticket.use((3, 5))
    with pytest.raises(PadError, match="does not fit"):
        open_source("k").take(3).use((4, 5))


def test_the_c_side_checks_shapes(open_source: OpenSource):
    """A block does not go where there are not rows for all of it: nothing is written beyond the end."""
    source = open_source()
    pad = source._empty(N + 3)
    for first in (4, N, 2**62):
        with pytest.raises(ValueError, match="1024 tokens"):
            source._fill(pad, first)
    assert source._fill(pad, 3) == 3 * N  # the others took theirs with them


def layer(accelerator: FakeAccelerator, **options: Any) -> OffloadSession:
    session = OffloadSession(accelerator, FAST, pad=PadMode.LATTICE, **options)
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    session.add("q", quantize_weight(weight, FAST, layer="q"))
    return session


def test_a_retry_takes_fresh_rows():
    """A lost accelerator has seen x under the first pad; it sees it again, but under another one."""
    accelerator = FakeStallingAccelerator()
    with layer(accelerator) as session:
        session.forward("q", torch.zeros(300, 5))
        assert accelerator.n_revived == 1
    (_, _, first), (_, _, second) = accelerator.seen
    assert not {row.tobytes() for row in first.swapaxes(0, 1)} & {row.tobytes() for row in second.swapaxes(0, 1)}


def test_recomputation_takes_fresh_rows():
    """The same activations again, as checkpointed layers send them: never under the same pad."""
    accelerator = FakeAccelerator()
    with layer(accelerator) as session:
        x = torch.randn(300, 5, generator=torch.Generator().manual_seed(2))
        results = [session.forward("q", x) for _ in range(5)]
        gradients = [session.backward("q", torch.ones(300, 4)) for _ in range(3)]
    rows = [planes[:, t].tobytes() for _, _, planes in accelerator.seen for t in range(300)]
    assert len(rows) == len(set(rows)) == 8 * 300
    for each in results[1:]:
        assert float((each - results[0]).abs().max()) < 0.01
    assert all(float((each - gradients[0]).abs().max()) < 0.01 for each in gradients)


def test_rows_of_two_pads_have_nothing_in_common(open_source: OpenSource):
    source = open_source(n_in=64)
    rows = np.concatenate([use(source, n).r.transpose(1, 0, 2).reshape(n, -1) for n in (1, 1023, 1024, 1025, 300)])
    assert len({row.tobytes() for row in rows}) == len(rows) == 3373


def test_positions_only_rise(open_source: OpenSource):
    source, starts = open_source(), []
    for n_tokens in (1, 1022, 1, 1024, 5, 2000):
        ticket = source.take(n_tokens)
        starts.append(ticket.start)
        assert ticket.use(ticket.shape).start == ticket.start
    assert starts == [0, 1, 1023, N, 2 * N, 3 * N]
