"""Length-prefixed parts (`enc`, for hashing and key derivation); versioned messages (`pack`, for everything sent)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from cloister.errors import LimitExceededError, MalformedMessageError, UnsupportedVersionError
from cloister.wire import _cbor
from cloister.wire._limits import MAGIC, MAX_MESSAGE_BYTES, VERSION

_LENGTH_BYTES = 4
_MAX_PART_BYTES = (1 << 32) - 1
_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

Blob = bytes | bytearray | memoryview


def enc(*parts: Blob) -> bytes:
    """Concatenate each part behind its u32 big-endian length. Injective: no two lists of parts share an encoding.

    Raises:
        LimitExceededError: a part is 4 GiB or longer.
    """
    out: list[Blob] = []
    for part in parts:
        if len(part) > _MAX_PART_BYTES:
            raise LimitExceededError("a part of 4 GiB or more cannot be encoded")
        out += (len(part).to_bytes(_LENGTH_BYTES, "big"), part)
    return b"".join(out)


def dec(blob: Blob, n_parts: int, *, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[bytes, ...]:
    """Split what `enc` made of exactly `n_parts` parts. Total: any bytes give parts or a `WireError`.

    Raises:
        LimitExceededError: `blob` is longer than `max_bytes`.
        MalformedMessageError: `blob` is not exactly `n_parts` parts.
    """
    _check_size(blob, max_bytes)
    view = memoryview(blob)
    parts: list[bytes] = []
    at = 0
    for _ in range(n_parts):
        start = at + _LENGTH_BYTES
        if start > len(view):
            raise MalformedMessageError("message ends inside a length")
        at = start + int.from_bytes(view[at:start], "big")
        if at > len(view):
            raise MalformedMessageError("message ends inside a part")
        parts.append(bytes(view[start:at]))
    if at != len(view):
        raise MalformedMessageError("bytes are left over after the last part")
    return tuple(parts)


def pack(kind: str, body: Mapping[str, object]) -> bytes:
    """Encode a message: "CLST", the version, deterministic CBOR of `[kind, body]`.

    Args:
        kind: what the message is; lower case letters, digits, dot, dash, underscore; at most 64 characters.
        body: text keys; None, bool, int, float, str, bytes, lists and maps of these.

    Raises:
        MalformedMessageError: the kind or a value cannot be encoded.
    """
    _check_kind(kind)
    return _cbor.encode([kind, body], prefix=MAGIC + bytes([VERSION]))


def unpack_any(blob: Blob, *, max_bytes: int = MAX_MESSAGE_BYTES) -> tuple[str, dict[str, Any]]:
    """Decode a message of any kind into `(kind, body)`. Total: any bytes give a value or a `WireError`.

    Success means that the bytes are a deterministic encoding of this version. The caller must still check every field:
    nothing here says who wrote them.

    Raises:
        LimitExceededError: longer than `max_bytes`, or more items or levels than the specification allows.
        UnsupportedVersionError: a message of another format version.
        MalformedMessageError: anything else.
    """
    _check_size(blob, max_bytes)
    view = memoryview(blob)
    if len(view) <= len(MAGIC) or bytes(view[: len(MAGIC)]) != MAGIC:
        raise MalformedMessageError("not a cloister message")
    version = view[len(MAGIC)]
    if version != VERSION:
        raise UnsupportedVersionError(f"message is of format version {version}, this release speaks {VERSION}")
    value: Any = _cbor.decode(view[len(MAGIC) + 1 :])
    if not isinstance(value, list):
        raise MalformedMessageError("message is not a pair of kind and body")
    pair = cast("list[Any]", value)
    if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], dict):
        raise MalformedMessageError("message is not a pair of kind and body")
    _check_kind(pair[0])
    return pair[0], cast("dict[str, Any]", pair[1])


def unpack(blob: Blob, kind: str, *, max_bytes: int = MAX_MESSAGE_BYTES) -> dict[str, Any]:
    """Decode a message that must be of `kind` and return its body; see `unpack_any`.

    Raises:
        MalformedMessageError: it is of another kind, or not a message.
        LimitExceededError: see `unpack_any`.
        UnsupportedVersionError: see `unpack_any`.
    """
    found, body = unpack_any(blob, max_bytes=max_bytes)
    if found != kind:
        # Kinds match a narrow pattern (checked above), so the text is safe to show.
        raise MalformedMessageError(f"expected a message of kind {kind}, got {found}")
    return body


def _check_size(blob: Blob, max_bytes: int) -> None:
    if len(blob) > max_bytes:
        raise LimitExceededError(f"message of {len(blob)} bytes is over the limit of {max_bytes}")


def _check_kind(kind: str) -> None:
    if not _KIND.fullmatch(kind):
        raise MalformedMessageError("message kind is not a name")
