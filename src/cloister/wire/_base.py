"""What all typed messages share: one message kind, one set of fields, one encoding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from cloister.errors import MalformedMessageError
from cloister.wire import _fields, _frame
from cloister.wire._limits import MAX_MESSAGE_BYTES, MAX_PATIENCE_S


@dataclass(frozen=True)
class Message:
    """Base of the typed messages. A subclass checks its fields in `__post_init__`, so that no wrong one exists."""

    KIND: ClassVar[str]
    MAX_BYTES: ClassVar[int] = MAX_MESSAGE_BYTES

    def to_bytes(self) -> bytes:
        """The one encoding of this message."""
        return _frame.pack(self.KIND, self._body())

    @classmethod
    def parse(cls, blob: bytes | bytearray | memoryview) -> Self:
        """Parse untrusted bytes. Total: gives a checked message or raises a `WireError`."""
        return cls.from_body(_frame.unpack(blob, cls.KIND, max_bytes=cls.MAX_BYTES))

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Build from an untrusted body; every key must be a field and every field present."""
        _fields.check_keys(cls.KIND, body, tuple(f.name for f in fields(cls)))
        return cls(**body)

    def _body(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Patient(Message):
    """A request that may be answered by progress after `patience_s` seconds."""

    patience_s: float

    def _check_patience(self) -> None:
        if type(self.patience_s) is int:  # natural to write, and another CBOR encoding: one form only goes out
            object.__setattr__(self, "patience_s", float(self.patience_s))
        _fields.check_seconds("patience_s", self.patience_s, MAX_PATIENCE_S)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """As the base; an integer on the wire is refused, so that the message has one encoding."""
        if not isinstance(body.get("patience_s"), float):
            raise MalformedMessageError("patience_s is not a number of seconds")
        return super().from_body(body)
