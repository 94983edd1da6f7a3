"""The server's courier: asks the server enclave what to send, sends it over Flower, brings the answers back.

Holds no secret, opens nothing, decides nothing; may be killed at any time. One message per client is under way at most,
and no client's slowness holds up another's messages.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cloister._files import write_whole
from cloister.enclave import host_call
from cloister.errors import CloisterError, EnclaveError, ShardMismatchError, StoreError, StoreFullError

from ._courier_client import RECORD

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid, ServerApp

_log = logging.getLogger(__name__)

HOST_TIMEOUT_S = 120.0
POLL_S = 0.2
RETRY_S = 0.5
NODES_EVERY_S = 2.0
HELLO_TIMEOUT_S = 60.0
N_DELIVERY_TRIES = 3
N_FETCH_TRIES = 5
SUPERLINK_LOSS_S = 20.0
"""How long answers may still come after the SuperLink was killed: a client's patience and some."""

ANSWER_MARGIN_S = 10.0
"""Added to a message's own time for the way there and back, before it is given up."""


class Post(Protocol):
    """What the courier needs of Flower, in bytes and names only."""

    def online(self) -> set[int]:
        """Ids of the nodes that are there."""
        ...

    def push(self, node_id: int, fields: Mapping[str, bytes | float]) -> str | None:
        """Sends; returns the message's id, or None if it was not taken."""
        ...

    def pull(self, message_ids: Iterable[str]) -> list[tuple[str, dict[str, object], str]]:
        """Answers that have come: (id of the question, fields, error)."""
        ...


