"""The folder of one run: what lies where, and who may read it."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister._files import write_whole
from cloister.config import Job
from cloister.errors import ConfigError, StoreError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Everything under `server/`, `inbox/` and `relay/` is on untrusted ground and sealed; each
    folder under `clients/` belongs to one institution.

    Attributes:
        path: absolute path of `runs/<id>`.
    """

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def policy(self) -> Path:
        return self.path / "policy.toml"

    @property
    def model(self) -> Path:
        """The backbone's local folder (public), by a link: the same for a folder and for a fetched hub name."""
        return (self.path / "model").resolve()

    @property
    def server(self) -> Path:
        return self.path / "server"

    @property
    def inbox(self) -> Path:
        return self.path / "inbox"

    @property
    def relay(self) -> Path:
        return self.path / "relay"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def nodes(self) -> Path:
        """Registered public node keys: who may take part."""
        return self.path / "nodes"

    def serving_socket(self) -> Path | None:
        """Host port of a server enclave that is up for this run, as the launcher left it; it may be gone."""
        try:
            return Path((self.path / "serving").read_text(encoding="utf-8"))
        except OSError:
            return None

    def client(self, name: str) -> Path:
        return self.path / "clients" / name

    def node_key(self, name: str) -> Path:
        """The client's private key; its own side only."""
        return self.client(name) / "node.key.pem"

    def registered_key(self, name: str) -> Path:
        """The client's public key as the server side knows it."""
        return self.nodes / f"{name}.pub"

    def make(self) -> None:
        """Creates the folders, readable by this user only."""
        try:
            for folder in (self.path, self.server, self.inbox, self.nodes, self.relay, self.logs):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot create {error.filename}: {error.strerror}", path=str(self.path)) from error

    @classmethod
    def create(cls, runs_dir: Path, name: str) -> RunFolder:
        """A fresh folder `runs/<date>-<name>-<random>`."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = cls((runs_dir / f"{stamp}-{name}-{secrets.token_hex(2)}").resolve())
        folder.make()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run, for resume and predict.

        Raises:
            ConfigError: there is no run in that folder.
        """
        folder = cls(path.resolve())
        if not folder.job.is_file():
            raise ConfigError(f"{path} holds no run", hint="name a folder under runs/, or runs/latest")
        return folder

    def write_job(self, job: Job) -> None:
        write_whole(self.job, job.model_dump_json().encode())

    def read_job(self) -> Job:
        try:
            return Job.model_validate_json(self.job.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.job} cannot be read: {type(error).__name__}", source=str(self.job)) from error

    def link_latest(self) -> None:
        """Points `runs/latest` here; replaces the old link in one step."""
        link = self.path.parent / "latest"
        fresh = self.path.parent / f".latest-{secrets.token_hex(4)}"
        fresh.symlink_to(self.path.name)
        try:
            fresh.replace(link)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StoreError(f"cannot replace {link}: {error.strerror}", path=str(link)) from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
