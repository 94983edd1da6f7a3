"""The untrusted relay of one run on this machine: SuperLink, SuperNodes and couriers, started, watched and taken down.

Nothing here is trusted with more than delivery. Whatever is killed is started again, and where a message was lost with
it, the server's courier is told (`state/nodes.json`), so that the same ciphertext goes out once more at once:

    SuperLink      starts again on its database; couriers and SuperNodes wait for it, nothing is lost
    SuperNode      starts again under the same key; what it carried is lost
    SuperExec      starts again with its SuperNode, or alone at the server
    ServerApp      the Flower run is stopped and submitted anew; a new courier gets everything from the server enclave
    ClientApp      its SuperNode starts again: it would wait for an answer for a minute
    keeper         everything starts again
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister._files import write_whole
from cloister.errors import RelayError, error_for_code

from ._deactivate import NO_SUCH_CALL, ONLINE_S
from ._deaths import Deaths
from ._flower import APP_FOLDER, ClientEndpoint, FlowerSetup, free_port, json_in, require_free
from ._keeper_link import KeeperLink

__all__ = ["ClientEndpoint", "Relay"]

START_TIMEOUT_S = 60.0
APP_TIMEOUT_S = 60.0
"""How long a submitted run may take until its ServerApp runs, before it is submitted again."""

RETRY_S, SUBMIT_RETRY_S = 1.0, 3.0
_N_REGISTER_TRIES = 3
_N_PORT_TRIES = 5
_SUPERLINK, _SERVER_SUPEREXEC, _SERVERAPP = "superlink", "server-superexec", "serverapp"


@dataclass
class _Node:
    """A client's SuperNode with its SuperExec.

    Attributes:
        node_id: what the SuperLink calls it; None until registered, or where TLS and with it node keys are off.
        n_losses: how often it went down; told to the server's courier.
        state: "up"; "down" (waits for `retry_at`); "leaving" (the SuperLink is being told that it is gone); "gone" (the
            SuperLink has been told, or will have forgotten it at `retry_at`).
        n_refusals: failed registrations.
    """

    name: str
    node_id: int | None = None
    n_losses: int = 0
    state: str = "down"
    retry_at: float = 0.0
    n_refusals: int = 0


class Relay:
    """Starts and supervises the relay of one run.

    Args:
        run_dir: folder of the relay inside the run's: logs, the SuperLink's database (ciphertext), state files.
        clients: by name.
        server_socket: host port of the server enclave.
        tls: encrypt the relay's own hops and let in registered node keys only. Off only to record its traffic.
        host, port: where the SuperLink listens; None takes a free port.
        on_event: told of restarts: {"event": "restart", "process": name, "attempt": n}.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        clients: Mapping[str, ClientEndpoint],
        server_socket: Path,
        tls: bool = True,
        host: str = "127.0.0.1",
        port: int | None = None,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        self._run_dir = run_dir.absolute()
        self._clients = dict(clients)
        self._server_socket = server_socket
        self._use_tls = tls
        self._host = host
        self._port = port
        self._private: Path | None = None
        self._setup_: FlowerSetup | None = None
        self._keeper_: KeeperLink | None = None
        self._n_superlink_losses = 0
        self._deaths = Deaths(on_event, self._run_dir / "logs")
        self._forget()

    def _forget(self) -> None:
        """State of the processes, as before the first start."""
        self._nodes = {name: _Node(name) for name in self._clients}
        self._jobs: set[str] = set()
        self._flower_run = ""
        self._app_state = "none"  # "submitting", "submitted", "running", "stopping"
        self._app_deadline = 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Relay:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Brings the relay up: returns once the SuperLink serves, the nodes are registered and the run is submitted.

        Raises:
            RelayError: it cannot be brought up, or the given port is taken. Nothing is left running then.
        """
        if self._port is not None:
            require_free(self._host, self._port)
        try:
            self._private = Path(tempfile.mkdtemp(prefix="cloister-relay-"))
            self._setup_ = FlowerSetup(
                self._run_dir,
                self._private,
                clients=self._clients,
                server_socket=self._server_socket,
                tls=self._use_tls,
                host=self._host,
                port=self._port or free_port(self._host),
            )
            self._bring_up()
        except BaseException:
            self.stop()
            raise

    def poll(self) -> None:
        """One look at everything, without waiting: starts again what died.

        Raises:
            RelayError: something dies again and again.
            CloisterError: the server's courier cannot fetch shards from the store.
        """
        if self._keeper_ is None:
            return
        if not self._keeper.is_alive:
            self._bring_up_again()
            return
        self._pump()
        self._raise_courier_failure()
        now = time.monotonic()
        for node in self._nodes.values():
            if node.state in ("down", "gone") and now >= node.retry_at:
                self._start_node(node)
        if self._app_state != "running" and now > self._app_deadline and not self.is_done:
            self._deaths.count("submission")
            self._restart_app()

    def stop(self) -> None:
        """Takes everything down; when it returns, no process is left. Safe to call twice, and after a failed start."""
        if self._keeper_ is not None:
            self._keeper_.close()
            self._keeper_ = None
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def processes(self) -> dict[str, list[int]]:
        """Process ids by role: keeper, superlink, server-superexec, serverapp, and for each client supernode-NAME,
        superexec-NAME and, while it carries a message, clientapp-NAME."""
        if self._keeper_ is None:
            return {}
        self._pump()
        found = {name: [pid] for name, pid in self._keeper.pids.items() if name not in self._jobs}
        return {"keeper": [self._keeper.pid], **found} if self._keeper.is_alive else {}

    @property
    def is_done(self) -> bool:
        """Whether the server enclave has told its courier that the run is over."""
        return self._setup_ is not None and (self._setup_.state / "done").exists()

    @property
    def address(self) -> str:
        """Where the SuperLink listens, as host:port."""
        return self._setup.address

    # --- bringing up --------------------------------------------------------------------------------------------

    @property
    def _setup(self) -> FlowerSetup:
        if self._setup_ is None:
            raise RelayError("the relay is not started")
        return self._setup_

    @property
    def _keeper(self) -> KeeperLink:
        if self._keeper_ is None:
            raise RelayError("the relay is not started")
        return self._keeper_

    def _bring_up(self) -> None:
        setup = self._setup
        if self._private is None:
            raise RelayError("the relay is not started")
        (self._private / "apps").unlink(missing_ok=True)
        self._keeper_ = KeeperLink(self._private, env=setup.keeper_env(), log=Path(setup.log("keeper")))
        self._keeper.wait_until_ready()
        self._start_superlink()
        if not self._superlink_serves(wait_s=START_TIMEOUT_S):
            raise RelayError("the SuperLink did not come up", hint=f"see {setup.log(_SUPERLINK)}")
        self._register_nodes()
        self._start_server_superexec()
        for node in self._nodes.values():
            self._start_node(node)
        self._restart_app()

    def _bring_up_again(self) -> None:
        """After the keeper was killed, and everything with it. The SuperLink's database is still there."""
        self._deaths.count("keeper")
        self._keeper.close()
        known = {name: (node.node_id, node.n_losses + 1) for name, node in self._nodes.items()}
        flower_run = self._flower_run
        self._forget()
        for name, (node_id, n_losses) in known.items():
            self._nodes[name].node_id, self._nodes[name].n_losses = node_id, n_losses
        # Has to be stopped: a node waits for the rest of a message that its ServerApp had not sent whole.
        self._flower_run = flower_run
        self._bring_up()

    def _start_superlink(self) -> None:
        setup = self._setup
        self._keeper.start(_SUPERLINK, setup.superlink(), env=setup.env(), log=setup.log(_SUPERLINK))

    def _start_server_superexec(self) -> None:
        setup = self._setup
        app = {"name": _SERVERAPP, "env": setup.serverapp_env(), "log": setup.log(_SERVERAPP)}
        env = setup.superexec_env(None, _SERVER_SUPEREXEC, "flwr-serverapp")
        self._keeper.start(_SERVER_SUPEREXEC, setup.server_superexec(), env=env, log=setup.log(_SERVER_SUPEREXEC),
                           apps={"flwr-serverapp": app})  # fmt: skip

    def _superlink_serves(self, *, wait_s: float) -> bool:
        """Waits until our SuperLink answers; where its port was snatched away, takes another one."""
        deadline = time.monotonic() + wait_s
        n_ports = 1
        while time.monotonic() < deadline and self._keeper.is_alive:
            for event in self._keeper.take_events():
                if event["event"] == "exit" and event["name"] == _SUPERLINK:
                    if self._port is not None or n_ports == _N_PORT_TRIES:
                        return False
                    n_ports += 1
                    self._setup.use_port(free_port(self._host))
                    self._start_superlink()
            if self._setup.superlink_answers():
                return True
            time.sleep(0.05)
        return False

    def _register_nodes(self) -> None:
        """Tells the SuperLink the node keys that may log in, and learns the ids it gives them."""
        setup = self._setup
        if setup.tls is None:
            return
        for node in self._nodes.values():
            if node.node_id is None:
                self._start_job(f"register-{node.name}", setup.register(node.name))
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(node.node_id is None for node in self._nodes.values()):
            self._pump()
            if time.monotonic() > deadline or not self._keeper.is_alive:
                raise RelayError("the SuperLink did not register the nodes", hint=f"see {setup.log('control')}")
            time.sleep(0.02)

    def _start_node(self, node: _Node) -> None:
        setup = self._setup
        if node.n_losses and node.node_id is not None and node.state == "down":
            node.state = "leaving"
            self._start_job(f"deactivate-{node.name}", setup.deactivate(node.name, node.node_id))
            return
        node.state = "up"
        self._write_nodes()
        port = free_port()
        name, superexec = f"supernode-{node.name}", f"superexec-{node.name}"
        app = {"name": f"clientapp-{node.name}", "env": setup.clientapp_env(node.name),
               "log": setup.log(f"clientapp-{node.name}"), "guard": str(APP_FOLDER)}  # fmt: skip
        self._keeper.start(name, setup.supernode(node.name, port), env=setup.env(node.name), log=setup.log(name))
        env = setup.superexec_env(node.name, superexec, "flwr-clientapp")
        self._keeper.start(superexec, setup.client_superexec(port), env=env, log=setup.log(superexec),
                           apps={"flwr-clientapp": app})  # fmt: skip

    def _restart_app(self) -> None:
        """Submits the Flower run; the one before it, if any, is stopped first."""
        self._app_deadline = time.monotonic() + APP_TIMEOUT_S
        if self._flower_run:
            self._app_state = "stopping"
            self._start_job("stop", self._setup.stop_app(self._flower_run))
            self._flower_run = ""
        else:
            self._app_state = "submitting"
            self._start_job("run", self._setup.run_app())

    def _start_job(self, name: str, argv: list[str]) -> None:
        self._jobs.add(name)
        self._keeper.start(name, argv, env=self._setup.env(), log=self._setup.log("control"), is_job=True)

    # --- what happened --------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        for event in self._keeper.take_events():
            if event["event"] == "started" and event["name"] == _SERVERAPP:
                self._app_state = "running"
            elif event["event"] == "exit":
                self._on_exit(event["name"], event["code"], event["output"])

    def _on_exit(self, name: str, code: int, output: str) -> None:
        if name in self._jobs:
            self._on_job_exit(name, code, output)
        elif name == _SUPERLINK:
            self._deaths.count(name)
            self._n_superlink_losses += 1
            self._start_superlink()
            self._write_nodes()
        elif name == _SERVER_SUPEREXEC:
            self._deaths.count(name)
            self._start_server_superexec()
        elif name == _SERVERAPP:
            self._on_serverapp_exit()
        else:
            self._on_client_exit(name, code)

    def _on_serverapp_exit(self) -> None:
        if self.is_done:
            self._app_state = "none"
            return
        self._deaths.count(_SERVERAPP)
        self._restart_app()

    def _on_client_exit(self, name: str, code: int) -> None:
        """A SuperNode or its SuperExec that ended for whatever reason, or a ClientApp that was killed.

        A ClientApp that ended by itself has handed its answer to the SuperNode.
        """
        kind, _, client = name.partition("-")
        node = self._nodes[client]
        if node.state != "up" or (kind == "clientapp" and code >= 0):
            return
        self._deaths.count(name)
        node.state = "down"
        node.n_losses += 1
        node.retry_at = time.monotonic()
        for part in ("supernode", "superexec", "clientapp"):
            self._keeper.kill(f"{part}-{client}")
        self._write_nodes()

    def _on_job_exit(self, name: str, code: int, output: str) -> None:
        kind, _, client = name.partition("-")
        answer = json_in(output)
        if kind == "register":
            self._on_registered(self._nodes[client], answer)
        elif kind == "deactivate":
            node = self._nodes[client]
            node.state = "down" if code not in (0, NO_SUCH_CALL) else "gone"
            wait_s = {0: 0.0, NO_SUCH_CALL: ONLINE_S}.get(code, RETRY_S)  # else: the SuperLink is down as well
            node.retry_at = time.monotonic() + wait_s
        elif kind == "stop":
            self._restart_app()
        elif kind == "run":
            self._flower_run = str(answer.get("run-id") or "")
            if not self._flower_run:
                self._app_state = "none"
                self._app_deadline = time.monotonic() + SUBMIT_RETRY_S  # the SuperLink is down: once more
            elif self._app_state == "submitting":
                self._app_state = "submitted"

    def _on_registered(self, node: _Node, answer: dict[str, Any]) -> None:
        if answer.get("node-id"):
            node.node_id = int(answer["node-id"])
            return
        node.n_refusals += 1
        if node.n_refusals == _N_REGISTER_TRIES:
            why = " ".join(str(answer.get("error-message", "no answer")).split())
            raise RelayError(f"the SuperLink did not take the node key of client {node.name}: {why}", peer=node.name)
        time.sleep(RETRY_S)
        self._start_job(f"register-{node.name}", self._setup.register(node.name))

    def _write_nodes(self) -> None:
        """What the server's courier must know of the nodes: who is who, and when something was lost."""
        nodes = {node.name: {"id": node.node_id, "losses": node.n_losses} for node in self._nodes.values()}
        known = {"nodes": nodes, "superlink_losses": self._n_superlink_losses}
        write_whole(self._setup.state / "nodes.json", json.dumps(known).encode())

    def _raise_courier_failure(self) -> None:
        path = self._setup.state / "failure.json"
        if path.exists():
            failure = json.loads(path.read_bytes())
            raise error_for_code(failure["code"])(failure["cause"], hint=failure["hint"])
