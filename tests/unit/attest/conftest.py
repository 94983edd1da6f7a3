"""One simulated root for the tests of this folder."""

from __future__ import annotations

import pytest

from cloister.attest import SimulatedRoot

NOW = 1_800_000_000


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRoot:
    return SimulatedRoot.create(tmp_path_factory.mktemp("root") / "root", now=NOW)
