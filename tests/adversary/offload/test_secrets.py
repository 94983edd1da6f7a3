"""What leaves a session other than results: errors with their frames, repr, reports, logs, copies, forks, buffers."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from tests.adversary.offload._sessions import N_IN, N_OUT, TOKENS, FakeHelper, add_one, draw, session_with

from cloister.errors import AcceleratorLostError, CloisterError, IntegrityError, PadReuseError, RingOverflowError
from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession
from cloister.pad import Direction, PadMode, PadPool
from cloister.ring import FAITHFUL
from cloister.testing import FakeAccelerator, FakeDyingAccelerator, FakeLyingAccelerator


def shown_of(numbers: torch.Tensor) -> list[str]:
    """How numpy and torch begin to write some of these, without the sign."""
    return [f"{abs(float(number)):.3f}"[:5] for number in numbers.flatten()[:40] if abs(float(number)) > 1e-3]


def locals_of_ours(error: BaseException) -> str:
    """Every local of the package's frames of an error and of what it came from, as a debugger writes them."""
    text, pending = io.StringIO(), [error]
    while pending:
        each = pending.pop()
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if "/cloister/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
                text.write("\n".join(f"{name} = {value!r}" for name, value in frame.f_locals.items()))
        pending += [other for other in (each.__cause__, each.__context__) if other is not None]
    return text.getvalue()


def broken(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-1, -1] = torch.inf
    return x


@pytest.mark.parametrize(
    ("accelerator", "change", "expected"),
    [
        (lambda: FakeLyingAccelerator(add_one), lambda x: x, IntegrityError),
        (lambda: FakeDyingAccelerator(0), lambda x: x, AcceleratorLostError),
        (FakeAccelerator, broken, RingOverflowError),
    ],
    ids=["lying", "dying", "not finite"],
)
def test_an_error_carries_no_activation(
    accelerator: Callable[[], FakeAccelerator],
    change: Callable[[torch.Tensor], torch.Tensor],
    expected: type[CloisterError],
):
    """Neither its words nor the locals of its frames, which debuggers and reporters of errors write down."""
    session, x = session_with(accelerator()), change(draw(TOKENS, N_IN))
    with pytest.raises(expected) as caught:
        session.forward("q", x)
    words = f"{caught.value} {caught.value.cause} {caught.value.hint} {vars(caught.value)} {caught.value.args}"
    for shown in shown_of(x):
        assert shown not in words
    text = locals_of_ours(caught.value)
    assert not [shown for shown in shown_of(x) if shown in text]


def test_an_error_carries_no_scale_and_no_check_sum(monkeypatch: pytest.MonkeyPatch):
    """A token's scale tells its size; its sum V . x is a linear function of it."""
    kept: list[np.ndarray] = []
    from cloister.offload import _session

    real = _session._native.mask

    def mask(*arguments):
        done = real(*arguments)
        kept.extend((arguments[-2].copy(), arguments[-1].copy()))
        return done

    monkeypatch.setattr(_session._native, "mask", mask)
    with pytest.raises(IntegrityError) as caught:
        session_with(FakeLyingAccelerator(add_one)).forward("q", draw(TOKENS, N_IN))
    text = locals_of_ours(caught.value)
    scales, sums = kept
    assert str(sums[0]) not in text
    assert f"{scales[0]:.4e}"[:6] not in text


