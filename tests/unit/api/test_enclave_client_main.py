"""The main of a client's enclave: what is opened before hardening, which part it takes, what it answers its side."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cloister.federation
from cloister.api import _enclave_client_main as module
from cloister.api import _local_model
from cloister.api._folder import RunFolder
from cloister.api._setup import set_up
from cloister.config import load_job
from cloister.errors import MalformedMessageError
from cloister.testing import write_tiny_job

LONG = 20.0


class Events:
    def __init__(self) -> None:
        self.said: list[str] = []

    def emit(self, event: str, **fields: Any) -> None:
        self.said.append(event)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("run")
    job = write_tiny_job(root / "job", n_train=4, n_test=2, sections='[method]\nname = "enclave"\n',
                         training="epochs = 1")  # fmt: skip
    return set_up(load_job(job), root / "runs")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "part"), [((), "take part"), (("--ask",), "answer")], ids=["run", "ask"])
def test_which_part_it_takes(
    folder: RunFolder, options: tuple[str, ...], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, tuple[Any, ...]]] = []
    for name, word in (("_take_part", "take part"), ("_answer", "answer")):
        monkeypatch.setattr(module, name, lambda *args, word=word: taken.append((word, args[:-1])))
    for name in ("die_with_parent", "set_up_logging", "fail_on_thread_bug", "EventFile"):
        monkeypatch.setattr(module, name, lambda *_: None)
    masks: list[int] = []
    monkeypatch.setattr(module.os, "umask", masks.append)
    monkeypatch.setattr(module, "run_main", lambda body, events: body())
    monkeypatch.setattr(sys, "argv", [
        "main", "--run", str(folder.path), "--name", "alpha", "--socket", "/s", "--accelerator", "unix:/a",
        "--parent", "7", *options,
    ])  # fmt: skip
    module.main()
    assert taken == [(part, (folder, "alpha", Path("/s"), "unix:/a"))]
    assert masks == [0o077]


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_data", [True, False])
def test_what_is_opened_before_hardening_and_what_it_may_read(
    folder: RunFolder, with_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    given: dict[str, Any] = {}

    def port(address: str) -> str:
        order.append(f"port {address}")
        return "port"

    def start(*_: Any, **options: Any) -> SimpleNamespace:
        order.append("harden")
        given.update(options)
        return SimpleNamespace()

    monkeypatch.setattr(module, "accelerator_port", port)
    monkeypatch.setattr(module, "start_enclave", start)
    plan, _, found = module._start(folder, "beta", Path("/s"), "unix:/a", with_data=with_data)
    assert order == ["port unix:/a", "harden"] and found == "port"
    assert given["work"] == folder.client("beta") and given["socket_path"] == Path("/s")
    names = [path.name for path in given["read"] if path.suffix == ".jsonl"]
    assert names == (["beta-train.jsonl", "beta-test.jsonl"] if with_data else [])
    assert plan.name == "beta" and set(plan.datasets) == ({"train", "test"} if with_data else set())
    assert plan.dp_sgd is None


# --- its own side's questions -----------------------------------------------------------------------------------------


class FakeModel:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.is_closed = False

    def answer(self, *asked: Any) -> list[dict[str, Any]]:
        self.asked.append(asked)
        return [{"label": "red"}]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Everything around the two parts: a started enclave, the model, and where the host port's handler comes out."""
    found = SimpleNamespace(handlers=[], model=FakeModel(), opened=[], events=Events())
    attester = SimpleNamespace(sealing_key=lambda role: role.encode().ljust(32, b"."), evidence=lambda data: data)
    started = SimpleNamespace(attester=attester, layers=("seccomp",), register=b"\1" * 48, listener="listener")
    plan = SimpleNamespace(name="alpha")

    def start(*_: Any, with_data: bool) -> tuple[Any, Any, Any]:
        found.with_data = with_data
        return plan, started, "port"

    def open_model(*args: Any, **options: Any) -> FakeModel:
        found.opened.append((args, options))
        return found.model

    class Server:
        def __init__(self, listener: str, handle: Callable[..., Any]) -> None:
            assert listener == "listener"
            found.handlers.append(handle)

        def serve_forever(self) -> None: ...

    monkeypatch.setattr(module, "_start", start)
    monkeypatch.setattr(module, "HostServer", Server)
    monkeypatch.setattr(_local_model, "MaskedModel", open_model)
    monkeypatch.setattr(cloister.federation, "read_adapter", lambda plan, key: b"adapter by " + key)
    return found


@pytest.fixture
def handle(parts: SimpleNamespace) -> Any:
    """The handler of an enclave that answers, which is told to stop at the end."""
    thread = threading.Thread(target=module._answer, args=(None, "alpha", None, "unix:/a", parts.events), daemon=True)
    thread.start()
    end = time.monotonic() + LONG
    while not parts.handlers and time.monotonic() < end:
        time.sleep(0.005)
    [found] = parts.handlers
    yield found
    assert found("stop", {}) == {}
    thread.join(LONG)
    assert not thread.is_alive() and parts.model.is_closed


def test_it_answers_with_the_adapter_that_it_kept(parts: SimpleNamespace, handle: Callable[..., Any]) -> None:
    assert handle("status", {}) == {"serving": True}
    questions = {"texts": ["a", ["b", "c"]], "max_new_tokens": 3}
    assert handle("ask", questions) == {"answers": [{"label": "red"}]}
    assert parts.model.asked == [(b"adapter by " + b"client".ljust(32, b"."), ["a", ("b", "c")], 3)]
    assert parts.with_data is False and parts.opened[0][1]["with_data"] is False
    assert parts.events.said == ["ready"]


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("train", {"texts": [], "max_new_tokens": 1}),
        ("ask", {}),
        ("ask", {"texts": "a", "max_new_tokens": 1}),
        ("ask", {"texts": ["a"], "max_new_tokens": "1"}),
        ("ask", {"texts": ["a"] * (module.MAX_TEXTS + 1), "max_new_tokens": 1}),
    ],
    ids=["another call", "nothing", "no list", "no number", "too many"],
)
def test_anything_else_is_refused(
    parts: SimpleNamespace, handle: Callable[..., Any], method: str, body: dict[str, Any]
) -> None:
    with pytest.raises(MalformedMessageError, match=method):
        handle(method, body)
    assert parts.model.asked == []


def test_it_takes_part_until_it_is_told_to_stop(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Work:
        def __init__(self, plan: Any, load: Callable[[], Any], key: bytes) -> None:
            made.update(plan=plan, load=load, key=key)

    class Run:
        handle = "the run's handler"

        def __init__(self, plan: Any, work: Any, **options: Any) -> None:
            made.update(work=work, **options)

        def wait_for_stop(self) -> None:
            made["waited"] = True

    monkeypatch.setattr(cloister.federation, "AdapterWork", Work)
    monkeypatch.setattr(cloister.federation, "ClientRun", Run)
    module._take_part(RunFolder(Path("/r")), "alpha", Path("/s"), "unix:/a", parts.events)  # type: ignore[arg-type]
    assert parts.with_data is True and made["waited"] and parts.handlers == ["the run's handler"]
    assert made["key"] == b"client".ljust(32, b".") and isinstance(made["work"], Work)
    assert parts.opened == [], "nothing is loaded before the server enclave asks for it"
    assert made["load"]() is parts.model and parts.opened[0][0] == (made["plan"], "port")
    assert parts.events.said == ["ready"]
