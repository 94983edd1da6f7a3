"""Deterministic CBOR (RFC 8949 section 4.2.1), restricted to the types that a JSON reader knows plus byte strings.

A decoder of our own, in place of a general one: tags (dates, regular expressions, shared references), indefinite
lengths, duplicate keys and non-shortest heads never reach any code, and the limits hold while parsing, not after.
Each value has exactly one encoding, so `encode(decode(b)) == b` for every `b` that decodes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

from cloister.errors import LimitExceededError, MalformedMessageError
from cloister.wire._limits import MAX_CBOR_DEPTH, MAX_CBOR_ITEMS

_UINT, _NINT, _BYTES, _TEXT, _ARRAY, _MAP, _SIMPLE = 0, 1, 2, 3, 4, 5, 7  # major types, RFC 8949 section 3.1
_FALSE, _TRUE, _NULL, _HALF, _SINGLE, _DOUBLE = 0xF4, 0xF5, 0xF6, 0xF9, 0xFA, 0xFB
_CANONICAL_NAN = b"\xf9\x7e\x00"
_HEAD_SIZES = {24: 1, 25: 2, 26: 4, 27: 8}
_HEAD_MINIMUM = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}
_FLOAT_FORMATS = {_HALF: ">e", _SINGLE: ">f", _DOUBLE: ">d"}


def encode(value: object, *, prefix: bytes = b"") -> bytes:
    """Encode None, bool, int (64 bit), float, str, bytes, sequences and mappings with text keys; behind `prefix`.

    Raises:
        MalformedMessageError: a value of another type, an integer outside 64 bits, or text that is not Unicode.
        LimitExceededError: nested deeper than `MAX_CBOR_DEPTH`, which no peer would accept.
    """
    out = [prefix]  # joined once, so that a message of 1 GiB is not copied again for its five leading bytes
    _encode(value, out, 0)
    return b"".join(out)


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return bytes([major << 5 | argument])
    for info, size in _HEAD_SIZES.items():
        if argument < 1 << (8 * size):
            return bytes([major << 5 | info]) + argument.to_bytes(size, "big")
    raise MalformedMessageError("an integer of more than 64 bits cannot be encoded")


def _encode_float(value: float) -> bytes:
    if math.isnan(value):
        return _CANONICAL_NAN
    for head, fmt in ((_HALF, ">e"), (_SINGLE, ">f")):
        try:
            packed = struct.pack(fmt, value)
        except OverflowError:
            continue
        if struct.unpack(fmt, packed)[0] == value:
            return bytes([head]) + packed
    return bytes([_DOUBLE]) + struct.pack(">d", value)


def _encode_text(value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raise MalformedMessageError("text with a lone surrogate cannot be encoded") from None
    return _head(_TEXT, len(raw)) + raw


def _encode(value: object, out: list[bytes], depth: int) -> None:
    if depth > MAX_CBOR_DEPTH:
        raise LimitExceededError(f"message is nested deeper than {MAX_CBOR_DEPTH}")
    if value is None:
        out.append(bytes([_NULL]))
    elif isinstance(value, bool):
        out.append(bytes([_TRUE if value else _FALSE]))
    elif isinstance(value, int):
        out.append(_head(_UINT, value) if value >= 0 else _head(_NINT, -1 - value))
    elif isinstance(value, float):
        out.append(_encode_float(value))
    elif isinstance(value, str):
        out.append(_encode_text(value))
    elif isinstance(value, bytes | bytearray | memoryview):
        raw = value if isinstance(value, bytes) else bytes(cast("bytearray", value))
        out += (_head(_BYTES, len(raw)), raw)
    elif isinstance(value, Mapping):
        _encode_map(cast("Mapping[object, object]", value), out, depth)
    elif isinstance(value, Sequence):
        items = cast("Sequence[object]", value)
        out.append(_head(_ARRAY, len(items)))
        for item in items:
            _encode(item, out, depth + 1)
    else:
        raise MalformedMessageError(f"a value of type {type(value).__name__} cannot be encoded")


def _encode_map(value: Mapping[object, object], out: list[bytes], depth: int) -> None:
    keyed: list[tuple[bytes, object]] = []
    for key, item in value.items():
        if not isinstance(key, str):
            raise MalformedMessageError("a map key that is not text cannot be encoded")
        keyed.append((_encode_text(key), item))
    out.append(_head(_MAP, len(keyed)))
    # Bytewise order of the encoded keys; keys are unique, so the values never take part in the comparison.
    for key, item in sorted(keyed, key=lambda pair: pair[0]):
        out.append(key)
        _encode(item, out, depth + 1)


def decode(blob: bytes | bytearray | memoryview) -> Any:
    """Decode one deterministic CBOR value that fills `blob`. Total: any bytes give a value or a `WireError`.

    Raises:
        MalformedMessageError: not deterministic CBOR of the allowed types, or bytes are missing or left over.
        LimitExceededError: more than `MAX_CBOR_ITEMS` items or deeper than `MAX_CBOR_DEPTH`.
    """
    reader = _Reader(memoryview(blob))
    value = reader.value(0)
    if reader.at != len(reader.view):
        raise MalformedMessageError("bytes are left over after the message")
    return value


class _Reader:
    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0
        self.n_items = 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.view):
            raise MalformedMessageError("message ends early")
        taken = self.view[self.at : end]
        self.at = end
        return taken

    def argument(self, info: int) -> int:
        if info < 24:
            return info
        if info not in _HEAD_SIZES:
            raise MalformedMessageError("indefinite or reserved length in message")
        argument = int.from_bytes(self.take(_HEAD_SIZES[info]), "big")
        if argument < _HEAD_MINIMUM[info]:
            raise MalformedMessageError("length or integer is not in its shortest form")
        return argument

    def value(self, depth: int) -> Any:
        self.n_items += 1
        if self.n_items > MAX_CBOR_ITEMS:
            raise LimitExceededError(f"message has more than {MAX_CBOR_ITEMS} items")
        if depth > MAX_CBOR_DEPTH:
            raise LimitExceededError(f"message is nested deeper than {MAX_CBOR_DEPTH}")
        initial = self.take(1)[0]
        major, info = initial >> 5, initial & 0x1F
        return self.simple(initial) if major == _SIMPLE else self.sized(major, self.argument(info), depth)

    def sized(self, major: int, argument: int, depth: int) -> Any:
        """The value of every major type whose head carries a number or a length."""
        if major == _UINT:
            return argument
        if major == _NINT:
            return -1 - argument
        if major == _BYTES:
            return bytes(self.take(argument))
        if major == _TEXT:
            return self.text(argument)
        if major == _ARRAY:
            # No allocation follows from the count alone: items are read one by one until the bytes or the limit end.
            return [self.value(depth + 1) for _ in range(argument)]
        if major != _MAP:
            raise MalformedMessageError("tags are not allowed in messages")
        return self.map(argument, depth)

    def text(self, size: int) -> str:
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise MalformedMessageError("text is not UTF-8") from None

    def map(self, n_pairs: int, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        previous = b""
        for _ in range(n_pairs):
            start = self.at
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise MalformedMessageError("map key is not text")
            raw = bytes(self.view[start : self.at])
            if raw <= previous:
                raise MalformedMessageError("map keys are repeated or out of order")
            previous = raw
            result[key] = self.value(depth + 1)
        return result

    def simple(self, initial: int) -> Any:
        if initial in (_FALSE, _TRUE):
            return initial == _TRUE
        if initial == _NULL:
            return None
        if initial not in _FLOAT_FORMATS:
            raise MalformedMessageError("simple value is not allowed in messages")
        fmt = _FLOAT_FORMATS[initial]
        start = self.at - 1
        (number,) = struct.unpack(fmt, self.take(struct.calcsize(fmt)))
        if _encode_float(number) != bytes(self.view[start : self.at]):
            raise MalformedMessageError("number is not in its shortest form")
        return number
