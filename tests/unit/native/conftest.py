"""Every kernel on every instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloister.kernels import _native


@pytest.fixture(scope="module", params=_native.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each level; what was in use comes back behind it."""
    before = _native.level()
    _native.use_level(request.param)
    yield request.param
    _native.use_level(before)
