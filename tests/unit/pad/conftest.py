"""Keys of one test, closed behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloister.pad import Direction, PadKeys, PadStream


@pytest.fixture
def keys() -> Iterator[PadKeys]:
    keys = PadKeys()
    yield keys
    keys.close()


@pytest.fixture
def stream(keys: PadKeys) -> PadStream:
    return keys.stream("layers.0.q", Direction.FORWARD)
