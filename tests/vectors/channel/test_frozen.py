"""Format version 1 is frozen: old records and sealed files still open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cloister import channel

_VECTOR: dict[str, Any] = json.loads(Path(__file__).with_name("frozen.json").read_text())


def test_records_still_open() -> None:
    fields = _VECTOR["context"]
    context = channel.SessionContext(
        fields["run_id"],
        fields["node_id"],
        *(bytes.fromhex(fields[k]) for k in ("server_policy_sha384", "client_policy_sha384", "node_public_key")),
    )
    assert context.encode().hex() == _VECTOR["context_hex"]
    client = channel.Session(
        role="client",
        context=context,
        hs=bytes.fromhex(_VECTOR["hs"]),
        th=bytes.fromhex(_VECTOR["th"]),
        peer=None,
        now=lambda: 0.0,
        max_session_age_s=1.0,
    )
    assert client.session_id.hex() == _VECTOR["session_id"]
    for i, (record, plaintext) in enumerate(zip(_VECTOR["records"], _VECTOR["plaintexts"], strict=True)):
        header, opened = client.open(bytes.fromhex(record))
        assert (header.kind, header.round, opened.hex()) == ("prepare", i, plaintext)


def test_a_sealed_file_still_opens(tmp_path: Path) -> None:
    sealed = _VECTOR["sealed"]
    path = tmp_path / "old.sealed"
    path.write_bytes(bytes.fromhex(sealed["hex"]))
    opened = channel.read_sealed(path, key=bytes.fromhex(sealed["key"]), label=sealed["label"])
    assert opened == (sealed["version"], bytes.fromhex(sealed["plaintext"]))
