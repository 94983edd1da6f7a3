"""The keeper: whatever it started ends with it, however it ends itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloister.federation._keeper_link import KeeperLink

ENV = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OPENBLAS_NUM_THREADS": "1"}
PATIENCE_S = 60.0

# A Flower process that runs until it is killed: there is no SuperLink at that address, and it goes on asking for it.
ENDLESS = ["flower-superexec", "--runtime-api-address", "127.0.0.1:9", "--insecure"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def keeper(folder: Path, tmp_path: Path) -> Iterator[KeeperLink]:
    """A keeper of one test's own, to be ended."""
    yield from started(folder, tmp_path)


@pytest.fixture(scope="module")
def shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cl-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def shared(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeeperLink]:
    """A keeper for tests that leave it as it is: to load Flower takes seconds."""
    yield from started(shared_folder, tmp_path_factory.mktemp("keeper"))


def started(folder: Path, home: Path) -> Iterator[KeeperLink]:
    link = KeeperLink(folder, env={**ENV, "FLWR_HOME": str(home)}, log=home / "keeper.log")
    try:
        link.wait_until_ready()
        yield link
    finally:
        link.close()


def wait(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    # Where nobody reaps orphans (a container without an init), the dead stay as zombies.
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def start_endless(keeper: KeeperLink, tmp_path: Path, name: str = "x") -> int:
    keeper.start(name, ENDLESS, env={**ENV, "FLWR_HOME": str(tmp_path)}, log=str(tmp_path / "x.log"))
    wait(lambda: keeper.take_events() is None or name in keeper.pids)
    return keeper.pids[name]


def test_a_job_brings_back_what_it_printed(shared: KeeperLink, tmp_path: Path) -> None:
    shared.start(
        "v", ["flwr", "--version"], env={**ENV, "FLWR_HOME": str(tmp_path)}, log=str(tmp_path / "v.log"), is_job=True
    )
    events: list[dict[str, Any]] = []
    (ended,) = wait(lambda: events.extend(shared.take_events()) or [e for e in events if e["event"] == "exit"])
    assert (ended["name"], ended["code"]) == ("v", 0)
    assert "Flower version" in ended["output"]
    assert shared.pids == {}


def test_what_fails_says_so_in_its_log(shared: KeeperLink, tmp_path: Path) -> None:
    shared.start("bad", ["flower-superlink", "--nonsense"], env=ENV, log=str(tmp_path / "bad.log"))
    (ended,) = wait(lambda: [e for e in shared.take_events() if e["event"] == "exit"])
    assert ended["code"] == 2
    assert "--nonsense" in (tmp_path / "bad.log").read_text(encoding="utf-8")
    assert shared.is_alive


def test_a_kill_is_told(shared: KeeperLink, tmp_path: Path) -> None:
    pid = start_endless(shared, tmp_path)
    shared.kill("x")
    (ended,) = wait(lambda: [e for e in shared.take_events() if e["event"] == "exit"])
    assert (ended["pid"], ended["code"]) == (pid, -signal.SIGKILL)


def test_closing_leaves_nothing(keeper: KeeperLink, tmp_path: Path, folder: Path) -> None:
    pids = [start_endless(keeper, tmp_path, name) for name in ("x", "y")]
    keeper.close()
    assert all(gone(pid) for pid in [*pids, keeper.pid])
    assert not folder.exists()
    keeper.close()


def test_a_killed_keeper_takes_its_children_along(keeper: KeeperLink, tmp_path: Path) -> None:
    pid = start_endless(keeper, tmp_path)
    os.kill(keeper.pid, signal.SIGKILL)
    wait(lambda: not keeper.is_alive and gone(pid))
    keeper.start("z", ENDLESS, env=ENV, log=str(tmp_path / "z.log"))  # no error: whoever supervises looks at is_alive


ORPHANING = """
import os, sys, time
from pathlib import Path
from cloister.federation._keeper_link import KeeperLink
link = KeeperLink(Path(sys.argv[1]), env=os.environ, log=Path(sys.argv[2]))
print(link.pid, flush=True)
if sys.argv[3] == "later":
    link.wait_until_ready()
    link.start("x", sys.argv[4:], env=dict(os.environ), log=sys.argv[2])
    while not link.pids:
        link.take_events()
    print(link.pids["x"], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_killed_run_takes_the_keeper_and_all_below_along(folder: Path, tmp_path: Path, when: str) -> None:
    """`at once`: in the seconds in which the keeper still loads Flower."""
    argv = [sys.executable, "-c", ORPHANING, str(folder), str(tmp_path / "log"), when, *ENDLESS]
    with subprocess.Popen(argv, env={**ENV, "FLWR_HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(run.stdout.readline()) for _ in range(1 if when == "at once" else 2)]
        run.kill()
    wait(lambda: all(gone(pid) for pid in pids))
    wait(lambda: not folder.exists())


def test_a_superexec_gets_no_process_that_is_not_meant_for_it(
    shared: KeeperLink, tmp_path: Path, shared_folder: Path
) -> None:
    from cloister.federation import _app_shim

    app = {"name": "app", "env": ENV, "log": str(tmp_path / "app.log")}
    shared.start(
        "exec",
        ENDLESS,
        env={**ENV, "FLWR_HOME": str(tmp_path)},
        log=str(tmp_path / "x.log"),
        apps={"flwr-clientapp": app},
    )
    wait(lambda: shared.take_events() is None or "exec" in shared.pids)

    def ask(role: str, command: str) -> None:
        shim = [
            sys.executable,
            "-I",
            "-S",
            str(Path(str(_app_shim.__file__))),
            str(shared_folder / "apps"),
            role,
            command,
        ]
        subprocess.run([*shim, "--help"], check=True)

    for role, command in (("other", "flwr-clientapp"), ("exec", "flwr-agentapp"), ("exec", "flwr-clientapp")):
        ask(role, command)
    events: list[dict[str, Any]] = []
    wait(lambda: events.extend(shared.take_events()) or [e for e in events if e["event"] == "exit"])
    assert [e["name"] for e in events if e["event"] == "started"] == ["app"]
    assert "ClientApp" in (tmp_path / "app.log").read_text(encoding="utf-8")
