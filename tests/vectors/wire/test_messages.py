"""Format version 1 is frozen: each message keeps its one encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloister import channel, wire

_VECTORS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("messages.json").read_text())


def _parse(vector: dict[str, Any]) -> Any:
    blob = bytes.fromhex(vector["hex"])
    if vector["kind"] == channel.AttestedNodeProof.KIND:
        return channel.AttestedNodeProof.from_body(wire.unpack(blob, vector["kind"]))
    if vector["kind"] == channel.NodeProof.KIND:
        return channel.NodeProof.from_body(wire.unpack(blob, vector["kind"]))
    if vector["kind"] in ("header", "envelope", "evidence"):
        return {"header": wire.Header, "envelope": wire.Envelope, "evidence": wire.Evidence}[vector["kind"]].parse(blob)
    return wire.parse_message(blob)


@pytest.mark.parametrize("vector", _VECTORS, ids=lambda vector: vector["comment"])
def test_encoding_is_frozen(vector: dict[str, Any]) -> None:
    message = _parse(vector)
    assert repr(message) == vector["repr"]
    assert message.to_bytes().hex() == vector["hex"]
