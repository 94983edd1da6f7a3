"""What travels in the clear: the envelope that Flower carries, the record header, and evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from cloister.errors import CloisterError
from cloister.wire import _fields, _limits
from cloister.wire._base import Message

EnvelopeKind = Literal["f1", "f2", "f3", "f4", "record", "error"]
_ENVELOPE_KINDS = ("f1", "f2", "f3", "f4", "record", "error")
_MAX_ERROR_CODE_BYTES = 64


@dataclass(frozen=True)
class Envelope(Message):
    """What the relay carries, opaque to it. Public: the relay sees the kind and the size.

    Attributes:
        kind: a handshake flight, a record, or "error".
        body: the flight or record; for "error", the ASCII stable code of `cloister.errors` and nothing else.
    """

    KIND: ClassVar[str] = "envelope"
    MAX_BYTES: ClassVar[int] = _limits.MAX_ENVELOPE_BYTES

    kind: EnvelopeKind
    body: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_choice("envelope kind", self.kind, _ENVELOPE_KINDS)
        _fields.check_bytes("envelope body", self.body, _limits.MAX_ENVELOPE_BYTES)
        if self.kind == "error":
            _fields.check_bytes("error code", self.body, _MAX_ERROR_CODE_BYTES)
            _fields.check_text("error code", self.body.decode("ascii", "replace"), _fields.ERROR_CODE)

    @classmethod
    def for_error(cls, error: CloisterError | type[CloisterError]) -> Self:
        """The envelope that tells a peer of `error`: its stable code, never its cause."""
        return cls("error", error.code.encode("ascii"))

    @property
    def error_code(self) -> str:
        """The stable code of an "error" envelope, else empty. Unauthenticated: the relay can forge it."""
        return self.body.decode("ascii") if self.kind == "error" else ""


@dataclass(frozen=True)
class Header(Message):
    """Clear, authenticated header of a record. Public: the relay sees it.

    Attributes:
        run_id: the run this record belongs to.
        round: 0 outside of rounds; rounds count from 1.
        kind: what the record is for, a name such as "prepare".
        sender: "server" or the client's name in the job.
        receiver: likewise.
        attempt: counts the retries of one request.
    """

    KIND: ClassVar[str] = "header"
    MAX_BYTES: ClassVar[int] = _limits.MAX_HEADER_BYTES

    run_id: str
    round: int
    kind: str
    sender: str
    receiver: str
    attempt: int = 0

    def __post_init__(self) -> None:
        _fields.check_text("run_id", self.run_id, _fields.RUN_ID)
        _fields.check_count("round", self.round, _limits.MAX_ROUND)
        _fields.check_text("header kind", self.kind, _fields.HEADER_KIND)
        _fields.check_text("sender", self.sender, _fields.NAME)
        _fields.check_text("receiver", self.receiver, _fields.NAME)
        _fields.check_count("attempt", self.attempt, _limits.MAX_ATTEMPT)


@dataclass(frozen=True)
class Evidence(Message):
    """Signed claims of an attester, of one TEE type.

    Public, and still sealed in the handshake, so that the relay does not learn the platform.

    Attributes:
        type: which verifier reads it, e.g. "tdx" or "simulated".
        blob: the quote or report as the hardware made it.
        aux: collateral (JSON) that the verifier needs, may be empty.
    """

    KIND: ClassVar[str] = "evidence"
    MAX_BYTES: ClassVar[int] = _limits.MAX_EVIDENCE_BYTES

    type: str
    blob: bytes = field(repr=False)
    aux: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_text("evidence type", self.type, _fields.NAME)
        _fields.check_bytes("evidence blob", self.blob, _limits.MAX_EVIDENCE_BLOB_BYTES)
        _fields.check_bytes("evidence aux", self.aux, _limits.MAX_EVIDENCE_AUX_BYTES)
