"""Message encoding with version tags and parse limits; nothing else touches bytes. Normative: spec/wire.md.

Every `parse` is total: any bytes give a checked value or a `WireError`, within the limits listed here.
"""

from __future__ import annotations

from cloister.wire._envelope import Envelope, EnvelopeKind, Evidence, Header
from cloister.wire._frame import dec, enc, pack, unpack, unpack_any
from cloister.wire._limits import (
    KEY_BYTES,
    MAX_ENVELOPE_BYTES,
    MAX_EVIDENCE_AUX_BYTES,
    MAX_EVIDENCE_BLOB_BYTES,
    MAX_EVIDENCE_BYTES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PREDICT_BYTES,
    MAX_RELEASE_BYTES,
    MAX_REPORT_BYTES,
    MAX_SHARDS,
    SHA384_BYTES,
    VERSION,
)
from cloister.wire._messages import (
    Boundary,
    ErrorAnswer,
    FinishAnswer,
    FinishRequest,
    Manifest,
    PredictAnswer,
    PredictRequest,
    PrepareProgress,
    PrepareRequest,
    RecordMessage,
    ShardEntry,
    Split,
    Task,
    parse_message,
)

__all__ = [
    "KEY_BYTES",
    "MAX_ENVELOPE_BYTES",
    "MAX_EVIDENCE_AUX_BYTES",
    "MAX_EVIDENCE_BLOB_BYTES",
    "MAX_EVIDENCE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_PREDICT_BYTES",
    "MAX_RELEASE_BYTES",
    "MAX_REPORT_BYTES",
    "MAX_SHARDS",
    "SHA384_BYTES",
    "VERSION",
    "Boundary",
    "Envelope",
    "EnvelopeKind",
    "ErrorAnswer",
    "Evidence",
    "FinishAnswer",
    "FinishRequest",
    "Header",
    "Manifest",
    "PredictAnswer",
    "PredictRequest",
    "PrepareProgress",
    "PrepareRequest",
    "RecordMessage",
    "ShardEntry",
    "Split",
    "Task",
    "dec",
    "enc",
    "pack",
    "parse_message",
    "unpack",
    "unpack_any",
]
