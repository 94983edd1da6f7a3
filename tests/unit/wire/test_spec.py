"""spec/wire.md states the numbers, kinds and fields that the code has."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from cloister import channel, wire

_SPEC = (Path(__file__).parents[3] / "spec" / "wire.md").read_text()
_MESSAGES: list[Any] = [wire.Header, wire.Envelope, wire.Evidence, *typing.get_args(wire.RecordMessage)]


@pytest.mark.parametrize(
    "limit", [wire.MAX_MESSAGE_BYTES, wire.MAX_ENVELOPE_BYTES, channel.MAX_FLIGHT_BYTES, wire.MAX_SHARDS]
)
def test_limits(limit: int) -> None:
    assert f"{limit:,}" in _SPEC


@pytest.mark.parametrize(
    "message", [*_MESSAGES, channel.NodeProof, channel.AttestedNodeProof], ids=lambda m: m.__name__
)
def test_kinds_and_fields(message: Any) -> None:
    section = _SPEC.split(f"| `{message.KIND}` |", 1)[1]
    for field in dataclasses.fields(message):
        assert f"`{field.name}`" in section


def test_labels() -> None:
    assert channel.V.decode() in _SPEC
    assert channel.SUITE_ID.decode() in _SPEC
