"""A job with other keys in it: the same data and training by another method or adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloister.config._load import parse_job
from cloister.config._models import Job
from cloister.config._rules import drop_keys_of_others


def rewrite_job(job: Job, changes: Mapping[str, Mapping[str, Any]]) -> Job:
    """The same job with some keys of its sections set anew, checked like one from a file.

    What belongs to another method, adapter or rule than the new ones is dropped: its own keys get their defaults. A
    key that is set to None is left out.

    Args:
        job: from `load_job` or `parse_job`; its paths are absolute.
        changes: by section, such as `{"method": {"name": "enclave", "rounds": 2}}`.

    Raises:
        ConfigError: with every problem and its key.
    """
    raw = job.model_dump(mode="json", exclude_none=True)
    for section, keys in changes.items():
        merged = {**raw.get(section, {}), **keys}
        raw[section] = {key: value for key, value in merged.items() if value is not None}
    drop_keys_of_others(raw)
    return parse_job(raw)
