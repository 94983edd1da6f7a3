"""What the benches of whole runs share: files for both sides, each side in a fresh process, and where it all lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench._common import REPOSITORY, source
from bench.peers.flower_lora import PeerJob

from cloister.testing import shared_dir

if TYPE_CHECKING:
    from cloister.config import Job

Rows = Sequence[Mapping[str, Any]]


def rows_of(job: Job, client: Any, data: Any) -> list[dict[str, Any]]:
    """A client's data as its job says: texts, and indices of labels."""
    from cloister.train import open_dataset

    dataset = open_dataset(
        data.path, columns=client.column_map(), task=job.task_spec(), split=data.split, where=data.where or None
    )
    return [{"text": example.text, "label": example.label} for example in dataset]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sample_rows(path: Path, n: int) -> list[dict[str, Any]]:
    """The n lines with the smallest hash of their id: the same ones in every bench and run."""
    return sorted(read_rows(path), key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:n]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def recipe_file(recipe: Path, folder: Path) -> Path | None:
    """The recipe, or a copy of it in `folder` that names the data where they lie; None where there are none."""
    shared = shared_dir()
    if shared is None:
        return None
    if shared == REPOSITORY.parent / "shared":
        return recipe
    copy = folder / recipe.name
    text = recipe.read_text(encoding="utf-8").replace("../../../shared/data", str(shared / "data"))
    copy.write_text(text, encoding="utf-8")
    return copy


def in_child(script: Path, folder: Path, name: str, what: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one side in a fresh process, as a user's command would: `script --side order.json`.

    What the same order gave before, of the same source, is taken from the folder: a bench that was stopped goes on.
    """
    order = folder / name / "order.json"
    text = json.dumps({**what, "source": source()}, default=str)
    if order.with_suffix(".result.json").is_file() and order.read_text(encoding="utf-8") == text:
        return read_result(order)
    order.parent.mkdir(parents=True, exist_ok=True)
    order.with_suffix(".result.json").unlink(missing_ok=True)
    order.write_text(text, encoding="utf-8")
    env = {"CLOISTER_HOME": str(folder / "home"), **os.environ}
    child = subprocess.Popen([sys.executable, str(script.resolve()), "--side", str(order)], env=env)
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        raise
    if code:
        sys.exit(f"error: the run {name} failed with {code}\nhint: --keep FOLDER keeps its logs")
    return read_result(order)


def peer_job(given: Mapping[str, Any]) -> PeerJob:
    """The peer's job out of an order."""
    paths = {name: Path(given[name]) for name in ("model", "test")}
    initial = Path(given["initial"]) if given["initial"] else None
    return PeerJob(**{**given, **paths, "train": tuple(map(Path, given["train"])), "initial": initial})


def write_result(order: Path, found: Mapping[str, Any]) -> None:
    """What came of an order, beside it."""
    order.with_suffix(".result.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def read_result(order: Path) -> dict[str, Any]:
    """What `write_result` left."""
    return json.loads(order.with_suffix(".result.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """`keep`, or a folder that goes again."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="cloister-bench-") as scratch:
        yield Path(scratch)
