"""No masked tensor meets an old pad: retries, threads, interrupts, failures and closed layers take fresh ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from bench._uniformity import SeenStatistics
from tests.adversary.offload._sessions import N_IN, N_OUT, TOKENS, FakeHelper, draw, session_with, weight

from cloister.errors import AcceleratorLostError, OffloadError, RingOverflowError
from cloister.offload import OffloadSession
from cloister.pad import LATTICE_PARAMETERS, PadMode, PadPool
from cloister.ring import FAITHFUL, FAST, FORMATS, RingFormat
from cloister.testing import FakeAccelerator, FakeDyingAccelerator, FakeStallingAccelerator

BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@pytest.mark.parametrize("name", LATTICE_PARAMETERS)
def test_lattice_pads_of_retries_steps_threads_and_blocks_are_fresh(name: str):
    """One block of 1,024 rows serves many messages; none of its rows serves two."""
    parameters = LATTICE_PARAMETERS[name]
    fmt, accelerator = FORMATS[parameters.ring], FakeDyingAccelerator(after=2)
    with session_with(accelerator, fmt, pad=PadMode.LATTICE, lattice=parameters, retries=3) as session:
        threads = [
            threading.Thread(target=lambda: [session.forward("q", draw(300, N_IN)) for _ in range(4)]) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(accelerator.seen) >= 12 + 5
    seen = [elements(fmt, planes).reshape(300, N_IN) for _, _, planes in accelerator.seen]
    rows = np.concatenate(seen)
    assert len(np.unique(rows, axis=0)) == len(rows), "a row of a pad met the same row of features twice"
    assert have_other_pads(fmt, [planes for _, _, planes in accelerator.seen])


def elements(fmt: RingFormat, planes: np.ndarray) -> np.ndarray:
    return fmt.decode_product(torch.from_numpy(planes).to(torch.int32)).numpy().ravel()


def have_other_pads(fmt: RingFormat, messages: Iterable[np.ndarray]) -> bool:
    """Whether no two of these messages, of one and the same tensor, are near each other anywhere."""
    seen = [elements(fmt, planes) for planes in messages]
    return all((a != b).mean() > 0.99 for i, a in enumerate(seen) for b in seen[:i])


@BOTH
def test_a_retry_after_a_loss_has_another_pad(fmt: RingFormat):
    """The accelerator that stalls has seen the first message, and sees the second: one tensor under two pads."""
    accelerator = FakeStallingAccelerator(after=0, always=True)
    session = session_with(accelerator, fmt, retries=3)
    with pytest.raises(AcceleratorLostError):
        session.forward("q", draw(TOKENS, N_IN))
    assert len(accelerator.seen) == 4
    assert have_other_pads(fmt, [planes for _, _, planes in accelerator.seen])


@BOTH
def test_retries_of_many_steps_are_uniform_together(fmt: RingFormat):
    """The difference to the next message, for an accelerator that dies at every second product."""
    accelerator = FakeDyingAccelerator(after=1)
    session, found, rows = session_with(accelerator, fmt, retries=3), SeenStatistics(fmt), torch.ones(64, N_IN)
    for _ in range(40):
        session.forward("q", rows)
    assert accelerator.n_revived >= 19
    for _, _, planes in accelerator.seen:
        found.add(planes)
    p = found.p_values()
    assert p["element: difference to next message"] > 1e-8
    assert p["element: autocorrelation, next message"] > 1e-8


@BOTH
def test_the_same_tensor_again_in_either_direction_has_another_pad(fmt: RingFormat):
    accelerator = FakeAccelerator()
    session = session_with(accelerator, fmt)
    for _ in range(3):
        session.forward("q", draw(TOKENS, N_IN))
        session.backward("q", draw(TOKENS, N_OUT))
    for direction in ("forward", "backward"):
        assert have_other_pads(fmt, [planes for _, way, planes in accelerator.seen if way == direction])


@BOTH
def test_layers_and_jobs_share_no_pad(fmt: RingFormat):
    seen = []
    for _ in range(2):
        accelerator = FakeAccelerator()
        session = OffloadSession(accelerator, fmt)
        for layer in ("q", "k"):
            session.add(layer, weight(fmt, layer))
            session.forward(layer, draw(TOKENS, N_IN))
        seen += [planes for _, _, planes in accelerator.seen]
    assert have_other_pads(fmt, seen)


@pytest.mark.parametrize("pool_bytes", [0, 1 << 16], ids=["on the spot", "ahead"])
@BOTH
def test_threads_take_pads_of_their_own(fmt: RingFormat, pool_bytes: int):
    accelerator = FakeAccelerator()
    with session_with(accelerator, fmt, pool=PadPool(pool_bytes)) as session:
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait(60)
            for _ in range(10):
                session.forward("q", draw(TOKENS, N_IN))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(accelerator.seen) == 40
        assert have_other_pads(fmt, [planes for _, _, planes in accelerator.seen])
        assert session.describe()["pad_elements"] >= 40 * TOKENS * N_IN


def test_a_tensor_that_is_refused_shows_nothing_and_spends_its_pad():
    """NaN in the last row: the rows before it are not written where the accelerator can read."""
    accelerator = FakeAccelerator()
    session = session_with(accelerator)
    calls = []
    real = accelerator.call

    def kept(*arguments):
        calls.append(real(*arguments))
        return calls[-1]

    accelerator.call = kept  # pyright: ignore
    x = draw(TOKENS, N_IN)
    x[-1, -1] = torch.nan
    before = session.describe()["pad_elements"]
    with pytest.raises(RingOverflowError, match=r"^layer q, forward: the input holds NaN or infinite values$"):
        session.forward("q", x)
    assert accelerator.seen == []
    assert session.describe()["pad_elements"] == before + TOKENS * N_IN
    session.forward("q", draw(TOKENS, N_IN))


def test_filler_rows_are_masked_too():
    """Rows of zeros that fill a bucket look like every other row."""
    accelerator, found = FakeAccelerator(), SeenStatistics(FAST)
    session = session_with(accelerator, FAST, bucket=256)
    for _ in range(8):
        session.forward("q", draw(1, N_IN))
    for _, _, planes in accelerator.seen:
        assert planes.shape == (3, 256, N_IN)
        found.add(planes)
    p = found.p_values()
    assert all(p[f"plane {i}: residues"] > 1e-8 for i in range(3))


def test_a_layer_whose_first_load_failed_can_be_added_again():
    """Its streams were retired with it; the second try has others, not those that refuse."""
    accelerator = FakeDyingAccelerator(after=10**9, lives=0)
    session = OffloadSession(accelerator, FAITHFUL, retries=0)
    accelerator._lost = True
    with pytest.raises(AcceleratorLostError):
        session.add("q", weight())
    accelerator._lost = False
    try:
        session.add("q", weight())
    except OffloadError:
        return  # to refuse at once would do as well
    session.forward("q", draw(TOKENS, N_IN))


def test_a_lost_pad_helper_does_not_cost_a_healthy_accelerator():
    accelerator, helper = FakeAccelerator(), FakeHelper(lost=[0])
    session = session_with(accelerator, pad=PadMode.OTP2, helper=helper)
    session.forward("q", draw(TOKENS, N_IN))
    assert accelerator.n_revived == 0
    first, second = helper.asked
    assert (first[0].first, first[0].n) != (second[0].first, second[0].n)


def test_the_helper_never_gets_a_key_of_another_stream():
    """Forward and backward, and two layers, have blocks of their own."""
    helper = FakeHelper()
    session = session_with(FakeAccelerator(), pad=PadMode.OTP2, helper=helper)
    session.add("k", weight(layer="k"))
    for layer in ("q", "k"):
        session.forward(layer, draw(TOKENS, N_IN))
        session.backward(layer, draw(TOKENS, N_OUT))
    assert len({asked[0].key for asked in helper.asked}) == 4
