"""What enclave and accelerator say to each other: headers of one length, with the payloads that they announce.

Everything here is *public* or *masked*. Both sides take the other for hostile. Normative: spec/pad.md.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cloister.errors import CloisterError, LimitExceededError, MalformedMessageError, UnsupportedVersionError
from cloister.wire import _fields
from cloister.wire._limits import (
    ACCELERATOR_HEADER_BYTES,
    MAX_ACCELERATOR_FEATURES,
    MAX_ACCELERATOR_LAYERS,
    MAX_ACCELERATOR_PAYLOAD_BYTES,
    MAX_ACCELERATOR_TOKENS,
    SHA384_BYTES,
)

_MAGIC = b"CLSA"
_VERSION = 1  # of spec/pad.md
_PREFIX = struct.Struct(">4sBB2x")
_DEVICE_CHARACTERS, _KERNEL_CHARACTERS, _CODE_CHARACTERS = 64, 24, 64
_PRINTABLE = re.compile(r"[ -~]*")  # what a device says of itself ends up on terminals and in reports
_MAX_RING_CODE = 1
_MAX_DIRECTION = 1
_MAX_WEIGHT_BITS = 16
_MAX_PLANES = 4


@dataclass(frozen=True)
class AcceleratorMessage:
    """Base of these messages: a header of `ACCELERATOR_HEADER_BYTES`, and a payload behind it or in shared memory.

    A subclass has the fields of its struct in their order, and checks them, so that no wrong one exists.
    """

    CODE: ClassVar[int] = 0
    BODY: ClassVar[struct.Struct] = struct.Struct("")

    def to_bytes(self) -> bytes:
        """The one encoding of this header."""
        values = [value.encode("ascii") if isinstance(value, str) else value for value in vars(self).values()]
        header = _PREFIX.pack(_MAGIC, _VERSION, self.CODE) + self.BODY.pack(*values)
        return header.ljust(ACCELERATOR_HEADER_BYTES, b"\0")

    @classmethod
    def parse(cls, blob: bytes | bytearray | memoryview) -> Self:
        """Parse an untrusted header of this kind. Total: gives a checked message or raises a `WireError`."""
        message = parse_accelerator_message(blob)
        if not isinstance(message, cls):
            raise MalformedMessageError(f"expected {cls.__name__}, got {type(message).__name__}")
        return message

    @classmethod
    def from_values(cls, *values: Any) -> Self:
        """From what the struct holds."""
        return cls(*values)

    @property
    def payload_bytes(self) -> int:
        """Size of the payload, at most `MAX_ACCELERATOR_PAYLOAD_BYTES`."""
        return 0

    def _check_payload(self) -> None:
        if self.payload_bytes > MAX_ACCELERATOR_PAYLOAD_BYTES:
            raise LimitExceededError(f"a payload of {self.payload_bytes} bytes is over the limit")


@dataclass(frozen=True)
class AcceleratorHello(AcceleratorMessage):
    """First message of each side. What the device says of itself proves nothing. Of the enclave both are empty.

    Attributes:
        device: printable ASCII, at most 64 characters.
        kernel: likewise, at most 24.
    """

    CODE: ClassVar[int] = 1
    BODY: ClassVar[struct.Struct] = struct.Struct(f">{_DEVICE_CHARACTERS}s{_KERNEL_CHARACTERS}s")

    device: str = ""
    kernel: str = ""

    def __post_init__(self) -> None:
        _fields.check_text("device", self.device, _PRINTABLE)
        _fields.check_text("kernel", self.kernel, _PRINTABLE)
        if len(self.device) > _DEVICE_CHARACTERS or len(self.kernel) > _KERNEL_CHARACTERS:
            raise LimitExceededError("the name of a device or kernel is over the limit")

    @classmethod
    def from_values(cls, *values: Any) -> Self:
        """See `AcceleratorMessage.from_values`."""
        return cls(*map(_text, values))


@dataclass(frozen=True)
class AcceleratorLoad(AcceleratorMessage):
    """Hold these integers as a layer. Payload: W_q, int16, row by row, then the scales, binary32; both little-endian.

    Attributes:
        layer: the number that the enclave gives it.
        ring: code of the format, 0 faithful, 1 fast.
        weight_bits: signed bits of W_q.
        n_out: rows of W_q.
        n_in: columns of W_q.
        digest: SHA-384 of the weight as spec/pad.md section 2.3 has it.
    """

    CODE: ClassVar[int] = 2
    BODY: ClassVar[struct.Struct] = struct.Struct(f">IBB2xII{SHA384_BYTES}s")

    layer: int
    ring: int
    weight_bits: int
    n_out: int
    n_in: int
    digest: bytes

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        _fields.check_count("ring", self.ring, _MAX_RING_CODE)
        _fields.check_count("weight_bits", self.weight_bits, _MAX_WEIGHT_BITS, minimum=2)
        _fields.check_count("n_out", self.n_out, MAX_ACCELERATOR_FEATURES, minimum=1)
        _fields.check_count("n_in", self.n_in, MAX_ACCELERATOR_FEATURES, minimum=1)
        _fields.check_bytes("digest", self.digest, SHA384_BYTES, exact=True)
        self._check_payload()

    @property
    def payload_bytes(self) -> int:
        """W_q and scales."""
        return 2 * self.n_out * self.n_in + 4 * self.n_out


@dataclass(frozen=True)
class AcceleratorMultiply(AcceleratorMessage):
    """Multiply by a layer. Payload: the planes, int8, in their order, each token by token; *masked*.

    Attributes:
        layer: a loaded one.
        direction: 0 forward, 1 backward.
        n_planes: of the layer's format.
        n_tokens: rows.
        n_features: columns: `n_in` of the layer for forward, its `n_out` for backward.
    """

    CODE: ClassVar[int] = 3
    BODY: ClassVar[struct.Struct] = struct.Struct(">IBB2xII")

    layer: int
    direction: int
    n_planes: int
    n_tokens: int
    n_features: int

    def __post_init__(self) -> None:
        _check_layer(self.layer)
        _fields.check_count("direction", self.direction, _MAX_DIRECTION)
        _fields.check_count("n_planes", self.n_planes, _MAX_PLANES, minimum=1)
        _fields.check_count("n_tokens", self.n_tokens, MAX_ACCELERATOR_TOKENS, minimum=1)
        _fields.check_count("n_features", self.n_features, MAX_ACCELERATOR_FEATURES, minimum=1)
        self._check_payload()

    @property
    def payload_bytes(self) -> int:
        """The planes."""
        return self.n_planes * self.n_tokens * self.n_features


@dataclass(frozen=True)
class AcceleratorAnswer(AcceleratorMessage):
    """Done. Payload: the elements in [0, m), uint32, little-endian, token by token; *masked*. After a load, none.

    Attributes:
        n_tokens: rows; 0 after a load.
        n_features: columns: what comes out of the layer in that direction; 0 after a load.
    """

    CODE: ClassVar[int] = 4
    BODY: ClassVar[struct.Struct] = struct.Struct(">II")

    n_tokens: int = 0
    n_features: int = 0

    def __post_init__(self) -> None:
        _fields.check_count("n_tokens", self.n_tokens, MAX_ACCELERATOR_TOKENS)
        _fields.check_count("n_features", self.n_features, MAX_ACCELERATOR_FEATURES)
        self._check_payload()

    @property
    def payload_bytes(self) -> int:
        """The elements."""
        return 4 * self.n_tokens * self.n_features


@dataclass(frozen=True)
class AcceleratorError(AcceleratorMessage):
    """Refused. No cause travels.

    Attributes:
        error_code: a stable code of `cloister.errors`.
    """

    CODE: ClassVar[int] = 5
    BODY: ClassVar[struct.Struct] = struct.Struct(f">{_CODE_CHARACTERS}s")

    error_code: str

    def __post_init__(self) -> None:
        _fields.check_text("error_code", self.error_code, _fields.ERROR_CODE)

    @classmethod
    def for_error(cls, error: CloisterError | type[CloisterError]) -> Self:
        """What tells the other side of `error`."""
        return cls(error.code)

    @classmethod
    def from_values(cls, *values: Any) -> Self:
        """See `AcceleratorMessage.from_values`."""
        return cls(*map(_text, values))


_BY_CODE: dict[int, type[AcceleratorMessage]] = {
    kind.CODE: kind
    for kind in (AcceleratorHello, AcceleratorLoad, AcceleratorMultiply, AcceleratorAnswer, AcceleratorError)
}


def parse_accelerator_message(blob: bytes | bytearray | memoryview) -> AcceleratorMessage:
    """Parse an untrusted header of any kind. Total: gives a checked message or raises a `WireError`.

    Success means that every number is within its limit and that this is the message's only encoding. The caller must
    still check that the sizes are those that it expects.

    Raises:
        UnsupportedVersionError: a header of another version.
        LimitExceededError: a number over its limit.
        MalformedMessageError: anything else.
    """
    header = bytes(blob[: ACCELERATOR_HEADER_BYTES + 1])
    if len(header) != ACCELERATOR_HEADER_BYTES or not header.startswith(_MAGIC):
        raise MalformedMessageError("not a header of the accelerator protocol")
    _, version, code = _PREFIX.unpack_from(header)
    if version != _VERSION:
        raise UnsupportedVersionError(f"the accelerator speaks version {version}, this release speaks {_VERSION}")
    kind = _BY_CODE.get(code)
    if kind is None:
        raise MalformedMessageError("no such message of the accelerator protocol")
    message = kind.from_values(*kind.BODY.unpack_from(header, _PREFIX.size))
    if message.to_bytes() != header:
        raise MalformedMessageError("a header of the accelerator protocol holds bytes that mean nothing")
    return message


def _check_layer(layer: int) -> None:
    _fields.check_count("layer", layer, MAX_ACCELERATOR_LAYERS - 1)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("ascii", "replace")
