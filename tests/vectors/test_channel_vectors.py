"""Every frozen channel vector through both implementations: cloister's, and the slow one that follows spec/wire.md.

One JSON file is one case: `expect` is "ok" or the class of `cloister.errors` that the receiver raises. A file with
`base` changes one flight of that file's handshake. cloister cannot be given random values, so tests put their own in
place of its modules' names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from cloister import channel, errors, wire
from cloister.channel import _chunked, _handshake, _hybrid
from cloister.errors import CloisterError, MeasurementMismatchError

FOLDER = Path(__file__).parent / "channel"
_SPEC = importlib.util.spec_from_file_location("slow_channel", Path(__file__).parents[1] / "oracle" / "slow_channel.py")
assert _SPEC is not None and _SPEC.loader is not None
slow: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["slow_channel"] = slow
_SPEC.loader.exec_module(slow)

HEX = bytes.fromhex


def _load(pattern: str) -> list[Any]:
    paths = sorted(FOLDER.glob(f"{pattern}-*.json"))
    return [pytest.param(json.loads(path.read_text()), id=path.stem) for path in paths]


def _check(expect: str, fast: Callable[[], object], slowly: Callable[[], object]) -> None:
    """Both accept, or both refuse with the error that the vector names."""
    if expect == "ok":
        fast()
        slowly()
        return
    kind = getattr(errors, expect)
    with pytest.raises(CloisterError) as caught:
        fast()
    assert type(caught.value) is kind
    with pytest.raises(slow.Refused) as refused:
        slowly()
    assert refused.value.code == kind.code


def test_there_are_vectors_of_every_kind() -> None:
    counts = {kind: len(_load(kind)) for kind in ("handshake", "record", "sealed")}
    assert counts["handshake"] >= 35 and counts["record"] >= 25 and counts["sealed"] >= 15
    for path in [p for kind in counts for p in FOLDER.glob(f"{kind}-*.json")]:
        vector = json.loads(path.read_text())
        assert {"comment", "source", "inputs", "expect"} <= set(vector), path
        assert vector["expect"] == "ok" or issubclass(getattr(errors, vector["expect"]), CloisterError), path


# --- handshakes -------------------------------------------------------------------------------------------------------


class Replay:
    """Both implementations of both sides of one recorded handshake."""

    def __init__(self, vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        base = json.loads((FOLDER / vector["base"]).read_text()) if "base" in vector else vector
        self.inputs, self.outputs = base["inputs"], base["outputs"]
        self.takes_evidence = base.get("client_proof") == "evidence"
        self.flights = [HEX(flight) for flight in self.inputs["flights"]]
        fields = self.inputs["context"]
        names = ("server_policy_sha384", "client_policy_sha384", "node_public_key")
        self.context = channel.SessionContext(fields["run_id"], fields["node_id"], *(HEX(fields[n]) for n in names))
        self.spki = self.context.node_public_key
        self._monkeypatch = monkeypatch
        self.seen: dict[str, Any] = {}

    # The fast side, with its module's names replaced.

    def _freeze(self, side: str) -> None:
        values = {name: HEX(value) for name, value in self.inputs[side].items()}
        private = hpke.MLKEM768X25519PrivateKey(
            mlkem.MLKEM768PrivateKey.from_seed_bytes(values["mlkem_seed"]),
            x25519.X25519PrivateKey.from_private_bytes(values["x25519_key"]),
        )
        key = _hybrid.EphemeralKey()
        key._private_key = private
        key.public_bytes = slow.KemKey(values["mlkem_seed"], values["x25519_key"]).public
        drawn = iter([values["nonce"], values["seed"]])
        real_seal = _hybrid.seal_seed

        def recorded_seal(public: bytes, seed: bytes, info: bytes) -> bytes:
            real_seal(public, seed, info)  # whatever it refuses, it refuses still
            assert seed == values["seed"]
            self.seen["sealed"] = (public, info)
            return values["sealed_seed"]

        self._monkeypatch.setattr(_handshake, "secrets", SimpleNamespace(token_bytes=lambda _: next(drawn)))
        self._monkeypatch.setattr(_handshake, "EphemeralKey", lambda: key)
        self._monkeypatch.setattr(_handshake, "seal_seed", recorded_seal)
        self._monkeypatch.setattr(_chunked, "os", SimpleNamespace(urandom=lambda _: values["salt"]))

    def fast_server(self) -> channel.ServerHandshake:
        self._freeze("server")

        def make_evidence(report_data: bytes) -> wire.Evidence:
            self.seen["report_data_server"] = report_data
            return wire.Evidence.parse(HEX(self.inputs["evidence"]))

        verifier: Any = channel.NodeKeyVerifier(self.spki)
        if self.takes_evidence:
            verifier = channel.EvidenceVerifier(_fast_verify)
        return channel.ServerHandshake(
            self.context, make_evidence=make_evidence, verify_client=verifier, now=lambda: 0.0
        )

    def fast_client(self) -> channel.ClientHandshake:
        self._freeze("client")

        def prove(binding: channel.Binding) -> Any:
            self.seen["binding"] = binding
            return SimpleNamespace(to_bytes=lambda: HEX(self.inputs["proof"]))

        return channel.ClientHandshake(
            self.context, prove=SimpleNamespace(prove=prove), verify_server=_fast_verify, now=lambda: 0.0
        )

    # The slow side.

    def slow_side(self, side: str) -> Any:
        values = {name: HEX(value) for name, value in self.inputs[side].items()}
        key = slow.KemKey(values.pop("mlkem_seed"), values.pop("x25519_key"))
        made = slow.SlowServer if side == "server" else slow.SlowClient
        return made(self.context.encode(), key=key, **values)

    def slow_check(self, kind: str, body: dict[str, Any], th3: bytes, ex: bytes) -> None:
        if not self.takes_evidence:
            slow.check_node_proof(self.spki, kind, body, th3, ex)
            return
        slow.need(kind == "evidence", "attest.signature")
        _slow_verify(body, slow.report_data(b"client", th3, ex))

    def fast_receives(self, name: str, flight: bytes) -> Any:
        """The receiver of one flight, after the good flights before it."""
        if name in ("f1", "f3"):
            client = self.fast_client()
            return client.flight2(flight) if name == "f1" else (client.flight2(self.flights[0]), client.flight4(flight))
        server = self.fast_server()
        server.flight1()
        return server.flight3(flight) if name == "f2" else (server.flight3(self.flights[1]), server.finish(flight))

    def slow_receives(self, name: str, flight: bytes) -> Any:
        if name in ("f1", "f3"):
            client = self.slow_side("client")
            if name == "f1":
                return client.f2(flight)
            client.f2(self.flights[0])
            return client.f4(flight, _slow_verify, lambda *_: HEX(self.inputs["proof"]))
        server = self.slow_side("server")
        server.f1()
        if name == "f2":
            return server.f3(flight, lambda _: HEX(self.inputs["evidence"]))
        server.f3(self.flights[1], lambda _: HEX(self.inputs["evidence"]))
        return server.check_f4(flight, self.slow_check)


def _fast_verify(evidence: wire.Evidence, report_data: bytes) -> str:
    if evidence.blob != report_data:
        raise MeasurementMismatchError("of another session")
    return "verified"


def _slow_verify(body: dict[str, Any], report_data: bytes) -> None:
    slow.need(body["blob"] == report_data, "attest.measurement")


@pytest.mark.parametrize("vector", _load("handshake"))
def test_handshake(vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(vector, monkeypatch)
    if vector["expect"] == "ok":
        _replay_fast(replay)
        _replay_slow(replay)
        return
    name, flight = vector["receiver"], HEX(vector["inputs"]["flight"])
    _check(vector["expect"], lambda: replay.fast_receives(name, flight), lambda: replay.slow_receives(name, flight))
    good = replay.flights[int(name[1]) - 1]
    assert flight != good
    replay.fast_receives(name, good)  # it was the altered flight, and nothing else, that was refused
    replay.slow_receives(name, good)


def _replay_fast(replay: Replay) -> None:
    """Each side alone makes its recorded flights from the other's, byte for byte, and all the same secrets."""
    out, (f1, f2, f3, f4) = replay.outputs, replay.flights
    server = replay.fast_server()
    assert server.flight1() == f1
    assert server._th.hex() == out["th"][0]
    assert server.flight3(f2) == f3
    assert replay.seen["report_data_server"].hex() == out["report_data_server"]
    assert replay.seen["sealed"][1].hex() == out["th"][1]
    assert (server._th.hex(), server._hs.hex(), server._ex.hex()) == (out["th"][3], out["hs"], out["ex"])
    sessions = {"server": server.finish(f4)}
    client = replay.fast_client()
    assert client.flight2(f1) == f2
    assert client._th.hex() == out["th"][1]
    flight4, sessions["client"] = client.flight4(f3)
    assert flight4 == f4
    binding = replay.seen["binding"]
    assert (binding.th.hex(), binding.ex.hex()) == (out["th"][3], out["ex"])
    assert binding.report_data.hex() == out["report_data_client"]
    for session in sessions.values():
        assert session.session_id.hex() == out["session_id"]
        chains = (session._out, session._in) if session is sessions["server"] else (session._in, session._out)
        assert [bytes(chain._key).hex() for chain in chains] == [out["k_s"], out["k_c"]]
    for role, records in out.get("records", {}).items():
        other = sessions["client" if role == "server" else "server"]
        for entry in records:
            monkeypatch_salt(replay._monkeypatch, HEX(entry["salt"]))
            assert sessions[role]._out.message_key().hex() == entry["key"]
            made = sessions[role].seal(wire.Header.parse(HEX(entry["header"])), bytes(entry["n_bytes"]))
            assert (len(made), hashlib.sha256(made).hexdigest()) == (entry["record_bytes"], entry["record_sha256"])
            assert other.open(made)[1] == bytes(entry["n_bytes"])


