"""What every test shares: a home of its own, so that no test touches this user's simulated platform, and no network."""

from __future__ import annotations

import os

import pytest

# Several test processes share two cores: threads of one would wait for those of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_configure() -> None:
    """tests/refusals runs the suite on a changed copy of the package: make sure that it is the copy that runs."""
    import cloister

    expected = os.environ.get("CLOISTER_EXPECT_PACKAGE")
    if expected and os.path.dirname(cloister.__file__ or "") != expected:  # noqa: PTH120
        raise pytest.UsageError(f"the tests would run {cloister.__file__}, not {expected}")


@pytest.fixture(scope="session", autouse=True)
def cloister_home(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("CLOISTER_HOME")
    os.environ["CLOISTER_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["CLOISTER_HOME"]
    else:
        os.environ["CLOISTER_HOME"] = before
