"""Ways to meet an old pad: use it again, copy, pickle, fork, restart, restore. Each is refused or gives another pad."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from cloister.errors import PadExhaustedError, PadReuseError
from cloister.pad import (
    BLOCK_POSITIONS,
    CheckKeys,
    Direction,
    Otp2Pads,
    OtpPads,
    Pad,
    PadKeys,
    PadLedger,
    PadPool,
    PadStream,
    PadTicket,
)
from cloister.ring import FAITHFUL, quantize_weight
from cloister.testing import FakePadHelper

MODULI = (256, 255, 253, 251)
NAMES = ["keys", "stream", "ledger", "ticket", "pool", "pad", "check", "otp", "otp-2", "shared ticket"]


@pytest.fixture
def objects():
    keys, pool = PadKeys(), PadPool(4096)
    weight = quantize_weight(torch.eye(8), FAITHFUL, layer="q")
    stream, check = keys.stream("q", Direction.FORWARD), CheckKeys.generate(weight, Direction.FORWARD)
    otp = OtpPads(stream, weight, Direction.FORWARD, check, pool=pool, planes=weight.forward_planes())
    back, helper = CheckKeys.generate(weight, Direction.BACKWARD), FakePadHelper()
    helper.load("q", weight)
    shared = keys.stream("q", Direction.BACKWARD)
    yield {
        "keys": keys,
        "stream": stream,
        "ledger": stream.ledger,
        "ticket": otp.take(2),
        "pool": pool,
        "pad": otp.take(2).use((2, 8)),
        "check": check,
        "otp": otp,
        "otp-2": Otp2Pads(shared, weight, Direction.BACKWARD, back, pool=pool, helper=helper),
        "shared ticket": shared.draw_shared((8,), MODULI),
    }
    pool.close()
    keys.close()


def slots(thing: object) -> list[str]:
    return [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]


def test_a_second_use_by_many_threads_at_once():
    stream = PadKeys().stream("q", Direction.FORWARD)
    for _ in range(30):
        ticket = stream.draw((16,), MODULI)
        barrier, pads, refusals = threading.Barrier(4), [], []

        def work(ticket=ticket, barrier=barrier, pads=pads, refusals=refusals) -> None:
            barrier.wait(60)
            try:
                pads.append(ticket.use((16,)))
            except PadReuseError as error:
                refusals.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(pads), len(refusals)) == (1, 3)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_can_be_copied_or_pickled(objects: dict[str, object], name: str):
    thing = objects[name]
    attempts = [
        lambda: copy.copy(thing),
        lambda: copy.deepcopy(thing),
        lambda: copy.deepcopy({"state": [thing]}),
        lambda: thing.__reduce__(),
        lambda: thing.__reduce_ex__(4),
        lambda: object.__reduce_ex__(thing, 2),
        lambda: thing.__getstate__(),
        lambda: thing.__setstate__({}),  # pyright: ignore
        *(lambda protocol=protocol: pickle.dumps(thing, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        lambda: pickle.dumps({"checkpoint": (1, thing)}),
    ]
    for attempt in attempts:
        with pytest.raises(PadReuseError, match="cannot be copied"):
            attempt()


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_dict_to_save_and_restore(objects: dict[str, object], name: str):
    with pytest.raises(TypeError):
        vars(objects[name])
    with pytest.raises(AttributeError):
        objects[name].n_taken_before = 0  # pyright: ignore


def test_a_ledger_rebuilt_from_saved_attributes_is_the_same_ledger():
    ledger = PadLedger()
    ledger.take(10)
    saved = {name: getattr(ledger, name) for name in slots(ledger)}
    with pytest.raises(PadReuseError):
        copy.deepcopy(saved)
    with pytest.raises(PadReuseError):
        pickle.dumps(saved)
    ledger.take(5)
    twin = PadLedger.__new__(PadLedger)
    for each in (twin, ledger):
        for name, value in saved.items():
            setattr(each, name, value)
    assert [twin.take(1), ledger.take(1), twin.take(1)] == [15, 16, 17]
    ledger.retire()
    with pytest.raises(PadExhaustedError):
        twin.take(1)


def test_a_ticket_rebuilt_from_saved_attributes_is_used_up_too():
    ticket = PadTicket(0, (4,), lambda: "r")
    saved = {name: getattr(ticket, name) for name in slots(ticket)}
    with pytest.raises(PadReuseError):
        copy.deepcopy(saved)
    ticket.use((4,))
    twin = PadTicket.__new__(PadTicket)
    for each in (twin, ticket):
        for name, value in saved.items():
            setattr(each, name, value)
        with pytest.raises(PadReuseError):
            each.use((4,))


@pytest.mark.parametrize("name", ["otp", "otp-2"])
def test_a_source_rebuilt_from_saved_attributes_gives_no_pad_again(objects: dict[str, object], name: str):
    source = objects[name]
    saved = {slot: getattr(source, slot) for slot in slots(source)}
    with pytest.raises(PadReuseError):
        copy.deepcopy(saved)
    starts = [source.take(2).start]
    twin = type(source).__new__(type(source))
    for each in (twin, source):
        for slot, value in saved.items():
            setattr(each, slot, value)
        starts.append(each.take(2).start)
    assert len(set(starts)) == 3
    twin.close()
    for each in (twin, source):
        with pytest.raises(PadExhaustedError):
            each.take(2)


def test_no_state_can_be_exported_or_read_back():
    """There are no state files, and so none of another key: keys live and end in their process."""
    public = {
        kind: {name for name in dir(kind) if not name.startswith("_")}
        for kind in (PadKeys, PadStream, PadLedger, PadPool, OtpPads, Otp2Pads, CheckKeys)
    }
    words = ("save", "load", "store", "state", "export", "import", "dump", "bytes", "resume", "restore", "key")
    found = {name for names in public.values() for name in names if any(word in name for word in words)}
    assert found == {"pad_bytes"}  # a size
    # What makes one takes no position, and no key but where it is of the class that owns it.
    assert list(inspect.signature(PadKeys).parameters) == []
    assert list(inspect.signature(PadLedger).parameters) == []
    assert list(inspect.signature(PadStream).parameters) == ["key"]


@pytest.mark.parametrize("draw", [PadStream.draw, PadStream.draw_shared])
def test_a_ticket_is_used_once_whoever_else_makes_its_pad(draw):
    """Sharing is part of using: what a second party was told once is never told again, nor masks a second tensor."""
    ticket = draw(PadKeys().stream("q", Direction.FORWARD), (8,), MODULI)
    ticket.use((8,))
    for shape in ((8,), (1,)):
        with pytest.raises(PadReuseError, match="second time"):
            ticket.use(shape)


def test_a_share_that_failed_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    stream = PadKeys().stream("q", Direction.FORWARD)
    ticket = stream.draw_shared((8,), MODULI)
    with monkeypatch.context() as patch:
        patch.setattr("cloister.pad._stream.expand_block", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ticket.use((8,))
    with pytest.raises(PadReuseError):
        ticket.use((8,))
    assert stream.draw_shared((8,), MODULI).start == 8


def test_two_machines_of_one_snapshot_have_other_pads():
    """Same stream key, same position, as after a restored snapshot: blocks begun afterwards are hedged."""
    key = bytes(range(32))
    twins = [PadStream(bytearray(key)) for _ in range(2)]
    for twin in twins:
        twin.take(2 * BLOCK_POSITIONS)
    for position in (0, BLOCK_POSITIONS):
        a, b = (twin.expand(position, 4096, MODULI) for twin in twins)
        assert (a == b).mean() < 0.02


def test_a_spent_block_put_back_has_another_key():
    stream = PadKeys().stream("q", Direction.FORWARD)
    r = stream.draw((BLOCK_POSITIONS,), MODULI).use((BLOCK_POSITIONS,))
    stream.ledger._cell.n_taken = 0  # what no caller can do
    again = stream.draw((BLOCK_POSITIONS,), MODULI).use((BLOCK_POSITIONS,))
    assert (r == again).mean() < 0.02


FORK = """
import json, os, sys, threading
import torch
from cloister.errors import PadReuseError
from cloister.pad import CheckKeys, Direction, OtpPads, PadKeys, PadPool
from cloister.ring import FAITHFUL, quantize_weight