def monkeypatch_salt(monkeypatch: pytest.MonkeyPatch, salt: bytes) -> None:
    monkeypatch.setattr(_chunked, "os", SimpleNamespace(urandom=lambda _: salt))


def _replay_slow(replay: Replay) -> None:
    out, (f1, f2, f3, f4) = replay.outputs, replay.flights
    server, client = replay.slow_side("server"), replay.slow_side("client")
    assert server.f1() == f1
    assert client.f2(f1) == f2
    assert server.f3(f2, lambda _: HEX(replay.inputs["evidence"])) == f3
    assert client.f4(f3, _slow_verify, lambda *_: HEX(replay.inputs["proof"])) == f4
    server.check_f4(f4, replay.slow_check)
    for side in (server, client):
        assert [th.hex() for th in side.th] == out["th"]
        assert (side.hs.hex(), side.ex.hex(), side.session_id().hex()) == (out["hs"], out["ex"], out["session_id"])
        assert (side.chain(b"s").hex(), side.chain(b"c").hex()) == (out["k_s"], out["k_c"])
        assert slow.report_data(b"client", side.th[3], side.ex).hex() == out["report_data_client"]
    for role, records in out.get("records", {}).items():
        session = slow.SlowSession.of(role, replay.context.run_id, replay.context.node_id, server.hs, server.th[4])
        for entry in records:
            assert session.message_key(session.out).hex() == entry["key"]
            made = session.seal(HEX(entry["header"]), bytes(entry["n_bytes"]), HEX(entry["salt"]))
            assert (len(made), hashlib.sha256(made).hexdigest()) == (entry["record_bytes"], entry["record_sha256"])


