"""A job back as TOML: what a run keeps in its folder, with every default written out and every path absolute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloister.config._models import Job
from cloister.config._rules import drop_keys_of_others


def job_to_toml(job: Job, *, defaults: bool = True) -> str:
    """The job as TOML text; `load_job` of it gives an equal job.

    With `defaults=False` only what differs from them, and never what belongs to another method, adapter or rule. The
    store's options may hold credentials and are left out: a resumed run takes them from the original job file.
    """
    raw = job.model_dump(mode="json", exclude_none=True, exclude_defaults=not defaults, exclude={"store": {"options"}})
    if defaults:
        drop_keys_of_others(raw)
    raw = {"version": job.version, **raw}
    lines = [f"{key} = {_value(value)}" for key, value in raw.items() if not isinstance(value, (dict, list))]
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            lines += ["", f"[{key}]", *(f"{_key(k)} = {_value(v)}" for k, v in value.items())]
    for client in raw["clients"]:
        lines += ["", "[[clients]]", *(f"{_key(k)} = {_value(v)}" for k, v in client.items() if v != {})]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    bare = key.replace("-", "").replace("_", "")
    return key if bare.isascii() and bare.isalnum() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for the delete character, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(str(k))} = {_value(v)}" for k, v in value.items()) + " }"
    items = [_value(item) for item in value]
    if sum(map(len, items)) > 100:
        return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    return "[" + ", ".join(items) + "]"
