"""The ledger as a state machine: whatever happens, no position of a key is given to two tensors.

Checked twice: on the ranges that are handed out, and one level below on what the AES keys were made to expand.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cloister.errors import PadError, PadExhaustedError, PadReuseError
from cloister.pad import MAX_POSITIONS, Direction, Pad, PadKeys, PadPool, PadStream, PadTicket
from cloister.pad import _stream as stream_module

MODULI = (256, 251)
LENGTHS = st.sampled_from([1, 1023, 1024, 1025, 5000, 70_000])
LAYERS = st.sampled_from(["q", "up"])
WAYS = st.sampled_from(list(Direction))


class Interrupted(Exception):
    pass


class Maker:
    """A source of which the third pad fails."""

    def __init__(self, stream: PadStream, n: int, fails: bool) -> None:
        self.stream, self.n, self.fails, self.n_made = stream, n, fails, 0

    def pad_bytes(self, n_tokens: int) -> int:
        return n_tokens * (2 * self.n + 4 + 8)

    def make(self, n_tokens: int) -> Pad:
        self.n_made += 1
        r = (ticket := self.stream.draw((n_tokens, self.n), MODULI)).use((n_tokens, self.n))
        if self.fails and self.n_made > 2:
            raise Interrupted
        return Pad(ticket.start, r, np.zeros((n_tokens, 1), np.uint32), np.zeros(n_tokens, np.uint64))


class Pads(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.keys = PadKeys()
        self.given: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.streams: list[PadStream] = []  # kept, so that no id is given to another
        self.retired: list[PadStream] = []
        self.open: list[tuple[PadStream, PadTicket[np.ndarray]]] = []
        self.used: list[PadTicket[np.ndarray]] = []
        self.expanded: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        self.fail_expansion = False
        self.patch = pytest.MonkeyPatch()
        real = stream_module.expand_block

        def recorded(key: bytes, first: int, moduli: tuple[int, ...], out: np.ndarray) -> None:
            if self.fail_expansion:
                raise Interrupted
            self.expanded[key].append((first, first + out.shape[1]))
            real(key, first, moduli, out)

        self.patch.setattr(stream_module, "expand_block", recorded)

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.undo()
            self.keys.close()

    def stream(self, layer: str, way: Direction) -> PadStream:
        found = self.keys.stream(layer, way)
        if found not in self.streams:
            self.streams.append(found)
        return found

    def note(self, stream: PadStream, start: int, n: int) -> None:
        self.given[id(stream)].append((start, start + n))

    @rule(layer=LAYERS, way=WAYS, n=LENGTHS)
    def take(self, layer: str, way: Direction, n: int) -> None:
        stream = self.stream(layer, way)
        self.note(stream, stream.take(n), n)

    @rule(layer=LAYERS, way=WAYS, n=LENGTHS)
    def draw(self, layer: str, way: Direction, n: int) -> None:
        stream = self.stream(layer, way)
        ticket = stream.draw((n,), MODULI)
        self.note(stream, ticket.start, n)
        self.open.append((stream, ticket))

    @rule(which=st.integers(0, 100), wrong_shape=st.booleans())
    def use(self, which: int, wrong_shape: bool) -> None:
        if not self.open:
            return
        stream, ticket = self.open.pop(which % len(self.open))
        self.used.append(ticket)
        if stream.ledger.is_retired or wrong_shape:
            with pytest.raises(PadError):
                ticket.use((1, *ticket.shape) if wrong_shape else ticket.shape)
        else:
            assert ticket.use(ticket.shape).shape == (2, *ticket.shape)

    @rule(which=st.integers(0, 100))
    def use_again(self, which: int) -> None:
        if self.used:
            ticket = self.used[which % len(self.used)]
            with pytest.raises(PadReuseError):
                ticket.use(ticket.shape)

    @rule(layer=LAYERS, way=WAYS, n=LENGTHS)
    def fail_in_mid_call(self, layer: str, way: Direction, n: int) -> None:
        stream = self.stream(layer, way)
        ticket = stream.draw((n,), MODULI)
        self.note(stream, ticket.start, n)
        self.fail_expansion = True
        with pytest.raises(Interrupted):
            ticket.use((n,))
        self.fail_expansion = False
        self.used.append(ticket)

    @rule(layer=LAYERS, way=WAYS)
    def ask_for_too_much(self, layer: str, way: Direction) -> None:
        stream = self.stream(layer, way)
        before = stream.ledger.n_taken
        for n, error in ((MAX_POSITIONS, PadExhaustedError), (0, PadError)):
            if before or n == 0:
                with pytest.raises(error):
                    stream.ledger.take(n)
        assert stream.ledger.n_taken == before

    @rule(layer=LAYERS, way=WAYS, lengths=st.lists(LENGTHS, min_size=2, max_size=4))
    def threads(self, layer: str, way: Direction, lengths: list[int]) -> None:
        stream = self.stream(layer, way)
        barrier = threading.Barrier(len(lengths))

        def work(n: int) -> None:
            barrier.wait(60)
            for _ in range(3):
                ticket = stream.draw((n,), MODULI)
                self.note(stream, ticket.start, n)
                ticket.use((n,))

        workers = [threading.Thread(target=work, args=(n,)) for n in lengths]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    @rule(layer=LAYERS, way=WAYS, n=st.sampled_from([1, 1023, 1025]), fails=st.booleans())
    def pool(self, layer: str, way: Direction, n: int, fails: bool) -> None:
        stream = self.stream(layer, way)
        before = stream.ledger.n_taken
        maker = Maker(stream, n, fails)
        with PadPool(5 * maker.pad_bytes(1), wait_s=60) as pool:
            for _ in range(3):
                try:
                    ticket = pool.take(maker, 1)
                except Interrupted:
                    continue
                assert ticket.use((1, n)).start == ticket.start
        # Made and taken or made and thrown away: the pool's positions are gone.
        for start in range(before, stream.ledger.n_taken, n):
            self.note(stream, start, n)

    @rule()
    def rotate(self) -> None:
        self.retired = list(self.streams)
        self.keys.new_job()

    @rule(layer=LAYERS, way=WAYS)
    def retire(self, layer: str, way: Direction) -> None:
        stream = self.stream(layer, way)
        # One layer's key given up before the job ends: only a new job has another for it.
        stream.retire()
        self.retired.append(stream)
        self.keys.new_job()
        self.retired = list(self.streams)

    @rule(which=st.integers(0, 100))
    def take_from_a_retired_key(self, which: int) -> None:
        if self.retired:
            stream = self.retired[which % len(self.retired)]
            with pytest.raises(PadExhaustedError):
                stream.draw((3,), MODULI)

    @invariant()
    def no_position_twice(self) -> None:
        if not hasattr(self, "given"):
            return
        for stream in self.streams:
            end = 0
            for start, stop in sorted(self.given[id(stream)]):
                assert start == end
                end = stop
            assert end == stream.ledger.n_taken

    @invariant()
    def no_part_of_a_key_twice(self) -> None:
        for ranges in getattr(self, "expanded", {}).values():
            end = 0
            for start, stop in sorted(ranges):
                assert start >= end
                end = stop


Pads.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=40, stateful_step_count=25)
TestPads = Pads.TestCase
