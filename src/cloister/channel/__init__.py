"""The end-to-end channel through an untrusted relay, its key bound to accepted evidence; sealed streams and files.

Success of a handshake means that the peer of this session's secret is the one that was verified. What Python cannot
give: keys are dropped and overwritten where possible, copies made by the interpreter are not. Normative: spec/wire.md.
"""

from __future__ import annotations

from cloister.channel._chunked import ciphertext_size, decrypt_chunked, encrypt_chunked, plaintext_size
from cloister.channel._counter import CountedFile, Counter, Uncounted
from cloister.channel._handshake import MAX_FLIGHT_BYTES, ClientHandshake, ServerHandshake
from cloister.channel._kdf import SUITE_ID, V, derive_key
from cloister.channel._proof import (
    AttestedNodeProof,
    AttestedNodeProver,
    AttestedNodeVerifier,
    Binding,
    ClientProver,
    ClientVerifier,
    EvidenceProver,
    EvidenceVerifier,
    NodeKeyProver,
    NodeKeyVerifier,
    NodeProof,
    Proof,
    VerifiedNode,
)
from cloister.channel._sealed import read_sealed, write_sealed
from cloister.channel._session import DEFAULT_MAX_SESSION_AGE_S, Session, SessionContext, peek_header
from cloister.channel._stream import ChunkedReader, ChunkedWriter

__all__ = [
    "DEFAULT_MAX_SESSION_AGE_S",
    "MAX_FLIGHT_BYTES",
    "SUITE_ID",
    "AttestedNodeProof",
    "AttestedNodeProver",
    "AttestedNodeVerifier",
    "Binding",
    "ChunkedReader",
    "ChunkedWriter",
    "ClientHandshake",
    "ClientProver",
    "ClientVerifier",
    "CountedFile",
    "Counter",
    "EvidenceProver",
    "EvidenceVerifier",
    "NodeKeyProver",
    "NodeKeyVerifier",
    "NodeProof",
    "Proof",
    "ServerHandshake",
    "Session",
    "SessionContext",
    "Uncounted",
    "V",
    "VerifiedNode",
    "ciphertext_size",
    "decrypt_chunked",
    "derive_key",
    "encrypt_chunked",
    "peek_header",
    "plaintext_size",
    "read_sealed",
    "write_sealed",
]
