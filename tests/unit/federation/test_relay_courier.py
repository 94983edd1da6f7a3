"""The couriers, against doubles of Flower and of the processes beside them."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloister.enclave import HostServer, bind_host_socket
from cloister.errors import EnclaveError, PolicyRejectedError, StoreError, error_for_code
from cloister.federation import _courier_client, _courier_server
from cloister.federation._courier_client import answer_message
from cloister.federation._courier_server import ServerCourier


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, s: float) -> None:
        self.now += s


class FakePost:
    """Flower as the courier sees it. `answers` maps a node to what it answers with: fields, an error, or silence."""

    def __init__(self, answers: Mapping[int, Any]) -> None:
        self.answers = dict(answers)
        self.there = set(answers)
        self.pushed: list[tuple[int, dict[str, Any]]] = []

    def online(self) -> set[int]:
        return set(self.there)

    def push(self, node_id: int, fields: Mapping[str, bytes | float]) -> str | None:
        self.pushed.append((node_id, dict(fields)))
        return str(len(self.pushed) - 1)

    def pull(self, message_ids: Any) -> list[tuple[str, dict[str, object], str]]:
        found = []
        for message_id in message_ids:
            node_id, fields = self.pushed[int(message_id)]
            answer = self.answers[node_id]
            if callable(answer):
                answer = answer(fields)
            if isinstance(answer, str):
                found.append((message_id, {}, answer))
            elif answer is not None:
                found.append((message_id, answer, ""))
        return found


class FakeEnclave:
    """Hands out each message until it is answered, as the real one does; done when all are."""

    def __init__(self, messages: Mapping[str, list[bytes]], **plan: Any) -> None:
        self.waiting = {client: list(blobs) for client, blobs in messages.items()}
        self.in_flight: set[str] = set()
        self.delivered: list[tuple[str, bytes | None, str | None]] = []
        self.carried: list[list[str]] = []
        self.plan = plan
        self.n_polls = 0
        self.max_polls = 400
        self.is_away = 0
        self.n_unheard = 0

    def __call__(self, method: str, body: Mapping[str, object]) -> dict[str, Any]:
        if self.is_away:
            self.is_away -= 1
            raise EnclaveError("not there")
        answer = self._poll(body) if method == "poll" else self._deliver(body)
        if method == "poll" and self.n_unheard:
            self.n_unheard -= 1
            raise EnclaveError("it answered too late")
        return answer

    def _poll(self, body: Mapping[str, object]) -> dict[str, Any]:
        self.n_polls += 1
        self.carried.append(body["carrying"])  # type: ignore[arg-type]
        self.in_flight.intersection_update(self.carried[-1])
        send = []
        for client, blobs in self.waiting.items():
            if blobs and client not in self.in_flight:
                self.in_flight.add(client)
                send.append({"client": client, "attempt": 0, "blob": blobs[0], "timeout_s": 60.0})
        done = not any(self.waiting.values()) or self.n_polls >= self.max_polls
        return {"send": send, "fetch": [], "done": done, "wait_s": 0.2, **self.plan}

    def _deliver(self, body: Mapping[str, object]) -> dict[str, Any]:
        client, blob = str(body["client"]), body["blob"]
        self.in_flight.discard(client)
        self.delivered.append((client, blob, body["error"]))  # type: ignore[arg-type]
        if blob is not None:
            self.waiting[client].pop(0)
        return {}


def write_nodes(state: Path, *, superlink_losses: int = 0, **nodes: tuple[int | None, int]) -> None:
    entries = {name: {"id": node_id, "losses": losses} for name, (node_id, losses) in nodes.items()}
    known = {"nodes": entries, "superlink_losses": superlink_losses}
    (state / "nodes.json").write_text(json.dumps(known), encoding="utf-8")


def echo(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"blob": fields["blob"] + b"!"}


def run(post: FakePost, enclave: FakeEnclave, state: Path, clock: Clock | None = None) -> None:
    clock = clock or Clock()
    ServerCourier(post, enclave, state, clock=clock, sleep=clock.sleep).run()


def test_it_carries_every_message_and_says_when_it_is_done(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0), b=(2, 0))
    enclave = FakeEnclave({"a": [b"a0", b"a1"], "b": [b"b0"]})
    run(FakePost({1: echo, 2: echo}), enclave, tmp_path)
    assert sorted(enclave.delivered) == [("a", b"a0!", None), ("a", b"a1!", None), ("b", b"b0!", None)]
    assert (tmp_path / "done").exists()
    assert enclave.carried[0] == [], "it carries what nobody has given it"


def test_a_silent_client_holds_up_nobody_and_is_given_up_in_the_end(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0), b=(2, 0))
    enclave = FakeEnclave({"a": [b"a0"], "b": [b"b0", b"b1", b"b2"]})
    run(FakePost({1: lambda _: None, 2: echo}), enclave, tmp_path)
    assert [d for d in enclave.delivered if d[0] == "b"] == [
        ("b", b"b0!", None),
        ("b", b"b1!", None),
        ("b", b"b2!", None),
    ]
    assert ("a", None, "timeout") in enclave.delivered
    assert ["a"] in enclave.carried, "the enclave cannot know that it is still under way"


def test_a_node_that_went_down_loses_its_message_at_once(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0))
    clock, enclave = Clock(), FakeEnclave({"a": [b"a0"]})

    def goes_down(fields: Mapping[str, Any]) -> Any:
        if len(post.pushed) > 1:
            return echo(fields)
        if clock.now > 3:
            write_nodes(tmp_path, a=(1, 1))
        return None

    post = FakePost({1: goes_down})
    run(post, enclave, tmp_path, clock)
    assert enclave.delivered == [("a", None, "lost"), ("a", b"a0!", None)]
    assert [fields["blob"] for _, fields in post.pushed] == [b"a0", b"a0"]  # the same ciphertext, unchanged
    assert clock.now < 10


def test_after_a_killed_superlink_it_does_not_wait_long(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0))
    clock, enclave = Clock(), FakeEnclave({"a": [b"a0"]})

    def forgets(fields: Mapping[str, Any]) -> Any:
        if clock.now > 1:
            write_nodes(tmp_path, superlink_losses=1, a=(1, 0))
        return echo(fields) if len(post.pushed) > 1 else None

    post = FakePost({1: forgets})
    run(post, enclave, tmp_path, clock)
    assert enclave.delivered == [("a", None, "timeout"), ("a", b"a0!", None)]
    assert 20 < clock.now < 30


def test_a_message_in_an_answer_that_came_too_late_is_handed_out_again_at_once(tmp_path: Path) -> None:
    """A server enclave that takes long to start: the first polls wait for it in vain, and it answers them all."""
    write_nodes(tmp_path, a=(1, 0))
    clock, enclave = Clock(), FakeEnclave({"a": [b"a0", b"a1"]})
    enclave.n_unheard = 2
    run(FakePost({1: echo}), enclave, tmp_path, clock)
    assert enclave.delivered == [("a", b"a0!", None), ("a", b"a1!", None)]
    assert clock.now < 5


def test_it_waits_for_a_node_that_is_not_there_yet(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0))
    enclave = FakeEnclave({"a": [b"a0"]})
    clock, post = Clock(), FakePost({1: echo})
    online = post.online
    post.online = lambda: online() if clock.now > 5 else set()  # type: ignore[method-assign]
    run(post, enclave, tmp_path, clock)
    assert enclave.delivered == [("a", b"a0!", None)]
    assert clock.now < 7


def test_it_asks_nodes_for_their_names_where_nobody_knows_them(tmp_path: Path) -> None:
    def stranger(name: str) -> Any:
        return lambda fields: echo(fields) if "blob" in fields else {"client": name}

    enclave = FakeEnclave({"a": [b"a0"], "b": [b"b0"]})
    run(FakePost({7: stranger("a"), 8: stranger("b")}), enclave, tmp_path)
    assert sorted(enclave.delivered) == [("a", b"a0!", None), ("b", b"b0!", None)]


def test_a_node_that_comes_back_as_another_is_asked_again(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(None, 0))
    clock, enclave = Clock(), FakeEnclave({"a": [b"a0"]})

    def first(fields: Mapping[str, Any]) -> Any:
        if "blob" not in fields:
            return {"client": "a"}
        write_nodes(tmp_path, a=(None, 1))
        post.there = {8}
        post.answers[8] = lambda fields: echo(fields) if "blob" in fields else {"client": "a"}
        return None

    post = FakePost({7: first})
    run(post, enclave, tmp_path, clock)
    assert enclave.delivered == [("a", None, "lost"), ("a", b"a0!", None)]


@pytest.mark.parametrize(
    ("answer", "code"),
    [("flower.8", "flower.8"), ({"error": "enclave"}, "enclave"), ({}, "empty"), ({"blob": 3}, "empty")],
)
def test_what_is_not_an_answer_is_told_as_none(tmp_path: Path, answer: Any, code: str) -> None:
    write_nodes(tmp_path, a=(1, 0))
    enclave = FakeEnclave({"a": [b"a0"]})
    enclave.max_polls = 20
    run(FakePost({1: answer}), enclave, tmp_path)
    assert enclave.delivered[0] == ("a", None, code)


def test_it_outlives_a_restart_of_the_server_enclave(tmp_path: Path) -> None:
    write_nodes(tmp_path, a=(1, 0))
    enclave = FakeEnclave({"a": [b"a0"]})
    enclave.is_away = 20
    run(FakePost({1: echo}), enclave, tmp_path)
    assert enclave.delivered == [("a", b"a0!", None)]


def put_shard(store: Path, content: bytes) -> str:
    name = hashlib.sha256(content).hexdigest()
    store.mkdir(exist_ok=True)
    (store / name).write_bytes(content)
    return name


def test_it_fetches_what_the_enclave_misses(tmp_path: Path) -> None:
    inbox, store = tmp_path / "inbox", tmp_path / "store"
    inbox.mkdir()
    name = put_shard(store, b"ciphertext")
    enclave = FakeEnclave({}, fetch=[name], inbox=str(inbox), store=str(store), store_options={})
    enclave.waiting = {"nobody": [b""]}
    clock = Clock()
    courier = ServerCourier(FakePost({}), enclave, tmp_path, clock=clock, sleep=clock.sleep)
    enclave.max_polls = 3
    courier.run()
    courier._fetcher.shutdown(wait=True)
    assert (inbox / name).read_bytes() == b"ciphertext"
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize("content", [None, b"altered"])
def test_a_shard_that_is_not_there_or_altered_ends_the_relay_with_its_name(
    tmp_path: Path, content: bytes | None
) -> None:
    inbox, store = tmp_path / "inbox", tmp_path / "store"
    inbox.mkdir()
    name = put_shard(store, b"ciphertext")
    (store / name).unlink() if content is None else (store / name).write_bytes(content)
    plan = {"inbox": str(inbox), "store": str(store), "store_options": {}}
    courier = ServerCourier(FakePost({}), FakeEnclave({}), tmp_path, clock=Clock(), sleep=lambda s: None)
    for _ in range(_courier_server.N_FETCH_TRIES):
        courier._fetch_one(name, plan)
    failure = json.loads((tmp_path / "failure.json").read_text(encoding="utf-8"))
    assert name in failure["cause"]
    assert issubclass(error_for_code(failure["code"]), StoreError)
    assert not list(inbox.iterdir())


# --- the client's courier -----------------------------------------------------------------------------------------


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """pytest's own folders are too deep for the 107 bytes of a Unix socket's path."""
    with tempfile.TemporaryDirectory(prefix="cl-") as folder:
        yield Path(folder)


def serve(path: Path, handler: Any) -> HostServer:
    server = HostServer(bind_host_socket(path), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_the_client_courier_hands_over_and_brings_back(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def handler(method: str, body: dict[str, Any]) -> dict[str, Any]:
        seen.append((method, body))
        return {"blob": b"answer"}

    server = serve(short_dir / "c", handler)
    monkeypatch.setenv("CLOISTER_CLIENT_SOCKET", str(short_dir / "c"))
    assert answer_message({"blob": b"question", "timeout_s": 5.0}, {}) == {"blob": b"answer"}
    assert answer_message({"blob": b"question"}, {"cloister-socket": str(short_dir / "c")}) == {"blob": b"answer"}
    assert seen == [("request", {"blob": b"question"})] * 2
    server.close()


def test_it_says_whose_courier_it_is() -> None:
    assert answer_message({}, {"cloister-client": "hospital-a"}) == {"client": "hospital-a"}


def test_only_the_code_of_an_error_goes_back(short_dir: Path) -> None:
    def handler(method: str, body: dict[str, Any]) -> dict[str, Any]:
        raise PolicyRejectedError("this names a patient")

    server = serve(short_dir / "c", handler)
    answer = answer_message({"blob": b"q"}, {"cloister-socket": str(short_dir / "c")})
    assert answer == {"error": "attest.policy"}
    server.close()


def test_it_waits_for_a_client_process_that_is_being_restarted(short_dir: Path) -> None:
    clock, servers = Clock(), []

    def sleep(s: float) -> None:
        clock.sleep(s)
        if clock.now > 2 and not servers:
            servers.append(serve(short_dir / "c", lambda method, body: {"blob": b"back"}))

    place = {"cloister-socket": str(short_dir / "c")}
    assert answer_message({"blob": b"q", "timeout_s": 10.0}, place, sleep=sleep, clock=clock) == {"blob": b"back"}
    servers[0].close()


def test_it_gives_up_in_time(short_dir: Path) -> None:
    clock = Clock()
    place = {"cloister-socket": str(short_dir / "c")}
    answer = answer_message({"blob": b"q", "timeout_s": 3.0}, place, sleep=clock.sleep, clock=clock)
    assert answer == {"error": "enclave"}
    assert clock.now <= 3.0
    assert _courier_client.RETRY_S < 1
