"""`compare`: the same job by every method and seed, one after the other, and one table of what came of it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister._files import write_whole
from cloister.config import Job, check_job, load_job
from cloister.errors import CloisterError, ConfigError, FederationError, error_for_code
from cloister.report import write_compare_page

from ._compare_data import data_digests
from ._compare_files import CompareFolder, MethodFolder
from ._compare_jobs import METHODS, check_comparable, chosen_methods, derive_job, epochs_and_rounds, unavailable
from ._compare_table import MethodRuns, build_table, table_csv
from ._compare_work import Order
from ._events import Event, EventTail, OnEvent
from ._folder import write_json
from ._launch import Child
from ._process import BUG_CODE
from ._result import versions

Runner = Callable[[Order, MethodFolder, OnEvent], dict[str, Any]]
"""Trains and asks one method with one seed; raises CloisterError where it fails."""

DEFAULT_SEEDS = (0, 1, 2)
TICK_S = 0.2
STOP_PATIENCE_S = 30.0
_LIBRARIES = {"scipy": "scipy", "sklearn": "scikit-learn", "statsmodels": "statsmodels"}


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: with `compare.json`, `compare.csv`, `compare.html` and a folder for each method and seed.
        table: the content of `compare.json`.
    """

    folder: Path
    table: dict[str, Any]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The rows of methods that failed with some seed."""
        return [row for row in self.table["rows"] if row["status"] == "failed"]


def compare(
    job: Job | str | Path | None = None,
    *,
    out: str | Path = "compare",
    resume: str | Path | None = None,
    methods: Iterable[str] | None = None,
    seeds: Sequence[int] | None = None,
    generate: int | None = None,
    lr: Mapping[str, float] | None = None,
    on_event: OnEvent | None = None,
    runner: Runner | None = None,
) -> Comparison:
    """Trains and evaluates a job by every method and seed, one after the other, each in processes of its own.

    What is finished is kept: called again with the same folder and job, only what is missing or failed is run. A method
    that fails is noted with its reason, and the others go on. `central` and `fedavg` run in the clear: only for data
    that whoever calls may see.

    Args:
        job: a job, or the path of a job file. May be left out with `resume`.
        out: folder in which `<name of the job>/` is made or continued.
        resume: that folder itself, to go on with its job.
        methods: names, as in docs/compare.md; all that can run the job if left out.
        seeds: of every method; the job's own is not used.
        generate: held-out prompts to complete greedily (causal-lm), for ROUGE-L and exact match.
        lr: learning rates by method, in place of the job's.
        on_event: called with every event, in order (docs/compare.md lists those of a comparison).
        runner: runs one method with one seed; for tests.

    Raises:
        ConfigError: the job, a method or a seed is wrong; or the folder is of another job.
        CloisterError: the extra `evaluate` is missing, or the folder cannot be written.
    """
    folder, job, asked = _begin(
        job, out=out, resume=resume, methods=methods, seeds=seeds, generate=generate, lr=lr
    )  # fmt: skip
    with folder.lock():
        work = _Work(folder, job, asked, on_event or (lambda _event: None), runner or run_in_process)
        return Comparison(folder.path, work.carry_out())


@dataclass(frozen=True)
class _Asked:
    """What a call asks for, defaults filled in."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    generate: int
    lr: Mapping[str, float]

    @property
    def settings(self) -> dict[str, Any]:
        """What every result of a folder must share."""
        return {"generate": self.generate, "lr": dict(sorted(self.lr.items()))}


def _begin(
    job: Job | str | Path | None,
    *,
    out: str | Path,
    resume: str | Path | None,
    methods: Iterable[str] | None,
    seeds: Sequence[int] | None,
    generate: int | None,
    lr: Mapping[str, float] | None,
) -> tuple[CompareFolder, Job, _Asked]:
    """Everything that can be refused before anything is trained is refused here."""
    _require_libraries()
    folder = None if resume is None else CompareFolder(Path(resume).resolve())
    if job is None:
        if folder is None:
            raise ConfigError("no job", hint="name a job file, or a comparison to resume")
        job = folder.read_job()[0]
    job = job if isinstance(job, Job) else load_job(Path(job))
    check_comparable(job)
    check_job(job)
    before = {} if folder is None else folder.read_asked()
    folder = folder or CompareFolder((Path(out) / job.name).resolve())
    kept = folder.read_job()[1] if folder.job.is_file() else {}
    asked = _Asked(
        _methods(job, methods) if methods is not None else chosen_methods(before.get("methods")),
        _seeds(before.get("seeds", DEFAULT_SEEDS) if seeds is None else seeds),
        kept.get("generate", 0) if generate is None else generate,
        kept.get("lr", {}) if lr is None else lr,
    )
    _check_asked(job, asked)
    folder.agree(job, {**asked.settings, "data": data_digests(job)})
    folder.write_asked({"methods": list(asked.methods), "seeds": list(asked.seeds)})
    return folder, job, asked


def _methods(job: Job, names: Iterable[str]) -> tuple[str, ...]:
    """As named; one that cannot run the job is an error here, and where all were meant it is left to the table."""
    chosen = chosen_methods(names)
    for name in chosen:
        if why := unavailable(job, name):
            raise ConfigError(f"{name} cannot run this job: {why}", hint="leave it out of --only")
    return chosen


def _seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    found = tuple(seeds)
    if not found:
        raise ConfigError("no seed was chosen", hint="--seeds 3 takes 0, 1 and 2")
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"{seed!r} is no seed", hint="whole numbers from 0, such as --seeds 0,1,2")
        if found.count(seed) > 1:
            raise ConfigError(f"the seed {seed} is listed twice")
    return found


