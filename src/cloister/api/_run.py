"""`run`: one whole run on this machine, every party in a process of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister._files import write_whole
from cloister.attest import Policy
from cloister.config import Job, check_job, load_job
from cloister.errors import ConfigError, FederationError
from cloister.pad import ASSUMPTIONS, PadMode
from cloister.report import write_report, write_tensorboard

from ._events import OnEvent
from ._folder import RunFolder, write_json
from ._launch import Launch, Programs
from ._result import RunResult, build_result
from ._setup import set_up

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_S = 0.2


def run(
    job: Job | str | Path | None = None,
    *,
    runs_dir: str | Path = "runs",
    resume: str | Path | None = None,
    serve: bool = False,
    on_event: OnEvent | None = None,
    programs: Programs | None = None,
    on_tick: Callable[[Launch], None] | None = None,
) -> RunResult:
    """Runs a job from its text to its report: SuperLink, SuperNodes, clients and server enclave on this machine.

    Args:
        job: a job, or the path of a job file. None with `resume`.
        runs_dir: folder in which `<id>/` is made.
        resume: folder of an interrupted run: what it had finished is kept, and its job is used.
        serve: keep the server enclave up for predictions until interrupted.
        on_event: called with every event, in order (docs/result.md lists them).
        programs: other command lines for the processes; for tests.
        on_tick: called a few times a second with the running processes; for tests.

    Returns:
        The result; `report.html` and TensorBoard logs lie beside `result.json` in `run_dir`.

    Raises:
        ConfigError: the job is wrong, with every problem at once.
        CloisterError: the run cannot go on. Its folder is kept, and `resume` continues it.
    """
    folder = _resumed(job, resume) if resume is not None else _fresh(job, Path(runs_dir))
    job = folder.read_job()
    if serve and job.method.name == "enclave":
        raise ConfigError("no server enclave serves this method", hint="a client asks its own: `cloister predict`")
    started = time.monotonic()
    with Launch(job, folder, on_event=on_event or (lambda _event: None), programs=programs) as launch:
        policy = Policy.load(folder.policy)
        launch.emit("run", run_id=folder.run_id, run_dir=str(folder.path), job=job.name,
                    method=job.method.name, clients=list(job.client_names), **_pad_of(job),
                    simulated=policy.allow_simulated, job_sha384=job.sha384.hex(),
                    policy_sha384=policy.sha384.hex(), resumed=resume is not None)  # fmt: skip
        launch.emit("phase", phase="start", status="begin")
        launch.start()
        launch.emit("phase", phase="start", status="end")
        while not launch.is_done:
            launch.poll()
            if on_tick is not None:
                on_tick(launch)
            time.sleep(TICK_S)
        result = _finish(job, folder, launch, wall_s=time.monotonic() - started)
        launch.emit("result", path=str(folder.result))
        if serve:
            _serve_until_interrupted(launch, folder)
    return RunResult(folder.run_id, folder.path, result)


def _pad_of(job: Job) -> dict[str, str]:
    """How frozen layers will be masked, and what that rests on: said before anything is masked."""
    if job.method.name != "enclave":
        return {}
    mode = PadMode(job.method.pad)
    return {"pad": mode.value, "ring": job.method.ring, "assumption": ASSUMPTIONS[mode]}


def _fresh(job: Job | str | Path | None, runs_dir: Path) -> RunFolder:
    if job is None:
        raise ConfigError("no job", hint="name a job file, or a run to resume")
    job = job if isinstance(job, Job) else load_job(Path(job))
    check_job(job)
    return set_up(job, runs_dir)


def _resumed(job: Job | str | Path | None, resume: str | Path) -> RunFolder:
    if job is not None:
        raise ConfigError("a resumed run has its job already", hint="give either a job file or a run to resume")
    return RunFolder.open(Path(resume))


def _finish(job: Job, folder: RunFolder, launch: Launch, *, wall_s: float) -> dict[str, Any]:
    """Writes result.json, report.html and the TensorBoard logs; with a resumed run, from all of its events."""
    report = _signed_report(job, folder)
    launch.emit("phase", phase="done", status="end")
    every = [json.loads(line) for line in folder.events.read_text(encoding="utf-8").splitlines()]
    result = build_result(job, launch, report, every, wall_s=wall_s)
    write_json(folder.result, result)
    write_report(folder.path, result, every)
    write_tensorboard(folder.path, every)
    return result


def _signed_report(job: Job, folder: RunFolder) -> dict[str, Any]:
    """The run report as the clients got it: each has verified the enclave's evidence over it before keeping it."""
    for name in job.client_names:
        path = folder.client(name) / "report.json"
        if path.is_file():
            return json.loads(path.read_bytes())
    raise FederationError("no client holds the run report", hint="see the clients' logs, then resume the run")


def _serve_until_interrupted(launch: Launch, folder: RunFolder) -> None:
    """Keeps the server enclave up; `predict` finds it by the file `serving`."""
    launch.stop_relay()
    serving = folder.path / "serving"
    write_whole(serving, str(launch.server_socket).encode())
    launch.emit("serving", run_dir=str(folder.path))
    try:
        while True:
            launch.poll()
            time.sleep(TICK_S)
    except KeyboardInterrupt:
        return
    finally:
        serving.unlink(missing_ok=True)
