"""A forger has one try. Whatever happens around a failed check, the keys are gone and nothing is asked of it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests.adversary.offload._sessions import N_IN, N_OUT, TOKENS, FakeHelper, add_one, draw, session_with

from cloister.errors import CloisterError, IntegrityError, OffloadError, PadError
from cloister.offload import OffloadSession, _session
from cloister.pad import LATTICE_PARAMETERS, Direction, PadMode
from cloister.ring import FORMATS, RingFormat
from cloister.testing import FakeAccelerator, FakeLyingAccelerator

BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def secrets_of(session: OffloadSession) -> list[np.ndarray | bytearray]:
    """The check words and keys themselves, which stay when the session lets go of them."""
    found: list[np.ndarray | bytearray] = []
    for layer in session._layers.values():
        for side in layer.sides.values():
            found += [side.source.check.rho, side.source.check.v]
            found.append(side.source._stream._key)  # pyright: ignore
    return [*found, session._sources.keys._key]


def are_zero(secrets: list[np.ndarray | bytearray]) -> list[bool]:
    return [not any(bytes(secret)) for secret in secrets]


def is_refused(session: OffloadSession, accelerator: FakeAccelerator) -> None:
    n_seen = len(accelerator.seen)
    for call, width in ((session.forward, N_IN), (session.backward, N_OUT)):
        with pytest.raises(OffloadError, match="ended"):
            call("q", draw(TOKENS, width))
    assert len(accelerator.seen) == n_seen


@pytest.mark.parametrize("direction", Direction)
@BOTH
def test_after_one_forged_answer_every_key_is_zero_and_nothing_is_asked_again(fmt: RingFormat, direction: Direction):
    accelerator = FakeLyingAccelerator(add_one)
    session = session_with(accelerator, fmt)
    held = secrets_of(session)
    assert not any(are_zero(held))
    with pytest.raises(IntegrityError) as caught:
        (session.forward if direction is Direction.FORWARD else session.backward)(
            "q", draw(TOKENS, N_IN if direction is Direction.FORWARD else N_OUT)
        )
    assert all(are_zero(held))
    assert caught.value.cause == f"layer q, {direction.value}: the accelerator's answer is not the product"
    is_refused(session, accelerator)


@pytest.mark.parametrize("name", LATTICE_PARAMETERS)
def test_after_one_forged_answer_the_lattice_secrets_are_zero(name: str):
    """Those of the layer, the key of its vectors, the rows of the block that is begun, and the words of the check."""
    parameters = LATTICE_PARAMETERS[name]
    accelerator = FakeLyingAccelerator(lambda answer: None)
    session = session_with(accelerator, FORMATS[parameters.ring], pad=PadMode.LATTICE, lattice=parameters)
    session.forward("q", draw(TOKENS, N_IN))
    source: Any = session._layers["q"].sides[Direction.FORWARD].source
    (rest,) = source._rests
    held = [source._secrets.s, source._secrets.z, source._key, rest.pad.r, rest.pad.u, source.check.rho, source.check.v]
    assert not any(are_zero(held))
    accelerator.change = add_one
    with pytest.raises(IntegrityError):
        session.forward("q", draw(TOKENS, N_IN))
    assert all(are_zero(held))
    is_refused(session, accelerator)


@pytest.mark.parametrize("name", LATTICE_PARAMETERS)
def test_used_rows_of_a_lattice_block_are_gone_from_it(name: str):
    parameters = LATTICE_PARAMETERS[name]
    session = session_with(FakeAccelerator(), FORMATS[parameters.ring], pad=PadMode.LATTICE, lattice=parameters)
    session.forward("q", draw(TOKENS, N_IN))
    source: Any = session._layers["q"].sides[Direction.FORWARD].source
    (rest,) = source._rests
    assert rest.row == TOKENS
    for array in (rest.pad.r[:, :TOKENS], rest.pad.u[:TOKENS], rest.pad.correction[:TOKENS]):
        assert not array.any()


@BOTH
def test_the_result_of_a_forged_answer_is_never_handed_out(fmt: RingFormat, monkeypatch: pytest.MonkeyPatch):
    made: list[np.ndarray] = []
    real = _session._native.unmask

    def kept(*arguments: Any) -> bool:
        made.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(_session._native, "unmask", kept)
    session = session_with(FakeLyingAccelerator(add_one), fmt)
    with pytest.raises(IntegrityError):
        session.forward("q", draw(TOKENS, N_IN))
    (y,) = made
    assert not y.any()


def test_an_interrupt_between_a_failed_check_and_the_abort_is_no_second_try(monkeypatch: pytest.MonkeyPatch):
    """A child process of the same user may send one: the accelerator on this host is such a child."""
    accelerator = FakeLyingAccelerator(add_one)
    session = session_with(accelerator)
    real = _session._native.unmask

    def interrupted(*arguments: Any) -> bool:
        assert not real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_session._native, "unmask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.forward("q", draw(TOKENS, N_IN))
    is_refused(session, accelerator)


def test_an_error_on_the_way_to_the_abort_is_no_second_try(monkeypatch: pytest.MonkeyPatch):
    """With head-room a failed answer is computed again inside first, which takes memory that may not be there."""
    accelerator = FakeLyingAccelerator(add_one)
    session = session_with(accelerator, head_room=2.0)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("cloister.offload._layers.Side.recompute", full)
    with pytest.raises(MemoryError):
        session.forward("q", draw(TOKENS, N_IN))
    is_refused(session, accelerator)


def test_an_accelerator_that_fails_to_close_saves_no_key():
    class Stubborn(FakeLyingAccelerator):
        def close(self) -> None:
            raise OSError("it does not want to")

    session = session_with(Stubborn(add_one))
    held = secrets_of(session)
    with pytest.raises((IntegrityError, OSError)):
        session.forward("q", draw(TOKENS, N_IN))
    assert all(are_zero(held))


@pytest.mark.parametrize("moment", ["before the mask", "before the answer"])
def test_closing_in_the_middle_of_a_call_accepts_nothing(moment: str):
    """A signal handler that closes the session runs between two lines of a call. Check words of zero accept all."""

    class Interrupting(FakeLyingAccelerator):
        on: Callable[[], None] = staticmethod(lambda: None)

        @contextmanager
        def call(self, *arguments: Any):
            with super().call(*arguments) as call:
                if moment == "before the mask":
                    self.on()
                yield call

    accelerator = Interrupting(add_one)
    session = session_with(accelerator)
    if moment == "before the mask":
        accelerator.on = session.close
    else:
        accelerator.change = lambda answer: (add_one(answer), session.close())
    with pytest.raises(CloisterError) as caught:
        session.forward("q", torch.zeros(TOKENS, N_IN))
    assert isinstance(caught.value, PadError | OffloadError)


def test_a_pad_helper_that_lies_is_found_too():
    class Lying(FakeHelper):
        def multiply(self, *arguments: Any) -> np.ndarray:
            u = super().multiply(*arguments)
            add_one(u)
            return u

    accelerator = FakeAccelerator()
    session = session_with(accelerator, pad=PadMode.OTP2, helper=Lying())
    with pytest.raises(IntegrityError):
        session.forward("q", draw(TOKENS, N_IN))
    is_refused(session, accelerator)


@pytest.mark.parametrize("mode", [PadMode.OTP2, PadMode.LATTICE])
def test_head_room_is_for_the_mode_otp_alone(mode: PadMode):
    """spec/pad.md section 2.2."""
    with pytest.raises(OffloadError, match="head-room"):
        session_with(FakeAccelerator(), pad=mode, helper=FakeHelper() if mode is PadMode.OTP2 else None, head_room=2.0)


def test_answers_of_the_worst_case_of_the_ring_are_found():
    """Half the ring in many elements at once: a check in the ring would accept half of these."""
    for seed in range(50):
        places = draw(TOKENS, N_OUT, seed=seed).numpy() > 0

        def change(answer: np.ndarray, places: np.ndarray = places) -> None:
            answer[places] += np.uint32(2**31)

        session = session_with(FakeLyingAccelerator(change))
        with pytest.raises(IntegrityError):
            session.forward("q", draw(TOKENS, N_IN))