def _check_asked(job: Job, asked: _Asked) -> None:
    if asked.generate < 0:
        raise ConfigError(f"{asked.generate} prompts cannot be completed", hint="--generate 20")
    if asked.generate and job.task.name != "causal-lm":
        raise ConfigError(f"the task {job.task.name} generates nothing", hint="leave --generate out")
    if asked.generate and importlib.util.find_spec("rouge_score") is None:
        raise _missing("rouge-score")
    for name, rate in asked.lr.items():
        chosen_methods([name])
        if not 0 < rate <= 10:
            raise ConfigError(f"{rate} is no learning rate for {name}", hint="above 0, at most 10")


def _require_libraries() -> None:
    """The table is made last; what it needs is looked for first."""
    for module, package in _LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            raise _missing(package)


def _missing(package: str) -> CloisterError:
    return CloisterError(f"comparing needs {package}", hint="pip install 'cloister[evaluate]'")


class _Work:
    """One call's runs in order, what it tells, and what it writes."""

    def __init__(self, folder: CompareFolder, job: Job, asked: _Asked, tell: OnEvent, runner: Runner) -> None:
        self._folder, self._job, self._asked, self._tell, self._runner = folder, job, asked, tell, runner
        self._runs = {name: MethodRuns(unavailable=unavailable(job, name)) for name in asked.methods}
        self._n_done = 0

    def carry_out(self) -> dict[str, Any]:
        """Seeds one after the other, so that there is a whole table early; the methods' order turns at each."""
        self._say("plan", methods=list(self._asked.methods), seeds=list(self._asked.seeds), job=self._job.name,
                  folder=str(self._folder.path))  # fmt: skip
        for name, runs in self._runs.items():
            if runs.unavailable:
                self._say("unavailable", method=name, cause=runs.unavailable)
        table: dict[str, Any] = {}
        for i, seed in enumerate(self._asked.seeds):
            names = [name for name, runs in self._runs.items() if not runs.unavailable]
            for name in names if i % 2 == 0 else reversed(names):
                self._one(name, seed)
            table = self._write()
        return table

    def _one(self, name: str, seed: int) -> None:
        folder, runs = self._folder.method(name, seed), self._runs[name]
        found = folder.read_result()
        status = "kept"
        if found is None:
            self._say("begin", method=name, seed=seed, is_protected=METHODS[name].is_protected)
            status = "done"
            folder.make_anew()
            try:
                order = Order(name, seed, derive_job(self._job, name, seed, lr=self._asked.lr.get(name)),
                              self._asked.generate)  # fmt: skip
                found = self._runner(order, folder, self._tell)
                folder.write_result(found)
            except CloisterError as error:
                told = {"code": error.code, "cause": error.cause, "hint": error.hint, "exit_code": error.exit_code}
                runs.failures[seed] = told
                folder.write_failure(told)
                self._n_done += 1
                self._say("failed", method=name, seed=seed, **told)
                return
        runs.results[seed] = found
        self._n_done += 1
        self._say(status, method=name, seed=seed, metric=found["metric"]["name"], value=found["metric"]["value"],
                  wall_s=found["wall_s"])  # fmt: skip

    def _say(self, status: str, **fields: Any) -> None:
        n_total = len(self._asked.seeds) * sum(not runs.unavailable for runs in self._runs.values())
        base = {"t": round(time.time(), 3), "source": "compare", "event": "compare", "status": status}
        self._tell({**base, "n_done": self._n_done, "n_total": n_total, **fields})

    def _write(self) -> dict[str, Any]:
        epochs, rounds = epochs_and_rounds(self._job)
        table = {
            "job": self._job.name,
            "task": self._job.task.name,
            "epochs": epochs,
            "rounds": rounds,
            **self._asked.settings,
            **build_table(self._job.task.name, self._runs, self._asked.seeds),
            "machine": {"processor": _processor(), "threads": len(os.sched_getaffinity(0))},
            "versions": versions(),
        }
        write_json(self._folder.table_json, table)
        write_whole(self._folder.table_csv, table_csv(table).encode())
        write_compare_page(self._folder.page, table)
        return table


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run_in_process(order: Order, folder: MethodFolder, on_event: OnEvent) -> dict[str, Any]:
    """The runner of `compare`: a process of its own, whose events are passed on.

    Raises:
        CloisterError: what that process raised.
    """
    argv = [sys.executable, "-m", "cloister.api._compare_main", "--folder", str(folder.path)]
    asked = json.dumps(order.as_dict()).encode()
    child, tail, errors = Child(order.name, argv, env={}, log=folder.log, secret=asked), EventTail(), []

    def drain() -> None:
        for event in tail.read(folder.events):
            if event["event"] == "error" and str(event["source"]).startswith("compare/"):
                errors.append(event)  # told as this method's failure
            else:
                on_event(event)

    child.start()
    try:
        while child.code is None:
            drain()
            time.sleep(TICK_S)
    finally:
        child.stop(STOP_PATIENCE_S)
    drain()
    found = folder.read_result()
    if child.code or found is None:
        raise _why(order, folder, child.code or 0, errors)
    return found


def _why(order: Order, folder: MethodFolder, code: int, errors: list[Event]) -> CloisterError:
    log = f"see {folder.log}"
    if errors and errors[-1]["code"] != BUG_CODE:
        return error_for_code(errors[-1]["code"])(errors[-1]["cause"], hint=errors[-1].get("hint", ""))
    if errors:
        return CloisterError(f"{order.name} met a bug", hint=log)
    what = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return FederationError(f"{order.name} {what}", peer=order.method, hint=f"{log}; did memory run out?")