M = (256, 255, 253, 251)
keys = PadKeys()
stream = keys.stream("q", Direction.FORWARD)
shared = keys.stream("q", Direction.BACKWARD)
ticket, share = stream.draw((8,), M), shared.draw_shared((8,), M)
stream.expand(0, 8, M)
pool = PadPool(800, wait_s=60)
weight = quantize_weight(torch.eye(8), FAITHFUL, layer="q")
check = CheckKeys.generate(weight, Direction.FORWARD)
planes = weight.forward_planes()
source = OtpPads(stream, weight, Direction.FORWARD, check, pool=pool, planes=planes)
pad = source.take(1)
locks = [keys._lock, stream._lock, stream.ledger._cell.lock, pool._changed]
for lock in locks:
    lock.acquire()  # as another thread may hold them when it happens: the child must refuse, not wait
attempts = {
    "keys.stream": lambda: keys.stream("q", Direction.FORWARD),
    "keys.new_job": keys.new_job,
    "keys.close": keys.close,
    "stream.take": lambda: stream.take(1),
    "stream.draw": lambda: stream.draw((1,), M),
    "stream.expand": lambda: stream.expand(0, 8, M),
    "stream.spend": lambda: stream.spend(0, 8),
    "stream.retire": stream.retire,
    "ledger.take": lambda: stream.ledger.take(1),
    "ledger.check": stream.ledger.check,
    "ledger.retire": stream.ledger.retire,
    "ticket.use": lambda: ticket.use((8,)),
    "share.use": lambda: share.use((8,)),
    "stream.draw_shared": lambda: shared.draw_shared((8,), M),
    "pool.take": lambda: pool.take(source, 1),
    "pool.drop": lambda: pool.drop(source),
    "pool.close": pool.close,
    "source.take": lambda: source.take(1),
    "source.close": source.close,
    "check.rho": lambda: check.rho,
    "check.v": lambda: check.v,
    "check.wipe": check.wipe,
    "pool ticket.use": lambda: pad.use((1, 8)),
}
read, write = os.pipe()

