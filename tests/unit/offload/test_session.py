"""The session: what it accepts, retries with fresh pads, threads, forks, and what it says of itself."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cloister.errors import (
    AcceleratorLostError,
    IntegrityError,
    OffloadError,
    PadError,
    PadExhaustedError,
    PadReuseError,
)
from cloister.offload import OffloadSession
from cloister.pad import (
    ASSUMPTIONS,
    LATTICE_PARAMETERS,
    Direction,
    OtpPads,
    Pad,
    PadMode,
    PadPool,
    PadRange,
    expand_ranges,
)
from cloister.pad._otp import multiply_pad
from cloister.ring import FAITHFUL, FAST, QuantizedWeight, RingFormat, quantize_weight
from cloister.testing import FakeAccelerator, FakeDyingAccelerator, FakeLyingAccelerator, FakeStallingAccelerator

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)


def weight_of(fmt: RingFormat = FAST, n_out: int = 5, n_in: int = 7, layer: str = "l") -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return quantize_weight(torch.randn(n_out, n_in, generator=generator) * 0.02, fmt, layer=layer)


def tokens(n: int = 4, width: int = 7) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


class Helper:
    """A pad helper in this process; `change` is done to what it returns."""

    def __init__(self) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self.lost = 0
        self.n_ranges = 0
        self.change = lambda _: None

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        self.weights[layer] = weight

    def multiply(self, layer: str, direction: Direction, ranges: Sequence[PadRange], n_tokens: int) -> np.ndarray:
        self.n_ranges += len(ranges)
        if self.lost:
            self.lost -= 1
            raise AcceleratorLostError("the helper died")
        weight = self.weights[layer]
        planes = weight.forward_planes() if direction is Direction.FORWARD else weight.backward_planes()
        r = expand_ranges(ranges, n_tokens * planes.shape[2], weight.format.pad_moduli)
        u = multiply_pad(r.reshape(len(r), n_tokens, -1), planes, weight.format)
        self.change(u)
        return u


def plain(fmt: RingFormat, x: torch.Tensor) -> torch.Tensor:
    """The result in the mode otp, which test_exactness compares with the oracle."""
    with OffloadSession(FakeAccelerator(), fmt) as session:
        session.add("l", weight_of(fmt))
        return session.forward("l", x)


# --- what it accepts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"retries": -1}, {"bucket": 0}, {"head_room": 0.5}, {"head_room": 1025.0}, {"head_room": float("nan")}],
    ids=str,
)
def test_options_that_cannot_be(options: dict) -> None:
    with pytest.raises(OffloadError, match="cannot be"):
        OffloadSession(FakeAccelerator(), FAST, **options)


@pytest.mark.parametrize("mode", [PadMode.OTP2, PadMode.LATTICE], ids=str)
def test_head_room_is_for_otp_alone(mode: PadMode) -> None:
    with pytest.raises(OffloadError, match="head-room"):
        OffloadSession(FakeAccelerator(), FAST, pad=mode, head_room=2.0)


@pytest.mark.parametrize("mode", [PadMode.OTP, PadMode.LATTICE], ids=str)
def test_a_helper_is_for_otp_2_alone(mode: PadMode) -> None:
    with pytest.raises(OffloadError, match="otp-2"):
        OffloadSession(FakeAccelerator(), FAST, pad=mode, helper=Helper())


def test_otp_2_needs_a_helper() -> None:
    with pytest.raises(OffloadError, match="otp-2"):
        OffloadSession(FakeAccelerator(), FAST, pad=PadMode.OTP2)


def test_lattice_parameters_are_for_lattice_pads_alone() -> None:
    with pytest.raises(OffloadError, match="mode lattice"):
        OffloadSession(FakeAccelerator(), FAST, lattice=LATTICE_PARAMETERS["fast"])


def test_layers_that_cannot_be_added() -> None:
    with OffloadSession(FakeAccelerator(), FAST) as session:
        session.add("l", weight_of())
        with pytest.raises(OffloadError, match="already"):
            session.add("l", weight_of())
        with pytest.raises(OffloadError, match="faithful, not fast"):
            session.add("k", weight_of(FAITHFUL))
        for bias in (torch.zeros(4), torch.zeros(5, 1), torch.tensor([0, 0, float("nan"), 0, 0])):
            with pytest.raises(OffloadError, match="bias"):
                session.add("k", weight_of(), bias)
        session.add("k", weight_of(), torch.ones(5))  # a refused layer left nothing behind


def test_tensors_that_do_not_fit() -> None:
    with OffloadSession(FakeAccelerator(), FAST) as session:
        session.add("l", weight_of())
        with pytest.raises(OffloadError, match="no layer k"):
            session.forward("k", tokens())
        bad = (tokens(width=6), tokens().int(), torch.tensor(1.0), torch.empty(4, 7, device="meta"))
        for x in bad:
            with pytest.raises(OffloadError, match="7 features"):
                session.forward("l", x)
        with pytest.raises(OffloadError, match="5 features"):
            session.backward("l", tokens())
        assert session.describe()["pad_elements"] == 0


def test_a_bias_is_a_copy() -> None:
    with OffloadSession(FakeAccelerator(), FAST) as session:
        bias = torch.ones(5)
        session.add("l", weight_of(), bias)
        before = session.forward("l", tokens())
        bias.zero_()
        assert torch.equal(session.forward("l", tokens()), before)


# --- retries ----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_retry_takes_a_fresh_pad(fmt: RingFormat) -> None:
    accelerator = FakeStallingAccelerator()
    x = tokens(64)
    with OffloadSession(accelerator, fmt) as session:
        session.add("l", weight_of(fmt))
        assert torch.equal(session.forward("l", x), plain(fmt, x))
        assert session.describe()["retries"] == accelerator.n_revived == 1
        assert session.describe()["pad_elements"] == 2 * x.numel()
    first, second = (planes.astype(int) for _, _, planes in accelerator.seen)
    assert first.shape == second.shape
    assert (first == second).mean() < 0.05  # two independent bytes are equal with 1 / 256


def test_it_gives_up_after_the_retries() -> None:
    accelerator = FakeStallingAccelerator(always=True)
    with OffloadSession(accelerator, FAST, retries=3) as session:
        session.add("l", weight_of())
        with pytest.raises(AcceleratorLostError):
            session.forward("l", tokens())
        assert len(accelerator.seen) == 4
        assert len({planes.tobytes() for _, _, planes in accelerator.seen}) == 4
        accelerator.always = False
        assert torch.equal(session.forward("l", tokens()), plain(FAST, tokens()))  # the session itself goes on


def test_no_retries() -> None:
    accelerator = FakeStallingAccelerator()
    with OffloadSession(accelerator, FAST, retries=0) as session:
        session.add("l", weight_of())
        with pytest.raises(AcceleratorLostError):
            session.forward("l", tokens())
        assert accelerator.n_revived == 0


def test_an_accelerator_that_does_not_come_back() -> None:
    with OffloadSession(FakeDyingAccelerator(1, lives=1), FAST) as session:
        session.add("l", weight_of())
        expected = plain(FAST, tokens())
        for _ in range(2):
            assert torch.equal(session.forward("l", tokens()), expected)
        with pytest.raises(OffloadError, match="does not come back"):
            session.forward("l", tokens())


def test_an_accelerator_that_is_lost_while_it_loads() -> None:
    class Fragile(FakeAccelerator):
        n_loads = 0

        def load(self, layer: str, weight: QuantizedWeight) -> None:
            self.n_loads += 1
            if self.n_loads <= n_losses:
                raise AcceleratorLostError("the accelerator died")
            super().load(layer, weight)

    n_losses = 2
    with OffloadSession(Fragile(), FAST) as session:
        session.add("l", weight_of())
        assert torch.equal(session.forward("l", tokens()), plain(FAST, tokens()))
    n_losses = 9
    with OffloadSession(Fragile(), FAST) as session:
        with pytest.raises(AcceleratorLostError):
            session.add("l", weight_of())
        with pytest.raises(OffloadError, match="no layer"):
            session.forward("l", tokens())


# --- modes ------------------------------------------------------------------------------------------------------------


@BOTH
def test_otp_2(fmt: RingFormat) -> None:
    helper, accelerator = Helper(), FakeAccelerator()
    with OffloadSession(accelerator, fmt, pad=PadMode.OTP2, helper=helper) as session:
        session.add("l", weight_of(fmt))
        assert torch.equal(session.forward("l", tokens()), plain(fmt, tokens()))
        helper.lost = 1
        assert torch.equal(session.forward("l", tokens()), plain(fmt, tokens()))
        assert session.describe()["pad"] == "otp-2"
        assert session.describe()["retries"] == 1
        assert accelerator.n_revived == 0  # it was not the one that was lost
        helper.lost = 3
        with pytest.raises(AcceleratorLostError, match="helper"):
            session.forward("l", tokens())
    assert helper.n_ranges >= 3


def test_a_helper_that_lies_ends_the_session() -> None:
    helper = Helper()
    helper.change = lambda u: np.add(u, 1, out=u)
    session = OffloadSession(FakeAccelerator(), FAST, pad=PadMode.OTP2, helper=helper)
    session.add("l", weight_of())
    with pytest.raises(OffloadError, match="not the product"):
        session.forward("l", tokens())
    with pytest.raises(OffloadError, match="ended"):
        session.forward("l", tokens())


@BOTH
def test_lattice(fmt: RingFormat) -> None:
    """Near the other modes: the pad's own rounding is of the size of the input's. Its identities: test_lattice*."""
    accelerator = FakeLyingAccelerator(lambda _: None)
    session = OffloadSession(accelerator, fmt, pad=PadMode.LATTICE)
    session.add("l", weight_of(fmt, 40, 60))
    weight = weight_of(fmt, 40, 60)
    float_weight = weight.w_q * weight.scales[:, None]
    for n, call, by in ((60, session.forward, float_weight.T), (40, session.backward, float_weight)):
        x = tokens(1030, n)  # more than a block
        expected = x @ by
        assert float((call("l", x) - expected).norm() / expected.norm()) < {"fast": 5e-3, "faithful": 5e-4}[fmt.name]
    assert session.describe()["lattice"] == fmt.name
    secrets = session._layers["l"].sides[Direction.FORWARD].source._secrets
    accelerator.change = lambda answer: np.add(answer, 1, out=answer)
    with pytest.raises(IntegrityError):
        session.forward("l", tokens(2, 60))
    assert not secrets.s.any()
    assert not secrets.z.any()


def test_a_pool_that_runs_dry() -> None:
    with OffloadSession(FakeAccelerator(), FAST, pool=PadPool(100, wait_s=0.01)) as session:
        session.add("l", weight_of())
        with pytest.raises(PadExhaustedError, match="no pad of 4 tokens"):
            session.forward("l", tokens())


def test_pads_made_ahead_give_the_same() -> None:
    expected = plain(FAST, tokens())
    with OffloadSession(FakeAccelerator(), FAST, pool=PadPool(1 << 20)) as session:
        session.add("l", weight_of())
        for _ in range(50):
            assert torch.equal(session.forward("l", tokens()), expected)


@pytest.mark.parametrize("end", ["well", "lie", "loss", "nan", "too many"])
def test_pads_are_zeroed_whatever_happens(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    pads: list[Pad] = []
    make = OtpPads.make

    def remember(self: OtpPads, n_tokens: int) -> Pad:
        pads.append(make(self, n_tokens))
        assert pads[-1].r.any()
        assert pads[-1].u.any()
        return pads[-1]

    monkeypatch.setattr(OtpPads, "make", remember)
    lie = (lambda answer: np.add(answer, 1, out=answer)) if end == "lie" else (lambda _: None)
    accelerator = FakeStallingAccelerator(always=True) if end == "loss" else FakeLyingAccelerator(lie)
    with OffloadSession(accelerator, FAST, retries=1) as session:
        session.add("l", weight_of())
        x = tokens()
        if end == "nan":
            x[0, 0] = torch.nan
        if end == "too many":  # the accelerator refuses the call, before anything is masked
            accelerator._busy = True
        with nullcontext() if end == "well" else pytest.raises(OffloadError):
            session.forward("l", x)
    assert len(pads) == (2 if end == "loss" else 1)
    assert not any(array.any() for pad in pads for array in (pad.r, pad.u))


# --- who may use it ---------------------------------------------------------------------------------------------------


def test_threads() -> None:
    accelerator = FakeAccelerator()
    expected = [plain(FAST, tokens(n + 1)) for n in range(8)]
    failures: list[int] = []
    with OffloadSession(accelerator, FAST) as session:
        session.add("l", weight_of())

        def work(n: int) -> None:
            for _ in range(20):
                if not torch.equal(session.forward("l", tokens(n + 1)), expected[n]):
                    failures.append(n)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.describe()["forward"] == 160
    assert failures == []


def test_it_is_not_copied() -> None:
    with OffloadSession(FakeAccelerator(), FAST) as session:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(PadReuseError):
                duplicate(session)


def test_a_forked_child_is_refused() -> None:
    with OffloadSession(FakeAccelerator(), FAST) as session:
        session.add("l", weight_of())
        with session._lock:  # a lock that another thread held at the fork would never be let go
            child = os.fork()
            if child == 0:
                refused = 0
                for use in (
                    lambda: session.forward("l", tokens()),
                    lambda: session.add("k", weight_of()),
                    session.describe,
                    session.close,
                ):
                    try:
                        use()
                    except PadReuseError:
                        refused += 1
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        session.forward("l", tokens())  # nothing happened to the parent's


def test_closing() -> None:
    accelerator = FakeAccelerator()
    session = OffloadSession(accelerator, FAST)
    session.add("l", weight_of())
    side = session._layers["l"].sides[Direction.FORWARD]
    session.close()
    session.close()
    with pytest.raises(OffloadError, match="it was closed"):
        session.forward("l", tokens())
    with pytest.raises(PadError):
        side.source.take(1)
    with pytest.raises(AcceleratorLostError):
        accelerator.load("k", weight_of())


def test_closing_goes_on_when_something_fails() -> None:
    class Clinging(FakeAccelerator):
        def close(self) -> None:
            raise OffloadError("no")

    session = OffloadSession(Clinging(), FAST)
    session.add("l", weight_of())
    side = session._layers["l"].sides[Direction.BACKWARD]
    with pytest.raises(OffloadError, match="no"):
        session.close()
    with pytest.raises(PadError):
        side.source.take(1)
    with pytest.raises(PadExhaustedError):
        session._sources.keys.stream("l", Direction.FORWARD)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_describe() -> None:
    with OffloadSession(FakeAccelerator(), FAITHFUL, bucket=8) as session:
        weight = weight_of(FAITHFUL, layer="other")
        session.add("l", weight)
        session.forward("l", tokens())
        session.backward("l", tokens(width=5))
        found = session.describe()
        assert found.pop("accelerator")["device"] == "fake"
        assert found == {
            "pad": "otp",
            "assumption": ASSUMPTIONS[PadMode.OTP],
            "lattice": None,
            "format": "faithful",
            "head_room": 1.0,
            "bucket": 8,
            "layers": {"l": {"in": 7, "out": 5, "digest": weight.digest().hex()}},
            "pad_elements": 8 * (7 + 5),
            "forward": 1,
            "backward": 1,
            "retries": 0,
            "overflows": 0,
            "ended": "",
        }
        assert repr(session) == "OffloadSession(faithful, otp, n_layers=1)"
        assert session.format is FAITHFUL
        assert session.pad_mode is PadMode.OTP


def test_nothing_secret_is_in_what_it_says() -> None:
    accelerator = FakeLyingAccelerator(lambda answer: np.add(answer, 1, out=answer))
    session = OffloadSession(accelerator, FAST)
    session.add("l", weight_of())
    layer = session._layers["l"]
    assert "array" not in f"{session!r}{layer!r}{layer.sides!r}{session._sources!r}"
    with pytest.raises(OffloadError) as caught:
        session.forward("l", tokens())
    assert "array" not in f"{caught.value!r}{caught.value.__dict__}"


@BOTH
def test_what_the_accelerator_sees_does_not_depend_on_the_input(fmt: RingFormat) -> None:
    """The whole story is in test_masked_training; here: zeros are sent as noise, of the full range of every plane."""
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, fmt) as session:
        session.add("l", weight_of(fmt))
        session.forward("l", torch.zeros(4096, 7))
    ((_, _, planes),) = accelerator.seen
    for plane, modulus in zip(planes, fmt.pad_moduli, strict=True):
        values, counts = np.unique(plane, return_counts=True)
        assert len(values) == modulus
        assert abs(counts - plane.size / modulus).max() < 6 * (plane.size / modulus) ** 0.5
