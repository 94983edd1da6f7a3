"""Checks of single fields, used both when a message is built and when it is parsed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from cloister.errors import LimitExceededError, MalformedMessageError

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
HEADER_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
ERROR_CODE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_text(field: str, value: object, pattern: re.Pattern[str]) -> None:
    """`value` is text that `pattern` matches as a whole."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise MalformedMessageError(f"{field} is not text of the form {pattern.pattern}")


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise MalformedMessageError(f"{field} is not one of {', '.join(choices)}")


def check_count(field: str, value: object, limit: int, *, minimum: int = 0) -> None:
    """`value` is a whole number (not a bool) within `minimum..limit`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise MalformedMessageError(f"{field} is not a whole number of {minimum} or more")
    if value > limit:
        raise LimitExceededError(f"{field} is over the limit of {limit}")


def check_flag(field: str, value: object) -> None:
    """`value` is true or false, and no number."""
    if not isinstance(value, bool):
        raise MalformedMessageError(f"{field} is not a truth value")


def check_seconds(field: str, value: object, limit: float) -> None:
    """`value` is a finite float within `0..limit`."""
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise MalformedMessageError(f"{field} is not a number of seconds")
    if value > limit:
        raise LimitExceededError(f"{field} is over the limit of {limit} s")


def check_bytes(field: str, value: object, limit: int, *, exact: bool = False) -> None:
    """`value` is a byte string of at most `limit` bytes; of exactly `limit` bytes if `exact`."""
    if not isinstance(value, bytes) or (exact and len(value) != limit):
        raise MalformedMessageError(f"{field} is not a byte string" + (f" of {limit} bytes" if exact else ""))
    if len(value) > limit:
        raise LimitExceededError(f"{field} of {len(value)} bytes is over the limit of {limit}")


def check_keys(kind: str, body: Iterable[str], fields: tuple[str, ...]) -> None:
    """`body` has exactly the keys of `fields`: none missing, none unknown."""
    if set(body) != set(fields):
        raise MalformedMessageError(f"{kind} does not have exactly the fields {', '.join(fields)}")
