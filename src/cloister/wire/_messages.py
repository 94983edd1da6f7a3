"""Typed messages inside records: secret to the relay, seen by the one client and the server enclave only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, cast

from cloister.errors import LimitExceededError, MalformedMessageError
from cloister.wire import _fields, _frame, _limits
from cloister.wire._base import Message, Patient
from cloister.wire._round_messages import AdmitAnswer, AdmitRequest, RoundAnswer, RoundProgress, RoundRequest

Boundary = Literal["int8", "bf16", "fp32"]
Task = Literal["causal-lm", "sequence-classification"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class PrepareRequest(Patient):
    """Server to client: run the near side over your text and upload sealed shards.

    Attributes:
        job_sha384: the job that the client must have approved.
        patience_s: how long the client may work before it answers with its progress.
    """

    KIND: ClassVar[str] = "prepare.request"

    job_sha384: bytes
    patience_s: float

    def __post_init__(self) -> None:
        _fields.check_bytes("job_sha384", self.job_sha384, _limits.SHA384_BYTES, exact=True)
        self._check_patience()


@dataclass(frozen=True)
class PrepareProgress(Message):
    """Client to server: not done yet, ask again."""

    KIND: ClassVar[str] = "prepare.progress"

    n_done: int
    n_total: int
    n_bytes: int

    def __post_init__(self) -> None:
        _fields.check_count("n_total", self.n_total, _limits.MAX_COUNT)
        _fields.check_count("n_bytes", self.n_bytes, _limits.MAX_COUNT)
        _fields.check_count("n_done", self.n_done, self.n_total)


@dataclass(frozen=True)
class ShardEntry:
    """One sealed shard on the store.

    Attributes:
        name: hex SHA-256 of the ciphertext, its name on the store.
        n_bytes: size of the ciphertext.
        n_examples: examples in it.
        n_tokens: boundary vectors in it.
        split: "train" or "test".
    """

    name: str
    n_bytes: int
    n_examples: int
    n_tokens: int
    split: Split

    def __post_init__(self) -> None:
        _fields.check_text("shard name", self.name, _fields.HEX_SHA256)
        _fields.check_count("shard n_bytes", self.n_bytes, _limits.MAX_COUNT)
        _fields.check_count("shard n_examples", self.n_examples, _limits.MAX_COUNT)
        _fields.check_count("shard n_tokens", self.n_tokens, _limits.MAX_COUNT)
        _fields.check_choice("shard split", self.split, ("train", "test"))


_SHARD_FIELDS = tuple(f.name for f in fields(ShardEntry))


@dataclass(frozen=True)
class Manifest(Message):
    """Client to server: everything is uploaded. Names every sealed shard and carries the key that opens them.

    Attributes:
        run_id: the run.
        client: the client's name in the job.
        job_sha384: the job it worked for.
        feature_key: *secret*, 32 bytes; opens the shards. For the server enclave only.
        hidden_size: width of a boundary vector.
        boundary: number format of the boundary tensors.
        task: which labels the shards hold.
        shards: in upload order, no name twice.
        n_truncated: examples that were cut to the length limit.
    """

    KIND: ClassVar[str] = "manifest"

    run_id: str
    client: str
    job_sha384: bytes
    feature_key: bytes = field(repr=False)
    hidden_size: int
    boundary: Boundary
    task: Task
    shards: tuple[ShardEntry, ...]
    n_truncated: int

    def __post_init__(self) -> None:
        _fields.check_text("run_id", self.run_id, _fields.RUN_ID)
        _fields.check_text("client", self.client, _fields.NAME)
        _fields.check_bytes("job_sha384", self.job_sha384, _limits.SHA384_BYTES, exact=True)
        _fields.check_bytes("feature_key", self.feature_key, _limits.KEY_BYTES, exact=True)
        _fields.check_count("hidden_size", self.hidden_size, _limits.MAX_HIDDEN_SIZE, minimum=1)
        _fields.check_choice("boundary", self.boundary, ("int8", "bf16", "fp32"))
        _fields.check_choice("task", self.task, ("causal-lm", "sequence-classification"))
        _fields.check_count("n_truncated", self.n_truncated, _limits.MAX_COUNT)
        if len(self.shards) > _limits.MAX_SHARDS:
            raise LimitExceededError(f"manifest names more than {_limits.MAX_SHARDS} shards")
        if len({entry.name for entry in self.shards}) != len(self.shards):
            raise MalformedMessageError("manifest names one shard twice")

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """As the base, with the shard entries parsed one by one."""
        return super().from_body({**body, "shards": _parse_shards(body.get("shards"))})

    def _body(self) -> dict[str, object]:
        return {**super()._body(), "shards": [asdict(entry) for entry in self.shards]}


def _parse_shards(value: object) -> tuple[ShardEntry, ...]:
    if not isinstance(value, list):
        raise MalformedMessageError("manifest shards are not a list")
    entries = cast("list[object]", value)
    if len(entries) > _limits.MAX_SHARDS:
        raise LimitExceededError(f"manifest names more than {_limits.MAX_SHARDS} shards")
    return tuple(_parse_shard(entry) for entry in entries)


def _parse_shard(value: object) -> ShardEntry:
    if not isinstance(value, dict):
        raise MalformedMessageError("manifest shard is not a map")
    entry = cast("dict[str, Any]", value)
    _fields.check_keys("manifest shard", entry, _SHARD_FIELDS)
    return ShardEntry(**entry)


@dataclass(frozen=True)
class FinishRequest(Message):
    """Server to client: the run is over.

    Attributes:
        report: the report that this client may see, JSON; may be empty.
        evidence: fresh evidence over the report, encoded `Evidence`; may be empty.
        release: *secret* to the relay; what the job releases to clients, empty if nothing; at most 1 GiB.
    """

    KIND: ClassVar[str] = "finish.request"

    report: bytes = field(repr=False)
    evidence: bytes = field(repr=False)
    release: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_bytes("report", self.report, _limits.MAX_REPORT_BYTES)
        _fields.check_bytes("evidence", self.evidence, _limits.MAX_EVIDENCE_BYTES)
        _fields.check_bytes("release", self.release, _limits.MAX_RELEASE_BYTES)


@dataclass(frozen=True)
class FinishAnswer(Message):
    """Client to server: received. `report_sha384` is the digest of the report bytes it stored."""

    KIND: ClassVar[str] = "finish.answer"

    report_sha384: bytes

    def __post_init__(self) -> None:
        _fields.check_bytes("report_sha384", self.report_sha384, _limits.SHA384_BYTES, exact=True)


@dataclass(frozen=True)
class PredictRequest(Message):
    """Client to server: one shard body of boundary tensors to predict for. *Secret*: client and server enclave only."""

    KIND: ClassVar[str] = "predict.request"

    body: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_bytes("predict body", self.body, _limits.MAX_PREDICT_BYTES)


@dataclass(frozen=True)
class PredictAnswer(Message):
    """Server to client: the predictions, CBOR. *Secret*: client and server enclave only."""

    KIND: ClassVar[str] = "predict.answer"

    body: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_bytes("predict body", self.body, _limits.MAX_PREDICT_BYTES)


@dataclass(frozen=True)
class ErrorAnswer(Message):
    """Either way: the request failed. Carries the stable code only; unlike an "error" envelope it is authenticated."""

    KIND: ClassVar[str] = "error.answer"

    code: str

    def __post_init__(self) -> None:
        _fields.check_text("error code", self.code, _fields.ERROR_CODE)


RecordMessage = (
    PrepareRequest
    | PrepareProgress
    | Manifest
    | AdmitRequest
    | AdmitAnswer
    | RoundRequest
    | RoundProgress
    | RoundAnswer
    | FinishRequest
    | FinishAnswer
    | PredictRequest
    | PredictAnswer
    | ErrorAnswer
)
_BY_KIND: dict[str, type[RecordMessage]] = {
    cls.KIND: cls
    for cls in (
        PrepareRequest,
        PrepareProgress,
        Manifest,
        AdmitRequest,
        AdmitAnswer,
        RoundRequest,
        RoundProgress,
        RoundAnswer,
        FinishRequest,
        FinishAnswer,
        PredictRequest,
        PredictAnswer,
        ErrorAnswer,
    )
}


def parse_message(blob: bytes | bytearray | memoryview) -> RecordMessage:
    """Parse the plaintext of a record into its typed message. Total: gives a checked message or raises a `WireError`.

    Raises:
        MalformedMessageError: not a message, of an unknown kind, or with a wrong field.
        LimitExceededError: over a limit of spec/wire.md.
        UnsupportedVersionError: of another format version.
    """
    kind, body = _frame.unpack_any(blob)
    if kind not in _BY_KIND:
        raise MalformedMessageError(f"unknown message kind {kind}")
    return _BY_KIND[kind].from_body(body)