# --- records and sealed files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", _load("record"))
def test_record(vector: dict[str, Any]) -> None:
    inputs = vector["inputs"]
    context = channel.SessionContext(inputs["run_id"], inputs["client"], bytes(48), bytes(48), b"spki")
    hs, th4 = HEX(inputs["hs"]), HEX(inputs["th4"])
    fast = channel.Session(
        role=inputs["receiver"], context=context, hs=hs, th=th4, peer=None, now=lambda: 0.0, max_session_age_s=1.0
    )
    slowly = slow.SlowSession.of(inputs["receiver"], inputs["run_id"], inputs["client"], hs, th4)
    *before, last = [HEX(record) for record in inputs["records"]]
    opened = []
    for record in before:
        opened.append(fast.open(record)[1])
        assert slowly.open(record)[1] == opened[-1]

    def open_last(session: Any) -> None:
        text = session.open(last)[1]
        if session is fast:
            opened.append(text)
        else:
            assert text == opened[-1]

    at = (fast._in.seq, bytes(fast._in._key), dict(slowly.seqs))
    _check(vector["expect"], lambda: open_last(fast), lambda: open_last(slowly))
    if vector["expect"] == "ok":
        assert [hashlib.sha256(text).hexdigest() for text in opened] == vector["outputs"]["plaintext_sha256"]
    else:
        assert at == (fast._in.seq, bytes(fast._in._key), dict(slowly.seqs)), "a refused record changes nothing"


@pytest.mark.parametrize("vector", _load("sealed"))
def test_sealed_file(vector: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = vector["inputs"]
    path, blob, key = tmp_path / "file.sealed", HEX(inputs["file"]), HEX(inputs["key"])
    path.write_bytes(blob)
    opened = []
    _check(
        vector["expect"],
        lambda: opened.append(channel.read_sealed(path, key=key, label=inputs["label"], at_least=inputs["at_least"])),
        lambda: opened.append(slow.open_file(key, inputs["label"], blob, inputs["at_least"])),
    )
    if vector["expect"] == "ok":
        out = vector["outputs"]
        assert opened == [(out["version"], HEX(out["plaintext"]))] * 2
        monkeypatch_salt(monkeypatch, HEX(out["salt"]))
        channel.write_sealed(path, opened[0][1], key=key, label=inputs["label"], version=out["version"])
        again = slow.seal_file(key, inputs["label"], out["version"], opened[0][1], HEX(out["salt"]))
        assert path.read_bytes() == blob == again


def test_the_files_that_the_generator_writes_are_all_here() -> None:
    """Nothing beside them: a vector that is renamed does not leave its old file behind."""
    known = {path.name for kind in ("handshake", "record", "sealed") for path in FOLDER.glob(f"{kind}-*.json")}
    others = {"frozen.json"}
    assert {path.name for path in FOLDER.glob("*.json")} == known | others
