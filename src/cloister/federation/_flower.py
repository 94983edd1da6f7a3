"""How a relay's Flower processes are called: files, command lines and environments. No process is started here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from cloister._files import write_whole
from cloister.errors import RelayError

from ._keeper import APPS_SOCKET, DEACTIVATE
from ._keys import load_node_key
from ._tls import TlsFiles, make_tls

APP_FOLDER = Path(__file__).parent / "app"
CONNECTION = "relay"
"""Name of the SuperLink connection in Flower's configuration file."""

SERVER_POLL_S, CLIENT_POLL_S = 0.5, 0.2
"""How often a SuperExec asks for work: the server's has one task a run, a client's one a message."""

# What the relay's processes need of the caller's environment. The rest (tokens, cloud keys, proxies for a loopback
# address) is none of their business; only the server's courier, which fetches shards, gets it all.
_KEPT_ENV = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
_OWN_ENV = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "NO_COLOR": "1",
    # numpy comes along with Flower; nothing here computes, and a thread pool before a fork is asking for trouble.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class ClientEndpoint:
    """One client of a relay.

    Attributes:
        socket_path: host port of the client's own process.
        node_private_key_path: its node key (P-384, PEM); the relay needs it to log in to the SuperLink.
        node_public_key_path: the same key's public half as OpenSSH text, which the SuperLink registers.
    """

    socket_path: Path
    node_private_key_path: Path
    node_public_key_path: Path


