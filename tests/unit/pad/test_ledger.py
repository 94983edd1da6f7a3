"""The counter and the ticket by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from cloister.errors import PadError, PadExhaustedError, PadReuseError
from cloister.pad import MAX_POSITIONS, PadLedger, PadTicket
from cloister.pad import _guard as guard


def test_positions_follow_each_other():
    ledger = PadLedger()
    assert [ledger.take(n) for n in (1, 1023, 1024, 1025, 5000)] == [0, 1, 1024, 2048, 3073]
    assert ledger.n_taken == 8073
    assert ledger.take(np.int64(2)) == 8073
    assert type(ledger.n_taken) is int
    assert repr(ledger) == "PadLedger(n_taken=8075)"


@pytest.mark.parametrize("n", [0, -1])
def test_nothing_and_less_cannot_be_taken(n: int):
    ledger = PadLedger()
    with pytest.raises(PadError):
        ledger.take(n)
    assert ledger.n_taken == 0


def test_only_whole_numbers():
    ledger = PadLedger()
    with pytest.raises(TypeError):
        ledger.take(1.5)  # pyright: ignore[reportArgumentType]
    assert ledger.n_taken == 0


def test_exhaustion_is_exact_and_takes_nothing():
    ledger = PadLedger()
    assert ledger.take(MAX_POSITIONS - 10) == 0
    with pytest.raises(PadExhaustedError, match="no positions left"):
        ledger.take(11)
    assert ledger.take(10) == MAX_POSITIONS - 10
    with pytest.raises(PadExhaustedError):
        ledger.take(1)


def test_a_retired_key_gives_nothing():
    ledger = PadLedger()
    ledger.take(3)
    ledger.retire()
    ledger.retire()
    assert ledger.is_retired
    for use in (ledger.check, lambda: ledger.take(1)):
        with pytest.raises(PadExhaustedError, match="retired"):
            use()
    assert ledger.n_taken == 3


@pytest.mark.parametrize("sign", ["pid", "fork count"])
def test_another_process_is_refused(monkeypatch: pytest.MonkeyPatch, sign: str):
    ledger, ticket = PadLedger(), PadTicket(0, (1,), lambda: "r")
    if sign == "pid":
        monkeypatch.setattr("cloister.pad._guard.os.getpid", lambda: -1)
    else:
        monkeypatch.setattr(guard, "_n_forks", guard._n_forks)
        guard._count_fork()
    for use in (lambda: ledger.take(1), ledger.check, ledger.retire, lambda: ticket.use((1,))):
        with pytest.raises(PadReuseError, match="forked"):
            use()
    monkeypatch.undo()
    assert not ledger.is_retired
    assert ledger.n_taken == 0
    assert ticket.use((1,)) == "r"


def test_a_ticket_is_good_once():
    ticket = PadTicket(7, (2, 3), lambda: "the pad")
    assert repr(ticket) == "PadTicket(start=7, shape=(2, 3), is_used=False)"
    assert ticket.use((2, 3)) == "the pad"
    assert ticket.is_used
    with pytest.raises(PadReuseError, match="second time") as caught:
        ticket.use((2, 3))
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), ()])
def test_a_ticket_is_good_for_its_shape_only(shape: tuple[int, ...]):
    ticket = PadTicket(0, (2, 3), lambda: "the pad")
    with pytest.raises(PadError, match="does not fit"):
        ticket.use(shape)
    with pytest.raises(PadReuseError):
        ticket.use((2, 3))


def test_a_ticket_is_used_up_by_a_failure():
    def fail() -> None:
        raise MemoryError

    ticket = PadTicket(0, (1,), fail)
    with pytest.raises(MemoryError):
        ticket.use((1,))
    with pytest.raises(PadReuseError):
        ticket.use((1,))