def child():
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "went through"
        except Exception as error:
            found[name] = type(error).__name__
    return found

if (pid := os.fork()) == 0:
    os.write(write, json.dumps(child()).encode())
    os._exit(0)
os.waitpid(pid, 0)
for lock in locks:
    lock.release()
found = {"child": json.loads(os.read(read, 65536))}

# A grandchild too, and one whose process id happens to be the first one's.
if (pid := os.fork()) == 0:
    os.getpid = lambda: os.getppid()
    if (inner := os.fork()) == 0:
        home = keys._home[0]
        os.getpid = lambda: home
        os.write(write, json.dumps(child()).encode())
        os._exit(0)
    os.waitpid(inner, 0)
    os._exit(0)
os.waitpid(pid, 0)
found["grandchild"] = json.loads(os.read(read, 65536))
found["parent"] = [list(ticket.use((8,)).shape), stream.take(1) > 0, list(pad.use((1, 8)).r.shape)]
pool.close()
print(json.dumps(found))
"""


def python(source: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_forked_child_is_refused_everything_and_the_parent_goes_on():
    found = json.loads(python(FORK))
    for process in ("child", "grandchild"):
        assert len(found[process]) == 23
        assert set(found[process].values()) == {"PadReuseError"}, found[process]
    assert found["parent"] == [[4, 8], True, [4, 1, 8]]


def test_a_restarted_process_has_other_pads():
    source = """
    import hashlib
    from cloister.pad import Direction, PadKeys
    stream = PadKeys().stream("q", Direction.FORWARD)
    print([hashlib.sha256(stream.draw((64,), (m,)).use((64,))).hexdigest() for m in (256, 255, 253, 251)])
    """
    assert python(source) != python(source)


def test_a_pad_that_is_not_multiprocessings(objects: dict[str, object]):
    """What multiprocessing sends to a worker is a pickle."""
    from multiprocessing.reduction import ForkingPickler

    assert isinstance(objects["pad"], Pad)
    with pytest.raises(PadReuseError):
        ForkingPickler.dumps(objects["pad"])
