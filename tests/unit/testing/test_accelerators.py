"""The doubles behave as accelerators do, and misbehave as they say."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.pad import Direction
from cloister.ring import FAITHFUL, FAST, RingFormat, quantize_weight
from cloister.testing import FakeAccelerator, FakeDyingAccelerator, FakeLyingAccelerator, FakeStallingAccelerator

Fake = TypeVar("Fake", bound=FakeAccelerator)
BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)


def give(fake: Fake, fmt: RingFormat = FAST) -> Fake:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    fake.load("w", quantize_weight(weight, fmt, layer="w"))
    return fake


def ask(fake: FakeAccelerator, value: int = 1, direction: Direction = Direction.FORWARD) -> np.ndarray:
    with fake.call("w", direction, 2) as call:
        call.planes[:] = value
        return call.multiply()


@BOTH
def test_honest(fmt: RingFormat) -> None:
    fake = give(FakeAccelerator(), fmt)
    forward, backward = ask(fake), ask(fake, direction=Direction.BACKWARD)
    w_q = fmt.encode_weight(quantize_weight(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), fmt,
                                            layer="w").w_q)  # fmt: skip
    for found, planes in ((forward, w_q), (backward, w_q.transpose(1, 2))):
        sums = planes.long().sum(2).int().expand(fmt.n_planes, -1).unsqueeze(1)
        assert found[0].tolist() == found[1].tolist() == fmt.decode_product(sums)[0].tolist()
    assert [(layer, way) for layer, way, _ in fake.seen] == [("w", Direction.FORWARD), ("w", Direction.BACKWARD)]
    assert fake.describe()["calls"] == 2


def test_what_it_saw_is_a_copy() -> None:
    fake = give(FakeAccelerator())
    with fake.call("w", Direction.FORWARD, 1) as call:
        call.planes[:] = 7
        call.multiply()
        call.planes[:] = 8
    ((_, _, planes),) = fake.seen
    assert planes.shape == (3, 1, 5) and (planes == 7).all()


def test_wrong_use() -> None:
    fake = give(FakeAccelerator())
    with pytest.raises(OffloadError, match="v is not loaded"), fake.call("v", Direction.FORWARD, 1):
        pass
    with fake.call("w", Direction.FORWARD, 1), pytest.raises(OffloadError, match="another call"):
        fake.call("w", Direction.FORWARD, 1).__enter__()
    fake.close()
    with pytest.raises(AcceleratorLostError):
        ask(fake)
    with pytest.raises(OffloadError, match="closed"):
        fake.revive()


def test_lying() -> None:
    honest = ask(give(FakeAccelerator()))

    def change(answer: np.ndarray) -> None:
        answer[1, 2] += 1

    lie = ask(give(FakeLyingAccelerator(change)))
    assert (lie - honest).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_stalling() -> None:
    fake = give(FakeStallingAccelerator(after=1))
    ask(fake)
    for _ in range(2):
        with pytest.raises(AcceleratorLostError):
            ask(fake)
    assert len(fake.seen) == 2  # it saw the planes that it never answered, and nothing after them
    fake.revive()
    ask(fake)
    fake = give(FakeStallingAccelerator(always=True))
    for n in (1, 2):
        with pytest.raises(AcceleratorLostError, match="in time"):
            ask(fake)
        fake.revive()
        assert fake.n_revived == n


def test_dying() -> None:
    fake = give(FakeDyingAccelerator(2, lives=1))
    for _ in range(2):
        ask(fake)
        ask(fake)
        with pytest.raises(AcceleratorLostError, match="died"):
            ask(fake)
        with pytest.raises(AcceleratorLostError, match="gone"):
            fake.load("v", quantize_weight(torch.ones(1, 1), FAST, layer="v"))
        if not fake.n_revived:
            fake.revive()
    with pytest.raises(OffloadError, match="does not come back"):
        fake.revive()
