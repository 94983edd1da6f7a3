"""Accelerators in this process, for tests: an honest one that remembers what it saw, and those that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int8, UInt32

from cloister.errors import AcceleratorLostError, OffloadError
from cloister.offload._compute import CpuDevice, DeviceWeight
from cloister.pad import Direction
from cloister.ring import QuantizedWeight


class FakeAccelerator:
    """Multiplies honestly, in this process. Stands for a `cloister.offload.Accelerator`.

    Attributes:
        seen: of every product the layer, the direction and a copy of its planes, which is all that an accelerator sees.
        n_revived: how often `revive` was called.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, Direction, Int8[np.ndarray, "planes tokens in"]]] = []
        self.n_revived = 0
        self._device = CpuDevice()
        self._weights: dict[str, DeviceWeight] = {}
        self._lost = self._busy = self._closed = False

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """See `Accelerator.load`."""
        self._check_alive()
        self._weights[layer] = self._device.load(weight.format, weight.w_q)

    @contextmanager
    def call(self, layer: str, direction: Direction, n_tokens: int) -> Iterator[_FakeCall]:
        """See `Accelerator.call`."""
        self._check_alive()
        if layer not in self._weights or self._busy:
            raise OffloadError(f"layer {layer} is not loaded" if not self._busy else "another call is open")
        self._busy = True
        try:
            yield _FakeCall(self, layer, direction, n_tokens)
        finally:
            self._busy = False

    def revive(self) -> None:
        """See `Accelerator.revive`."""
        if self._closed:
            raise OffloadError("the accelerator was closed")
        self.n_revived += 1
        self._lost = False

    def close(self) -> None:
        """See `Accelerator.close`."""
        self._closed = True

    def describe(self) -> dict[str, object]:
        """See `Accelerator.describe`."""
        n_bytes = sum(planes.nbytes for _, _, planes in self.seen)
        return {"device": "fake", "kernel": "int-mm", "calls": len(self.seen), "bytes_out": n_bytes, "bytes_in": 0,
                "restarts": self.n_revived}  # fmt: skip

    def weight(self, layer: str) -> DeviceWeight:
        """What it holds of a layer."""
        return self._weights[layer]

    def answer(
        self, layer: str, direction: Direction, planes: Int8[np.ndarray, "planes tokens in"]
    ) -> UInt32[np.ndarray, "tokens out"]:
        """The product. What a double changes."""
        self.seen.append((layer, direction, planes.copy()))
        weight = self._weights[layer]
        answer = np.empty((planes.shape[1], weight.sizes(direction)[1]), dtype=np.uint32)
        self._device.multiply(weight, direction, planes, answer)
        return answer

    def _lose(self, cause: str) -> AcceleratorLostError:
        self._lost = True
        return AcceleratorLostError(cause)

    def _check_alive(self) -> None:
        if self._lost or self._closed:
            raise AcceleratorLostError("the accelerator is gone")


class _FakeCall:
    """See `AcceleratorCall`."""

    def __init__(self, owner: FakeAccelerator, layer: str, direction: Direction, n_tokens: int) -> None:
        self._owner = owner
        self._of = (layer, direction)
        weight = owner.weight(layer)
        shape = (weight.format.n_planes, n_tokens, weight.sizes(direction)[0])
        self.planes: Int8[np.ndarray, "planes tokens in"] = np.zeros(shape, dtype=np.int8)

    def multiply(self) -> UInt32[np.ndarray, "tokens out"]:
        return self._owner.answer(*self._of, self.planes)


class FakeLyingAccelerator(FakeAccelerator):
    """Hands every honest answer to `change`, which changes it in place."""

    def __init__(self, change: Callable[[UInt32[np.ndarray, "tokens out"]], object]) -> None:
        super().__init__()
        self.change = change

    def answer(
        self, layer: str, direction: Direction, planes: Int8[np.ndarray, "planes tokens in"]
    ) -> UInt32[np.ndarray, "tokens out"]:
        """The product, changed."""
        answer = super().answer(layer, direction, planes)
        self.change(answer)
        return answer


class FakeStallingAccelerator(FakeAccelerator):
    """Sees the planes and never answers, which to the caller is an `AcceleratorLostError` after its time is up.

    Here that comes at once. Once revived it answers, unless `always`.
    """

    def __init__(self, *, after: int = 0, always: bool = False) -> None:
        super().__init__()
        self.after = after
        self.always = always

    def answer(
        self, layer: str, direction: Direction, planes: Int8[np.ndarray, "planes tokens in"]
    ) -> UInt32[np.ndarray, "tokens out"]:
        """The product, or none in time."""
        answer = super().answer(layer, direction, planes)
        if len(self.seen) > self.after and (self.always or not self.n_revived):
            raise self._lose("the accelerator did not answer in time")
        return answer


class FakeDyingAccelerator(FakeAccelerator):
    """Answers `after` products and dies in the next one; again in as many more, each time that it is revived.

    Args:
        after: products between deaths; 0 means that it never answers.
        lives: how often `revive` works; then it raises `OffloadError`. None is always.
    """

    def __init__(self, after: int, *, lives: int | None = None) -> None:
        super().__init__()
        self.after = after
        self.lives = lives
        self._n_answered = 0

    def answer(
        self, layer: str, direction: Direction, planes: Int8[np.ndarray, "planes tokens in"]
    ) -> UInt32[np.ndarray, "tokens out"]:
        """The product, or the end."""
        answer = super().answer(layer, direction, planes)
        if self._n_answered == self.after:
            raise self._lose("the accelerator died")
        self._n_answered += 1
        return answer

    def revive(self) -> None:
        """See `Accelerator.revive`."""
        if self.lives is not None and self.n_revived >= self.lives:
            raise OffloadError("the accelerator does not come back")
        super().revive()
        self._n_answered = 0