def test_reports_and_reprs_show_no_number_of_a_tensor(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    x = draw(TOKENS, N_IN)
    session = session_with(FakeAccelerator(), pad=PadMode.OTP2, helper=FakeHelper(), bucket=8)
    group = OffloadedGroup(session, [FrozenLinear(name, draw(8, N_IN, seed=i)) for i, name in enumerate("kv")])
    y = group.members[0](x)
    waiting = group._waiting
    assert waiting is not None
    side = session._layers["q"].sides[Direction.FORWARD]
    things = [session, group, *group.members, side, side.source, side.source.check, session._sources, session._layers]
    text = f"{things} {[vars(member) for member in group.members]} {vars(group)} {session.describe()} {caplog.text}"
    secrets = [*shown_of(x), *shown_of(y), *shown_of(waiting.outputs[1]), *map(str, side.source.check.rho[:4])]
    assert not [secret for secret in secrets if secret in text]
    json.dumps(session.describe())


def test_a_group_with_waiting_outputs_cannot_be_saved():
    session = session_with(FakeAccelerator())
    group = OffloadedGroup(session, [FrozenLinear(name, draw(8, N_IN, seed=i)) for i, name in enumerate("kv")])
    model = torch.nn.ModuleList(group.members)
    model[0](draw(TOKENS, N_IN))
    assert model.state_dict() == {}
    for attempt in (
        lambda: pickle.dumps(model),
        lambda: copy.deepcopy(model),
        lambda: torch.save(model, io.BytesIO()),
        lambda: pickle.dumps(session),
        lambda: copy.copy(session),
    ):
        with pytest.raises(PadReuseError, match="cannot be copied"):
            attempt()


FORK = """
import json, os
import torch
from cloister.offload import OffloadSession
from cloister.pad import PadPool
from cloister.ring import FAITHFUL, quantize_weight
from cloister.testing import FakeAccelerator

accelerator = FakeAccelerator()
session = OffloadSession(accelerator, FAITHFUL, pool=PadPool(1 << 16))
session.add("q", quantize_weight(torch.randn(16, 48), FAITHFUL, layer="q"))
session.forward("q", torch.randn(3, 48))
session._lock.acquire()  # as another thread may hold it when it happens: the child must refuse, not wait
read, write = os.pipe()
attempts = {
    "forward": lambda: session.forward("q", torch.ones(3, 48)),
    "backward": lambda: session.backward("q", torch.ones(3, 16)),
    "add": lambda: session.add("k", quantize_weight(torch.ones(16, 48), FAITHFUL, layer="k")),
    "describe": session.describe,
    "close": session.close,
}
if (pid := os.fork()) == 0:
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "went through"
        except Exception as error:
            found[name] = type(error).__name__
    os.write(write, json.dumps([found, len(accelerator.seen)]).encode())
    os._exit(0)
os.waitpid(pid, 0)
session._lock.release()
found, n_seen = json.loads(os.read(read, 65536))
session.forward("q", torch.ones(3, 48))
session.close()
print(json.dumps([found, n_seen]))
"""


def test_a_forked_child_sends_nothing():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found, n_seen = json.loads(done.stdout)
    assert set(found.values()) == {"PadReuseError"}, found
    assert n_seen == 1


def test_pads_are_zeroed_where_they_were_whatever_happens(monkeypatch: pytest.MonkeyPatch):
    """The arrays that the kernels were given, not copies of them."""
    from cloister.offload import _session

    given: list[tuple[np.ndarray, ...]] = []
    real = _session._native.unmask

    def unmask(*arguments):
        given.append((arguments[1],))
        return real(*arguments)

    real_mask = _session._native.mask

    def mask(*arguments):
        given.append((arguments[3],))
        return real_mask(*arguments)

    monkeypatch.setattr(_session._native, "unmask", unmask)
    monkeypatch.setattr(_session._native, "mask", mask)
    session_with(FakeAccelerator()).forward("q", draw(TOKENS, N_IN))
    with pytest.raises(IntegrityError):
        session_with(FakeLyingAccelerator(add_one)).forward("q", draw(TOKENS, N_IN))
    with pytest.raises(AcceleratorLostError):
        session_with(FakeDyingAccelerator(0)).forward("q", draw(TOKENS, N_IN))
    with pytest.raises(RingOverflowError):
        session_with(FakeAccelerator()).backward("q", broken(draw(TOKENS, N_OUT)))
    arrays = [array for arrays in given for array in arrays]
    assert len(arrays) == 2 + 2 + 3 + 1
    assert not any(array.any() for array in arrays)


def test_pads_that_lie_ready_are_zeroed_at_the_end_of_a_session():
    pool = PadPool(1 << 18)
    session = session_with(FakeAccelerator(), pool=pool)
    for _ in range(3):
        session.forward("q", draw(TOKENS, N_IN))
    for _ in range(200):
        if pool.n_ready:
            break
        threading.Event().wait(0.01)
    pads = [ticket._once.content[0]() for shelf in pool._shelves.values() for ticket in shelf.tickets]
    assert pads
    assert all(pad.r.any() for pad in pads)
    session.close()
    assert not any(array.any() for pad in pads for array in (pad.r, pad.u))


# --- the connection ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Callable[[], object]]:
    """An accelerator of the library over a connection, with its other end in a thread."""
    from cloister.offload._client import ConnectedAccelerator
    from cloister.offload._compute import CpuDevice
    from cloister.offload._server import serve_connection
    from cloister.offload._transport import OwnerLink

    class Threaded(ConnectedAccelerator):
        def _connect(self) -> OwnerLink:
            ours, theirs = socket.socketpair()
            threading.Thread(target=serve_connection, args=(theirs, CpuDevice()), daemon=True).start()
            return OwnerLink(ours)

    made: list[Threaded] = []

    def make() -> Threaded:
        made.append(Threaded())
        made[-1]._open()
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_an_interrupted_call_does_not_answer_the_next_one(served, monkeypatch: pytest.MonkeyPatch):
    """The answer of the interrupted one is still on its way; taken for the next one's, an honest accelerator is
    found to lie and every key is destroyed."""
    accelerator = served()
    session = OffloadSession(accelerator, FAITHFUL)
    from cloister.ring import quantize_weight

    weight = draw(256, 512, seed=2)
    session.add("q", quantize_weight(weight, FAITHFUL, layer="q"))
    link = accelerator._link
    with monkeypatch.context() as patch:

        def interrupted() -> bytes:
            raise KeyboardInterrupt

        patch.setattr(link, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.forward("q", draw(256, 512))
    x = draw(256, 512, seed=3)
    assert torch.allclose(session.forward("q", x), x @ weight.T, atol=0.5)


def test_what_is_sent_was_written_for_it():
    """A buffer for planes is fresh zeros, not what the enclave's heap held before."""
    from cloister.offload import _remote

    for n_bytes in (96, 512, 4096):
        secret = np.full(n_bytes, 0xA5, np.uint8)
        del secret
        assert not (_remote.zeros(n_bytes) == 0xA5).any()


def test_refusals_of_an_accelerator_show_printable_codes_only(served):
    """What an untrusted process says goes into errors as a code of the protocol."""
    from cloister.wire import AcceleratorError

    accelerator = served()
    session = session_with(accelerator)
    link = accelerator._link
    link.receive = lambda: AcceleratorError("x" * 8).to_bytes()
    with pytest.raises(CloisterError) as caught:
        session.forward("q", draw(TOKENS, N_IN))
    assert re.fullmatch(r"[ -~]*", caught.value.cause)
