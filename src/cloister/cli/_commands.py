"""What each command does. Heavy packages are imported inside, so that only the command that needs them waits."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cloister.config import Job

_MAX_FILE_BYTES = 64 * 2**20  # Predictions are asked in one request; a training set given by mistake is refused.

_Asked = str | tuple[str, str]


def init(args: argparse.Namespace) -> int:
    """`cloister init`: a commented job file, never over an existing one."""
    from cloister.config import job_template

    path = Path(args.path)
    if path.is_dir():
        path /= "job.toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(job_template())
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="name another file: cloister init PATH") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    sys.stderr.write(f"wrote {path}; fill in the model and the clients, then: cloister check {path}\n")
    return 0


def check(args: argparse.Namespace) -> int:
    """`cloister check`: every problem, or what the job is."""
    from cloister.config import check_job, load_job

    job = load_job(args.job)
    check_job(job)
    sys.stdout.write(_describe(job))
    return 0


def quickstart(args: argparse.Namespace) -> int:
    """`cloister quickstart`: write the embedded job's data, run it, say what to try next."""
    from cloister.cli._quickstart import HOSPITALS, write_quickstart

    if not args.json:
        sys.stderr.write("quickstart: writing the data of three hospitals (ICD-10-CM descriptions)\n")
    job = write_quickstart(Path(args.runs_dir) / "quickstart-data")
    code = _run(job, args, resume=None, serve=False)
    if not args.json:
        ask = f"cloister predict --run {Path(args.runs_dir) / 'latest'} --client {HOSPITALS[0]}"
        sys.stderr.write(f'\nnext: {ask} "Acute bronchitis due to rhinovirus"\n')
    return code


def run(args: argparse.Namespace) -> int:
    """`cloister run`: a job from its file, or one that was stopped."""
    resume = Path(args.resume) if args.resume else None
    if args.job is None and resume is None:
        raise ConfigError("no job file was named", hint="`cloister init` writes one; `cloister quickstart` needs none")
    job = Path(args.job) if args.job is not None else None
    return _run(job, args, resume=resume, serve=args.serve)


def predict(args: argparse.Namespace) -> int:
    """`cloister predict`: one answer a text, in order."""
    texts: list[_Asked] = _read_texts(args.file) if args.file else list(args.texts)
    empty = next((i for i, text in enumerate(texts, 1) if not _first(text).strip()), None)
    if empty is not None:
        raise DataError(f"text {empty} is empty", row=empty, hint="every text needs at least one word")
    from cloister import api

    answers = api.predict(Path(args.run), args.client, texts)
    for text, answer in zip(texts, answers, strict=True):
        sys.stdout.write(_answer_line(text, answer, as_json=args.json) + "\n")
    return 0


def _run(job: Path | None, args: argparse.Namespace, *, resume: Path | None, serve: bool) -> int:
    from cloister import api
    from cloister.cli._summary import summary
    from cloister.cli._views import choose_view

    with choose_view(as_json=args.json, plain=args.plain) as view:

        def on_event(event: dict[str, Any]) -> None:
            view(event)
            if event.get("event") == "result" and not args.json:
                # Here and not after the call: with --serve the run goes on until Ctrl-C.
                view.close()
                path = Path(event["path"])
                sys.stdout.write("\n" + summary(json.loads(path.read_text(encoding="utf-8")), path.parent))
                sys.stdout.flush()

        api.run(job, runs_dir=args.runs_dir, resume=resume, serve=serve, on_event=on_event)
    return 0


def _read_texts(name: str) -> list[_Asked]:
    path = Path(name)
    try:
        if name == "-":
            content = sys.stdin.read()
        elif path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{path} is larger than 64 MiB", path=name, hint="ask in several parts")
        else:
            content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", path=name) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", path=name) from None
    lines = [(i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{name} holds no text", path=name)
    return [_row_text(name, i, line) for i, line in lines] if path.suffix == ".jsonl" else [line for _, line in lines]


def _first(asked: _Asked) -> str:
    return asked if isinstance(asked, str) else asked[0]


def _row_text(name: str, row: int, line: str) -> _Asked:
    """The text of one JSON row: its `text` or `prompt`; with a `text_b`, the pair."""
    try:
        value = json.loads(line)
    except ValueError:
        raise DataError(f"{name}, row {row}: not JSON", path=name, row=row) from None
    text = (value.get("text") or value.get("prompt")) if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f"{name}, row {row}: has no text", path=name, row=row, hint='write {"text": "..."} a line')
    second = value.get("text_b") if isinstance(value, dict) else None
    if second is None:
        return text
    if not isinstance(second, str):
        raise DataError(f"{name}, row {row}: text_b is no text", path=name, row=row)
    return text, second


def _answer_line(asked: _Asked, answer: dict[str, Any], *, as_json: bool) -> str:
    if as_json:
        given = {"text": asked} if isinstance(asked, str) else {"text": asked[0], "text_b": asked[1]}
        return json.dumps({**given, **answer}, ensure_ascii=False)
    text = asked if isinstance(asked, str) else " | ".join(asked)
    if "label" in answer:
        return f"{100 * answer['probability']:5.1f} %  {answer['label']}  <- {text}"
    return f"{text}{answer.get('completion', '')}"


def _describe(job: Job) -> str:
    task = job.task.name + (f" over {len(job.task.labels)} classes" if job.task.labels else "")
    return (
        f"job      {job.name}: {task}\n"
        f"clients  {', '.join(job.client_names)}\n"
        f"model    {job.model.path}\n"
        f"sha384   {job.sha384.hex()}\n"
    )