class FlowerSetup:
    """Files and command lines of one relay.

    Args:
        run_dir: what may be looked at later (logs, the SuperLink's database).
        private: private folder with a short path, gone with the relay (sockets, keys).
        host, port: where the SuperLink listens.
    """

    def __init__(
        self,
        run_dir: Path,
        private: Path,
        *,
        clients: Mapping[str, ClientEndpoint],
        server_socket: Path,
        tls: bool,
        host: str,
        port: int,
    ) -> None:
        self._private = private
        self._clients = dict(clients)
        self._server_socket = server_socket
        self._host = host
        self._secret = private / "superexec.secret"
        self.port = port
        self.logs = run_dir / "logs"
        self.state = run_dir / "state"
        self.database = run_dir / "superlink.db"
        self._homes = run_dir / "flwr"
        for folder in (self.state, self._homes):
            shutil.rmtree(folder, ignore_errors=True)
        for file in run_dir.glob("superlink.db*"):
            file.unlink()
        for folder in (run_dir, self.logs, self.state, self._homes):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self._secret, os.urandom(32))
        self.tls: TlsFiles | None = make_tls(private, host) if tls else None
        if tls:
            for name, endpoint in self._clients.items():
                self._write_openssh_key(name, endpoint.node_private_key_path)
        self.use_port(port)

    @property
    def address(self) -> str:
        return f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"

    def use_port(self, port: int) -> None:
        """Points Flower's command line at the SuperLink's port."""
        self.port = port
        trust = f"root-certificates = {_toml(self.tls.ca)}" if self.tls else "insecure = true"
        home = self._home(None)
        text = f"[superlink]\ndefault = {_toml(CONNECTION)}\n\n"
        text += f"[superlink.{CONNECTION}]\naddress = {_toml(self.address)}\n{trust}\n"
        write_whole(home / "config.toml", text.encode())

    def log(self, name: str) -> str:
        return str(self.logs / f"{name}.log")

    def superlink_answers(self) -> bool:
        """Whether what listens on the port is our own SuperLink: only it has a certificate of this run's CA."""
        try:
            with socket.create_connection((self._host, self.port), timeout=5.0) as plain:
                if self.tls is None:
                    plain.sendall(f"GET /health HTTP/1.0\r\nHost: {self._host}\r\n\r\n".encode())
                    return plain.recv(12).startswith(b"HTTP/1.")
                context = ssl.create_default_context(cafile=str(self.tls.ca))
                with context.wrap_socket(plain, server_hostname=self._host):
                    return True
        except (OSError, ssl.SSLError):
            return False

    # --- command lines --------------------------------------------------------------------------------------------

    def superlink(self) -> list[str]:
        argv = ["flower-superlink", "--host", self._host, "--port", str(self.port), "--isolation", "process",
                "--database", str(self.database), "--superexec-auth-secret-file", str(self._secret),
                "--disable-runtime-dependency-installation"]  # fmt: skip
        if self.tls is None:
            return [*argv, "--insecure"]
        return [*argv, "--enable-supernode-auth", "--ssl-certfile", str(self.tls.certificate),
                "--ssl-keyfile", str(self.tls.key), "--ssl-ca-certfile", str(self.tls.ca)]  # fmt: skip

    def supernode(self, client: str, runtime_port: int) -> list[str]:
        argv = ["flower-supernode", "--superlink", self.address, "--isolation", "process", "--host", "127.0.0.1",
                "--port", str(runtime_port), "--superexec-auth-secret-file", str(self._secret),
                "--node-config", f"cloister-client={_toml(client)}"]  # fmt: skip
        if self.tls is None:
            return [*argv, "--insecure"]
        return [*argv, "--root-certificates", str(self.tls.ca),
                "--auth-supernode-private-key", str(self._openssh_key(client))]  # fmt: skip

    def server_superexec(self) -> list[str]:
        trust = ["--insecure"] if self.tls is None else ["--root-certificates", str(self.tls.ca)]
        return ["flower-superexec", "--runtime-api-address", self.address, *trust,
                "--superexec-auth-secret-file", str(self._secret)]  # fmt: skip

    def client_superexec(self, runtime_port: int) -> list[str]:
        # SuperNode and courier are on one host, under one user: this hop never leaves it.
        return ["flower-superexec", "--runtime-api-address", f"127.0.0.1:{runtime_port}", "--insecure",
                "--superexec-auth-secret-file", str(self._secret)]  # fmt: skip

    def register(self, client: str) -> list[str]:
        key = self._clients[client].node_public_key_path
        return ["flwr", "supernode", "register", str(key), CONNECTION, "--name", client, "--format", "json"]

    def run_app(self) -> list[str]:
        return ["flwr", "run", str(APP_FOLDER), CONNECTION, "--format", "json"]

    def stop_app(self, run_id: str) -> list[str]:
        return ["flwr", "stop", run_id, CONNECTION, "--format", "json"]

    def deactivate(self, client: str, node_id: int) -> list[str]:
        ca = str(self.tls.ca) if self.tls else ""
        return [DEACTIVATE, self.address, ca, str(self._openssh_key(client)), str(node_id)]

    # --- environments ---------------------------------------------------------------------------------------------

    def env(self, client: str | None = None) -> dict[str, str]:
        """For a process that only relays, at the server (None) or at a client."""
        kept = {name: value for name, value in os.environ.items() if name in _KEPT_ENV}
        return {**kept, **_OWN_ENV, "PATH": os.defpath, "FLWR_HOME": str(self._home(client))}

    def superexec_env(self, client: str | None, process: str, command: str) -> dict[str, str]:
        """For a SuperExec: the only command on its path is the one app it is there for, and that is our shim.

        So a SuperLink that asks for another kind of process (an agent, say) gets none.
        """
        folder = self._private / f"path-{process}"
        folder.mkdir(exist_ok=True)
        shim = Path(__file__).with_name("_app_shim.py")
        line = [sys.executable, "-I", "-S", str(shim), str(self._private / APPS_SOCKET), process, command]
        script = folder / command
        script.write_text(f'#!/bin/sh\nexec {shlex.join(line)} "$@"\n', encoding="utf-8")
        script.chmod(0o700)
        poll = SERVER_POLL_S if client is None else CLIENT_POLL_S
        return {**self.env(client), "PATH": str(folder), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll)}

    def serverapp_env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().startswith("flwr")}
        return {
            **_without_proxies(kept),
            **_OWN_ENV,
            "FLWR_HOME": str(self._home(None)),
            "CLOISTER_SERVER_SOCKET": str(self._server_socket),
            "CLOISTER_RELAY_STATE": str(self.state),
        }

    def clientapp_env(self, client: str) -> dict[str, str]:
        return {**self.env(client), "CLOISTER_CLIENT_SOCKET": str(self._clients[client].socket_path)}

    def keeper_env(self) -> dict[str, str]:
        """The superset that the environments above are handed down through; the keeper itself uses little of it."""
        return {**_without_proxies(os.environ), **_OWN_ENV, "FLWR_HOME": str(self._home(None))}

    def _home(self, client: str | None) -> Path:
        folder = self._homes / ("server" if client is None else f"client-{client}")
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def _openssh_key(self, client: str) -> Path:
        return self._private / f"{client}.key"

    def _write_openssh_key(self, client: str, source: Path) -> None:
        """Flower reads private keys in OpenSSH's format only; the copy lives as long as the relay."""
        key = load_node_key(source)
        encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        write_whole(self._openssh_key(client), key.private_bytes(encoding, serialization.PrivateFormat.OpenSSH, plain))


def json_in(output: str) -> dict[str, Any]:
    """The JSON object that a Flower command printed, after whatever else it had to say; empty if there is none."""
    start = output.find("{")
    if start < 0:
        return {}
    try:
        found = json.loads(output[start:])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on right now. Another process may be quicker: the caller must be able to retry."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def require_free(host: str, port: int) -> None:
    """Success means: nobody listened on this port a moment ago.

    Raises:
        RelayError: the port is taken or may not be used.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RelayError(
                f"port {port} of {host} cannot be used: {error.strerror}",
                hint="leave federation.port out of the job file, and a free one is taken",
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _toml(value: object) -> str:
    return json.dumps(str(value))


def _without_proxies(env: Mapping[str, str]) -> dict[str, str]:
    """Adds the loopback to what no proxy is used for: the store may need the proxy, the SuperLink never does."""
    local = "127.0.0.1,localhost,::1"
    no_proxy = env.get("no_proxy") or env.get("NO_PROXY") or ""
    return {**env, "no_proxy": f"{no_proxy},{local}" if no_proxy else local, "NO_PROXY": f"{no_proxy},{local}"}
