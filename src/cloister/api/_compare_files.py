"""The folder of a comparison: one folder for each method and seed, whose result is kept, and what was asked for."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister._files import write_whole
from cloister.config import Job
from cloister.errors import ConfigError, StoreError

from ._folder import write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MethodFolder:
    """One method with one seed. *Secret* of whoever compares: results hold labels and predictions of all clients."""

    path: Path

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "compare.log"

    def read_result(self) -> dict[str, Any] | None:
        """What was finished before; None if nothing was."""
        return _read(self.path / "result.json")

    def write_result(self, found: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", dict(found))

    def read_failure(self) -> dict[str, Any] | None:
        """Why the last attempt failed; None if none did."""
        return _read(self.path / "failure.json")

    def write_failure(self, found: Mapping[str, Any]) -> None:
        write_json(self.path / "failure.json", dict(found))

    def make_anew(self) -> None:
        """An empty folder: half a run is no use, since its times would not count everything."""
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot create {self.path}: {error.strerror}", path=str(self.path)) from error


@dataclass(frozen=True)
class CompareFolder:
    """`compare/<name of the job>`."""

    path: Path

    @property
    def job(self) -> Path:
        return self.path / "job.json"

    @property
    def table_json(self) -> Path:
        return self.path / "compare.json"

    @property
    def table_csv(self) -> Path:
        return self.path / "compare.csv"

    @property
    def page(self) -> Path:
        return self.path / "compare.html"

    def method(self, name: str, seed: int) -> MethodFolder:
        """The folder of one method and seed; it need not be there."""
        return MethodFolder(self.path / f"{name}-{seed}")

    def read_job(self) -> tuple[Job, dict[str, Any]]:
        """The job and the settings that the comparison was begun with.

        Raises:
            ConfigError: no comparison is there, or it cannot be read.
        """
        if not self.job.is_file():
            raise ConfigError(f"{self.path} holds no comparison", hint="name a folder under compare/")
        try:
            kept = json.loads(self.job.read_bytes())
            return Job.model_validate_json(json.dumps(kept["job"])), kept["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.job} cannot be read: {type(error).__name__}", source=str(self.job)) from error

    def read_asked(self) -> dict[str, Any]:
        """The methods and seeds of the last call; empty where there was none."""
        return _read(self.path / "asked.json") or {}

    def write_asked(self, asked: Mapping[str, Any]) -> None:
        write_json(self.path / "asked.json", dict(asked))

    def agree(self, job: Job, settings: Mapping[str, Any]) -> None:
        """Begins the folder, or makes sure that it is of the same job, data and settings.

        Results of another job beside new ones would be compared as if nothing had changed.

        Raises:
            ConfigError: it is of another; names every key that differs, and shows no value of the store's options.
            StoreError: the folder cannot be written.
        """
        if not self.job.is_file():
            try:
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StoreError(f"cannot create {error.filename}: {error.strerror}", path=str(self.path)) from error
            kept = {"version": FORMAT_VERSION, "job": job.model_dump(mode="json"), "settings": dict(settings)}
            write_whole(self.job, json.dumps(kept).encode())
            return
        before, old = self.read_job()
        changed = [*_differences(_comparable(before), _comparable(job)), *_differences(old, dict(settings))]
        if changed:
            raise ConfigError(
                f"{self.path} holds a comparison of another job: {'; '.join(changed)}",
                hint="choose another folder with --out, or remove this one to begin anew",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else compares in this folder meanwhile.

        Raises:
            ConfigError: somebody does.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"another `cloister compare` works in {self.path}", hint="wait for it, or choose --out"
                ) from None
            yield


def _comparable(job: Job) -> dict[str, Any]:
    """What decides the figures: not credentials, and not the seed, which the comparison replaces."""
    raw = job.model_dump(mode="json")
    raw["store"].pop("options")
    raw["federation"].pop("port")
    raw["training"].pop("seed")
    for client in raw["clients"]:
        client.pop("node_key")
    return raw


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Every key that differs, with both values where they are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for name in sorted(old.keys() | new.keys())
            for found in _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            found for i, pair in enumerate(zip(old, new, strict=True)) for found in _differences(*pair, f"{key}[{i}]")
        ]
    if old == new:
        return []
    shown = f" was {old!r}, and is {new!r}"
    return [f"{key}{shown}" if len(shown) <= 80 else f"{key} has changed"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {type(error).__name__}", hint="remove it, and it is made anew"
        ) from None
