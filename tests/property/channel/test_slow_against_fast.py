"""cloister's channel and the slow one that follows spec/wire.md alone talk to each other, in either role."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister import channel, wire
from cloister.errors import ChannelError, CloisterError, WireError
from cloister.wire import _cbor

_SPEC = importlib.util.spec_from_file_location("slow_channel", Path(__file__).parents[2] / "oracle" / "slow_channel.py")
assert _SPEC is not None and _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["slow_channel"] = slow
_SPEC.loader.exec_module(slow)

_SETTINGS = settings(deadline=None, derandomize=True, max_examples=25)
_KEY = ec.generate_private_key(ec.SECP384R1())
_SPKI = _KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
_CONTEXT = channel.SessionContext("run-1", "north", b"\1" * 48, b"\2" * 48, _SPKI)
_CHUNK = 16_384
_SIZES = st.integers(0, 100) | st.builds(lambda n, d: max(0, n * _CHUNK + d), st.integers(0, 3), st.integers(-1, 1))
_TRAFFIC = st.lists(st.tuples(st.sampled_from(["server", "client"]), _SIZES), max_size=5)


def _evidence(report_data: bytes) -> bytes:
    return slow.pack("evidence", {"type": "vector", "blob": report_data, "aux": b""})


def _check(body: dict[str, Any], report_data: bytes) -> None:
    slow.need(body["blob"] == report_data, "attest.measurement")


def _fast_check(evidence: wire.Evidence, report_data: bytes) -> None:
    assert evidence.blob == report_data


def _sessions(fast_role: str) -> tuple[Any, Any]:
    """A handshake; returns (the fast session, the slow one)."""
    if fast_role == "client":
        server = slow.SlowServer(_CONTEXT.encode())
        client = channel.ClientHandshake(
            _CONTEXT, prove=channel.NodeKeyProver(_KEY), verify_server=_fast_check, now=lambda: 0.0
        )
        flight4, fast = client.flight4(server.f3(client.flight2(server.f1()), _evidence))
        server.check_f4(flight4, lambda *found: slow.check_node_proof(_SPKI, *found))
        return fast, slow.SlowSession.of("server", "run-1", "north", server.hs, server.th[4])
    fast_server = channel.ServerHandshake(
        _CONTEXT,
        make_evidence=lambda report_data: wire.Evidence.parse(_evidence(report_data)),
        verify_client=channel.NodeKeyVerifier(_SPKI),
        now=lambda: 0.0,
    )
    slow_client = slow.SlowClient(_CONTEXT.encode())
    flight3 = fast_server.flight3(slow_client.f2(fast_server.flight1()))
    flight4 = slow_client.f4(flight3, _check, lambda th3, ex: slow.node_proof(_KEY, th3, ex))
    return fast_server.finish(flight4), slow.SlowSession.of(
        "client", "run-1", "north", slow_client.hs, slow_client.th[4]
    )


@pytest.mark.parametrize("fast_role", ["server", "client"])
@_SETTINGS
@given(traffic=_TRAFFIC)
def test_they_understand_each_other(fast_role: str, traffic: list[tuple[str, int]]) -> None:
    fast, slowly = _sessions(fast_role)
    assert fast.session_id == slowly.session_id
    for i, (sender, size) in enumerate(traffic):
        text = (b"0123456789abcdef-" * (size // 17 + 1))[:size]
        if sender == fast_role:
            fields, opened = slowly.open(fast.seal(fast.header("x", round=1, attempt=i), text))
            assert (fields["receiver"] == sender, fields["attempt"]) == (False, i)
        else:
            header, opened = fast.open(slowly.seal(slowly.header("x", attempt=i), text))
            assert (header.receiver == sender, header.attempt) == (False, i)
        assert opened == text


@_SETTINGS
@given(size=_SIZES, context=st.binary(max_size=30), at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_they_open_and_refuse_the_same_ciphertexts(size: int, context: bytes, at: float, cut: bool) -> None:
    key, text = bytes(range(32)), bytes(i % 251 for i in range(size))
    for sealed in (channel.encrypt_chunked(key, text, context), slow.chunked_seal(key, context, text)):
        assert channel.decrypt_chunked(key, sealed, context) == slow.chunked_open(key, context, sealed) == text
        place = int(at * len(sealed))
        altered = sealed[:place] if cut else sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        with pytest.raises(ChannelError):
            channel.decrypt_chunked(key, altered, context)
        with pytest.raises(slow.Refused):
            slow.chunked_open(key, context, altered)


@_SETTINGS
@given(key=st.binary(min_size=32, max_size=32), label=st.text(max_size=9), version=st.integers(0, 2**64 - 1))
def test_sealed_files_go_both_ways(tmp_path_factory: Any, key: bytes, label: str, version: int) -> None:
    path = tmp_path_factory.getbasetemp() / "both.sealed"
    channel.write_sealed(path, b"state", key=key, label=label, version=version)
    assert slow.open_file(key, label, path.read_bytes()) == (version, b"state")
    path.write_bytes(slow.seal_file(key, label, version, b"other"))
    assert channel.read_sealed(path, key=key, label=label) == (version, b"other")


def test_they_agree_on_a_client_that_proves_enclave_and_name() -> None:
    server = slow.SlowServer(_CONTEXT.encode())
    prover = channel.AttestedNodeProver(_KEY, lambda report_data: wire.Evidence.parse(_evidence(report_data)))
    client = channel.ClientHandshake(_CONTEXT, prove=prover, verify_server=_fast_check, now=lambda: 0.0)
    flight4, _ = client.flight4(server.f3(client.flight2(server.f1()), _evidence))
    server.check_f4(flight4, lambda *found: slow.check_attested_node_proof(_SPKI, _check, *found))


_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(_SETTINGS, max_examples=150)
@given(value=_VALUES, blob=st.binary(max_size=30), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_they_read_the_same_bytes_as_cbor(value: Any, blob: bytes, place: float, bit: int) -> None:
    encoded = _cbor.encode(value)
    assert slow.cbor(value) == encoded
    altered = bytearray(encoded)
    altered[int(place * len(altered))] ^= 1 << bit
    for candidate in (encoded, bytes(altered), blob, cbor2.dumps(value)):
        found: list[Any] = []
        for read in (_cbor.decode, slow.uncbor):
            try:
                found.append(("ok", _cbor.encode(read(candidate))))
            except WireError as error:
                found.append((error.code, b""))
            except slow.Refused as error:
                found.append((error.code, b""))
        assert found[0] == found[1]


@settings(_SETTINGS, max_examples=100)
@given(header=st.binary(max_size=60), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_they_refuse_the_same_headers(header: bytes, at: float, bit: int) -> None:
    good = bytearray(wire.Header("run-1", 1, "prepare", "server", "north", 3).to_bytes())
    good[int(at * len(good))] ^= 1 << bit
    for candidate in (header, b"CLST\x01" + header, bytes(good)):
        found: list[str] = []
        for read in (wire.Header.parse, slow.parse_header):
            try:
                read(candidate)
                found.append("ok")
            except (CloisterError, slow.Refused) as error:
                found.append(error.code)
        assert found[0] == found[1]