class FlowerPost:
    """`Post` over Flower's grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def push(self, node_id: int, fields: Mapping[str, bytes | float]) -> str | None:
        from flwr.app import ConfigRecord, Message, RecordDict

        content = RecordDict({RECORD: ConfigRecord(dict(fields))})
        message = Message(content, dst_node_id=node_id, message_type=f"query.{RECORD}")
        return next(iter(self._grid.push_messages([message])), None) or None

    def pull(self, message_ids: Iterable[str]) -> list[tuple[str, dict[str, object], str]]:
        return [_fields_of(message) for message in self._grid.pull_messages(list(message_ids))]


def _fields_of(message: Message) -> tuple[str, dict[str, object], str]:
    question = message.metadata.reply_to_message_id
    if message.has_error():
        return question, {}, f"flower.{message.error.code}"
    record = message.content.get(RECORD)
    return question, dict(record) if record is not None else {}, ""


@dataclass
class _Node:
    node_id: int | None
    n_losses: int = 0


@dataclass
class _Sent:
    client: str
    attempt: int
    deadline: float
    node: _Node


class ServerCourier:
    """The loop of the ServerApp.

    Args:
        call: asks the server enclave: (method, body) -> answer.
        state: folder shared with `Relay`: `nodes.json` in, `done` and `failure.json` out.
    """

    def __init__(
        self,
        post: Post,
        call: Callable[[str, Mapping[str, object]], dict[str, Any]],
        state: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._post = post
        self._call = call
        self._state = state
        self._clock = clock
        self._sleep = sleep
        self._nodes: dict[str, _Node] = {}
        self._nodes_stamp = 0
        self._n_superlink_losses = 0
        self._online: set[int] = set()
        self._online_at = float("-inf")
        self._queue: dict[str, dict[str, Any]] = {}
        self._sent: dict[str, _Sent] = {}
        self._hellos: dict[str, tuple[int, float]] = {}
        self._fetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._fetching: set[str] = set()
        self._fetch_tries: dict[str, int] = {}

    def run(self) -> None:
        """Carries messages until the server enclave says that the run is over."""
        while True:
            self._look_at_nodes()
            self._collect()
            plan = self._ask()
            if plan is None:
                self._sleep(RETRY_S)
                continue
            if plan.get("done") is True:
                write_whole(self._state / "done", b"")
                return
            for send in plan.get("send", []):
                self._queue[send["client"]] = send
            self._flush()
            self._fetch(plan)
            wait_s = plan.get("wait_s")
            self._sleep(min(max(float(wait_s), 0.05), 5.0) if isinstance(wait_s, (int, float)) else POLL_S)

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _look_at_nodes(self) -> None:
        self._read_nodes()
        waits = any(self._node_id(client) not in self._online for client in self._queue)
        if self._clock() - self._online_at < (RETRY_S if waits or not self._online else NODES_EVERY_S):
            return
        self._online = self._post.online()
        self._online_at = self._clock()
        self._greet_strangers()

    def _read_nodes(self) -> None:
        """Takes over what the relay knows: ids of registered nodes, and which went down since."""
        path = self._state / "nodes.json"
        try:
            stamp = path.stat().st_mtime_ns
            if stamp == self._nodes_stamp:
                return
            known = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return  # no relay of ours beside us: nodes say who they are
        self._nodes_stamp = stamp
        if known["superlink_losses"] != self._n_superlink_losses:
            # An answer that was on its way through it may be gone. To ask again is harmless, to wait on is slow.
            self._n_superlink_losses = known["superlink_losses"]
            for sent in self._sent.values():
                sent.deadline = min(sent.deadline, self._clock() + SUPERLINK_LOSS_S)
        for client, entry in known["nodes"].items():
            old = self._nodes.get(client)
            node_id, n_losses = entry["id"], entry["losses"]
            if node_id is None and old is not None and old.n_losses == n_losses:
                node_id = old.node_id  # what the node said itself; after a loss it is another node
            if old is None or (node_id, n_losses) != (old.node_id, old.n_losses):
                self._nodes[client] = _Node(node_id, n_losses)

    def _greet_strangers(self) -> None:
        """Asks nodes that nobody has named for their client's name. A false name does no harm: the handshake tells."""
        if self._nodes and all(node.node_id is not None for node in self._nodes.values()):
            return
        now = self._clock()
        self._hellos = {k: v for k, v in self._hellos.items() if v[1] > now and v[0] in self._online}
        known = {node.node_id for node in self._nodes.values()} | {node_id for node_id, _ in self._hellos.values()}
        for node_id in self._online - known:
            message_id = self._post.push(node_id, {"timeout_s": HELLO_TIMEOUT_S})
            if message_id is not None:
                self._hellos[message_id] = (node_id, now + HELLO_TIMEOUT_S)

    def _node_id(self, client: str) -> int | None:
        node = self._nodes.get(client)
        return node.node_id if node is not None else None

    # --- messages ---------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Sends what waits for a node that is there now."""
        now = self._clock()
        for client, send in list(self._queue.items()):
            node = self._nodes.get(client)
            if node is None or node.node_id is None or node.node_id not in self._online:
                continue
            del self._queue[client]
            # The enclave hands out a message anew only when it has given up the last one.
            self._sent = {k: sent for k, sent in self._sent.items() if sent.client != client}
            timeout_s = float(send["timeout_s"])
            message_id = self._post.push(node.node_id, {"blob": send["blob"], "timeout_s": timeout_s})
            if message_id is None:
                self._deliver(client, send["attempt"], None, "unsent")
                continue
            self._sent[message_id] = _Sent(client, send["attempt"], now + timeout_s + ANSWER_MARGIN_S, node)

    def _collect(self) -> None:
        """Brings answers to the enclave, and word of those that will not come."""
        waiting = [*self._sent, *self._hellos]
        for message_id, fields, error in self._post.pull(waiting) if waiting else []:
            if message_id in self._hellos:
                self._learn_name(self._hellos.pop(message_id)[0], fields)
            elif message_id in self._sent:
                sent = self._sent.pop(message_id)
                blob = fields.get("blob")
                code = error or str(fields.get("error", "empty"))
                sealed = blob if isinstance(blob, bytes) else None
                if error:
                    self._suspect(sent.node)
                self._deliver(sent.client, sent.attempt, sealed, None if sealed is not None else code)
        now = self._clock()
        for message_id, sent in list(self._sent.items()):
            lost = self._nodes.get(sent.client) != sent.node
            if lost or now > sent.deadline:
                del self._sent[message_id]
                self._suspect(sent.node)
                self._deliver(sent.client, sent.attempt, None, "lost" if lost else "timeout")

    def _suspect(self, node: _Node) -> None:
        """Looks again whether the node is there before anything else is sent to it."""
        self._online.discard(node.node_id or 0)
        self._online_at = float("-inf")

    def _learn_name(self, node_id: int, fields: Mapping[str, object]) -> None:
        client = fields.get("client")
        if isinstance(client, str) and client:
            old = self._nodes.get(client)
            self._nodes[client] = _Node(node_id, old.n_losses if old is not None else 0)

    # --- the enclave ------------------------------------------------------------------------------------------------

    def _ask(self) -> dict[str, Any] | None:
        there = [client for client, node in self._nodes.items() if node.node_id in self._online]
        try:
            return self._call("poll", {"nodes": there, "carrying": self._carrying()})
        except CloisterError as error:
            # It is being started again, or about to be: whoever started it watches it.
            _log.info("the server enclave does not answer: %s", error.cause)
            return None

    def _carrying(self) -> list[str]:
        """Clients whose message is in this courier's hands. The enclave hands out anew whatever else it had given."""
        return sorted({*self._queue, *(sent.client for sent in self._sent.values())})

    def _deliver(self, client: str, attempt: int, blob: bytes | None, error: str | None) -> None:
        body = {"client": client, "attempt": attempt, "blob": blob, "error": error}
        if error is not None:
            _log.warning("no answer from client %s: %s", client, error)
        for _ in range(N_DELIVERY_TRIES):
            try:
                self._call("deliver", body)
            except EnclaveError:
                self._sleep(RETRY_S)
            except CloisterError as refused:
                _log.warning("the server enclave refused an answer of client %s: %s", client, refused.code)
                return
            else:
                return

    # --- shards -----------------------------------------------------------------------------------------------------

    def _fetch(self, plan: Mapping[str, Any]) -> None:
        """Starts copying the shards that the enclave misses from the store into its inbox."""
        for name in plan.get("fetch", []):
            if name not in self._fetching:
                self._fetching.add(name)
                self._fetcher.submit(self._fetch_one, name, plan)

    def _fetch_one(self, name: str, plan: Mapping[str, Any]) -> None:
        from cloister.train import open_store

        inbox = Path(plan["inbox"])
        try:
            if not (inbox / name).exists():
                open_store(plan["store"], **plan.get("store_options", {})).fetch(name, inbox)
        except StoreError as error:
            self._fetch_failed(name, error)
        finally:
            self._fetching.discard(name)

    def _fetch_failed(self, name: str, error: StoreError) -> None:
        """A store may be away for a moment; a full disk and an altered shard stay so."""
        self._fetch_tries[name] = self._fetch_tries.get(name, 0) + 1
        _log.warning("cannot fetch shard %s: %s", name, error.cause)
        if isinstance(error, (ShardMismatchError, StoreFullError)) or self._fetch_tries[name] >= N_FETCH_TRIES:
            failure = {"code": error.code, "cause": error.cause, "hint": error.hint}
            write_whole(self._state / "failure.json", json.dumps(failure).encode())
        else:
            self._sleep(RETRY_S)


def make_app() -> ServerApp:
    """The ServerApp of Flower's app bundle."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def carry(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        place = str(context.run_config.get("cloister-socket") or os.environ["CLOISTER_SERVER_SOCKET"])

        def call(method: str, body: Mapping[str, object]) -> dict[str, Any]:
            return host_call(place, method, body, timeout_s=HOST_TIMEOUT_S)

        ServerCourier(FlowerPost(grid), call, Path(os.environ["CLOISTER_RELAY_STATE"])).run()

    return app
