"""Writes the frozen channel vectors anew: `python tests/vectors/channel/make_vectors.py`. Not run by any test.

The flights, records and files come from the slow implementation (tests/oracle), which follows spec/wire.md alone. HPKE
encapsulation and ECDSA are randomised inside the cryptographic library: their results are recorded, with the private
keys that open and check them. All else follows from the random values in the file, so each side can be replayed alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "oracle"))
import slow_channel as slow  # noqa: E402

SOURCE = "tests/vectors/channel/make_vectors.py, slow implementation of spec/wire.md"
RUN, CLIENT = "run-1", "north"
KEY = bytes(range(32))


def fixed(label: str, n: int) -> bytes:
    """Bytes that are the same in every run of this script."""
    return hashlib.shake_256(b"cloister vectors/" + label.encode()).digest(n)


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def write(name: str, comment: str, expect: str, inputs: dict[str, Any], **rest: Any) -> None:
    vector = {"comment": comment, "source": SOURCE, "expect": expect, **rest, "inputs": inputs}
    (HERE / f"{name}.json").write_text(json.dumps(plain(vector), indent=1) + "\n")


def digests(*plaintexts: bytes) -> dict[str, Any]:
    return {"plaintext_sha256": [hashlib.sha256(text).digest() for text in plaintexts]}


def flipped(blob: bytes, at: int) -> bytes:
    altered = bytearray(blob)
    altered[at] ^= 1
    return bytes(altered)


# --- handshakes -------------------------------------------------------------------------------------------------------

NODE_KEY = ec.derive_private_key(int.from_bytes(fixed("node key", 47), "big"), ec.SECP384R1())
OTHER_KEY = ec.derive_private_key(int.from_bytes(fixed("other key", 47), "big"), ec.SECP384R1())
SPKI = NODE_KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
CONTEXT = {
    "run_id": RUN,
    "node_id": CLIENT,
    "server_policy_sha384": b"\x01" * 48,
    "client_policy_sha384": b"\x02" * 48,
    "node_public_key": SPKI,
}


def evidence(report_data: bytes) -> bytes:
    """Evidence of a type that no verifier knows: its blob is the report data, and that is all that vectors compare."""
    return slow.pack("evidence", {"type": "vector", "blob": report_data, "aux": b"collateral"})


def side(cls: Any, label: str, context: dict[str, Any] = CONTEXT) -> Any:
    key = slow.KemKey(fixed(f"{label} ml-kem", 64), fixed(f"{label} x25519", 32))
    values = {name: fixed(f"{label} {name}", n) for name, n in (("nonce", 32), ("seed", 32), ("salt", 24))}
    return cls(slow.ctx(*context.values()), key=key, **values)


def randomness(made: Any, sealed_seed: bytes) -> dict[str, bytes]:
    return {
        "nonce": made.nonce,
        "mlkem_seed": made.key.mlkem_seed,
        "x25519_key": made.key.x25519_key,
        "seed": made.seed,
        "salt": made.salt,
        "sealed_seed": sealed_seed,
    }


def handshake(
    *,
    client_context: dict[str, Any] = CONTEXT,
    make_evidence: Any = evidence,
    prove: Any = lambda th3, ex: slow.node_proof(NODE_KEY, th3, ex),
) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
    """Inputs and outputs of a handshake; both sides are lenient, so that a wrong one can be made to its end."""
    server, client = side(slow.SlowServer, "server"), side(slow.SlowClient, "client", client_context)
    proofs: list[bytes] = []
    seen: dict[str, bytes] = {}

    def prove_and_keep(th3: bytes, ex: bytes) -> bytes:
        proofs.append(prove(th3, ex))
        return proofs[0]

    def keep_evidence(report_data: bytes) -> bytes:
        seen.setdefault("report_data_server", report_data)
        seen["evidence"] = make_evidence(report_data)
        return seen["evidence"]

    f1 = server.f1()
    f2 = client.f2(f1)
    f3 = server.f3(f2, keep_evidence)
    f4 = client.f4(f3, lambda *_: None, prove_and_keep)
    server.check_f4(f4, lambda *_: None)
    inputs = {
        "context": CONTEXT,
        "server": randomness(server, slow.dec(f3, 2)[0]),
        "client": randomness(client, slow.dec(f2, 3)[2]),
        "evidence": seen["evidence"],
        "proof": proofs[0],
        "flights": [f1, f2, f3, f4],
    }
    assert server.th == client.th
    outputs = {
        "th": server.th,
        "hs": server.hs,
        "ex": server.ex,
        "report_data_server": seen["report_data_server"],
        "report_data_client": slow.report_data(b"client", server.th[3], server.ex),
        "k_s": server.chain(b"s"),
        "k_c": server.chain(b"c"),
        "session_id": server.session_id(),
    }
    return inputs, outputs, server, client


def first_records(server: Any) -> dict[str, Any]:
    """Three records each way, the last over a chunk border. Their plaintexts are zero bytes."""
    records: dict[str, Any] = {}
    for role in ("server", "client"):
        session = slow.SlowSession.of(role, RUN, CLIENT, server.hs, server.th[4])
        records[role] = []
        for i, text in enumerate((b"", bytes(11), bytes(16_385))):
            header, salt = session.header("prepare", attempt=i), fixed(f"{role} salt {i}", 24)
            key = session.message_key(session.out)
            made = session.seal(header, text, salt)
            entry = {"key": key, "header": header, "salt": salt, "n_bytes": len(text), "record_bytes": len(made)}
            records[role].append(entry | {"record_sha256": hashlib.sha256(made).digest()})
    return records


def write_handshakes() -> None:
    inputs, outputs, server, _ = handshake()
    outputs["records"] = first_records(server)
    write("handshake-node-key", "client with a node key; th0 to th4, keys, and the first records both ways", "ok",
          inputs, outputs=outputs)  # fmt: skip
    tee, tee_outputs, _, _ = handshake(prove=lambda th3, ex: evidence(slow.report_data(b"client", th3, ex)))
    write("handshake-client-evidence", "client with a TEE: evidence in F4", "ok", tee, outputs=tee_outputs,
          client_proof="evidence")  # fmt: skip

    base = "handshake-node-key.json"
    f1, f2, f3, f4 = inputs["flights"]

    def refuse(name: str, comment: str, expect: str, receiver: str, flight: bytes, **more: Any) -> None:
        write(f"handshake-{name}", comment, expect, {"flight": flight, **more}, base=base, receiver=receiver)

    nonce_s, public_s = slow.dec(f1, 2)
    nonce_c, public_c, c1 = slow.dec(f2, 3)
    c2, s3 = slow.dec(f3, 2)
    refuse("f1-short-nonce", "a nonce of 31 bytes, the key one longer", "MalformedMessageError", "f1",
           slow.enc(nonce_s[1:], public_s + b"\x00"))  # fmt: skip
    refuse("f1-low-order-point", "an X25519 point that gives no secret", "MalformedMessageError", "f1",
           slow.enc(nonce_s, public_s[:1184] + bytes(32)))  # fmt: skip
    refuse("f1-mlkem-coefficient", "an ML-KEM coefficient out of range", "MalformedMessageError", "f1",
           slow.enc(nonce_s, b"\xff" * 1184 + public_s[1184:]))  # fmt: skip
    refuse("f1-longer", "one byte more than F1 has", "LimitExceededError", "f1", f1 + b"\x00")
    refuse("f1-shorter", "one byte less than F1 has", "MalformedMessageError", "f1", f1[:-1])
    refuse("f2-nonce", "one bit of nC", "DecryptionError", "f2", slow.enc(flipped(nonce_c, 0), public_c, c1))
    refuse("f2-key", "one bit of pkC", "DecryptionError", "f2", slow.enc(nonce_c, flipped(public_c, 1200), c1))
    refuse("f2-mlkem", "one bit of the ML-KEM part of c1", "DecryptionError", "f2",
           slow.enc(nonce_c, public_c, flipped(c1, 0)))  # fmt: skip
    refuse("f2-x25519", "one bit of the X25519 part of c1", "DecryptionError", "f2",
           slow.enc(nonce_c, public_c, flipped(c1, 1100)))  # fmt: skip
    refuse("f2-low-order-point", "an X25519 share in c1 that gives no secret", "DecryptionError", "f2",
           slow.enc(nonce_c, public_c, c1[:1088] + bytes(32) + c1[1120:]))  # fmt: skip
    refuse("f2-tag", "one bit of the tag of c1", "DecryptionError", "f2",
           slow.enc(nonce_c, public_c, flipped(c1, -1)))  # fmt: skip
    refuse("f2-left-over", "one byte behind c1", "LimitExceededError", "f2", f2 + b"\x00")
    refuse("f2-two-parts", "c1 is missing", "MalformedMessageError", "f2", slow.enc(nonce_c, public_c))
    refuse("f3-c2", "one bit of c2", "DecryptionError", "f3", slow.enc(flipped(c2, 5), s3))
    refuse("f3-commitment", "one bit of the commitment of s3", "DecryptionError", "f3",
           slow.enc(c2, flipped(s3, 30)))  # fmt: skip
    refuse("f3-evidence-bit", "one bit of the sealed evidence", "DecryptionError", "f3", slow.enc(c2, flipped(s3, 60)))
    refuse("f3-left-over", "one byte behind s3", "MalformedMessageError", "f3", f3 + b"\x00")
    refuse("f3-replayed-f4", "F4 in place of F3", "MalformedMessageError", "f3", f4)
    refuse("f4-bit", "one bit of F4", "DecryptionError", "f4", flipped(f4, -20))
    refuse("f4-truncated", "F4 without its last byte", "DecryptionError", "f4", f4[:-1])
    refuse("f4-reflected", "the server's own s3 in place of F4", "DecryptionError", "f4", s3)
    refuse("f4-empty", "nothing", "DecryptionError", "f4", b"")

    for field, value in (("run_id", "run-2"), ("node_id", "south"), ("server_policy_sha384", b"\x07" * 48),
                         ("client_policy_sha384", b"\x07" * 48)):  # fmt: skip
        other = side(slow.SlowClient, "client", {**CONTEXT, field: value})
        name = field.removesuffix("_sha384").replace("_", "-")
        refuse(f"context-{name}", f"F2 of a client with another {field}", "DecryptionError", "f2", other.f2(f1))

    def forge_f3(name: str, comment: str, expect: str, made: Any) -> None:
        forger = side(slow.SlowServer, "server")
        forger.f1()
        refuse(name, comment, expect, "f3", forger.f3(f2, made))

    forge_f3("f3-other-report-data", "genuine evidence of another session", "MeasurementMismatchError",
             lambda report_data: evidence(flipped(report_data, 0)))  # fmt: skip
    forge_f3("f3-junk", "sealed bytes that are no evidence", "MalformedMessageError", lambda _: b"junk")
    forge_f3("f3-node-proof", "a node proof in place of evidence", "MalformedMessageError",
             lambda _: slow.pack("node-proof", {"signature": b""}))  # fmt: skip
    forge_f3("f3-version", "evidence of message version 2", "UnsupportedVersionError",
             lambda report_data: b"CLST\x02" + evidence(report_data)[5:])  # fmt: skip
    forge_f3("f3-short-evidence", "evidence without its last byte, sealed", "MalformedMessageError",
             lambda report_data: evidence(report_data)[:-1])  # fmt: skip

    def forge_f4(name: str, comment: str, expect: str, made: Any) -> None:
        proof = made(server.th[3], server.ex)
        sealed = slow.chunked_seal(
            slow.expand(server.hs, b"hs", b"c"), slow.enc(slow.V, b"flight", server.th[3]), proof
        )
        refuse(name, comment, expect, "f4", sealed)

    forge_f4("f4-other-key", "a node proof by another key", "EvidenceSignatureError",
             lambda th3, ex: slow.node_proof(OTHER_KEY, th3, ex))  # fmt: skip
    forge_f4("f4-other-exporter", "a node proof over another exporter", "EvidenceSignatureError",
             lambda th3, ex: slow.node_proof(NODE_KEY, th3, flipped(ex, 0)))  # fmt: skip
    forge_f4("f4-other-transcript", "a node proof over another transcript", "EvidenceSignatureError",
             lambda th3, ex: slow.node_proof(NODE_KEY, flipped(th3, 0), ex))  # fmt: skip
    forge_f4("f4-evidence", "evidence where a node proof was agreed", "EvidenceSignatureError",
             lambda th3, ex: evidence(slow.report_data(b"client", th3, ex)))  # fmt: skip
    forge_f4("f4-long-signature", "a signature of 105 bytes", "MalformedMessageError",
             lambda *_: slow.pack("node-proof", {"signature": bytes(105)}))  # fmt: skip
    forge_f4("f4-extra-field", "a node proof with a field more", "MalformedMessageError",
             lambda *_: slow.pack("node-proof", {"signature": b"", "more": 1}))  # fmt: skip
    signed_as_tee = slow.chunked_seal(
        slow.expand(tee_outputs["hs"], b"hs", b"c"),
        slow.enc(slow.V, b"flight", tee_outputs["th"][3]),
        slow.node_proof(NODE_KEY, tee_outputs["th"][3], tee_outputs["ex"]),
    )
    write("handshake-f4-node-proof", "a node proof where evidence was agreed", "EvidenceSignatureError",
          {"flight": signed_as_tee}, base="handshake-client-evidence.json", receiver="f4")  # fmt: skip


# --- records ----------------------------------------------------------------------------------------------------------

HS, TH4 = b"\x03" * 48, b"\x04" * 48


def session(role: str, hs: bytes = HS) -> slow.SlowSession:
    return slow.SlowSession.of(role, RUN, CLIENT, hs, TH4)


def write_records() -> None:
    def out(name: str, comment: str, expect: str, records: list[bytes], **more: Any) -> None:
        """The receiver opens all records; every one but the last MUST open."""
        inputs = {"run_id": RUN, "client": CLIENT, "hs": HS, "th4": TH4, "receiver": "client", "records": records}
        write(f"record-{name}", comment, expect, {**inputs, **more.pop("inputs", {})}, **more)

    server = session("server")
    header = server.header("prepare")
    first = server.seal(header, b"one", fixed("one", 24))
    second = server.seal(server.header("prepare", attempt=1), b"two", fixed("two", 24))
    third = server.seal(server.header("prepare", attempt=2), b"", fixed("three", 24))
    back = session("client").seal(session("client").header("prepare"), b"answer", fixed("answer", 24))
    at = 12 + len(header)

    out("in-order", "three records of the server, the last empty", "ok", [first, second, third],
        outputs=digests(b"one", b"two", b""))  # fmt: skip
    out("of-client", "a record of the client", "ok", [back], inputs={"receiver": "server"},
        outputs=digests(b"answer"))  # fmt: skip
    border = session("server").seal(header, bytes(16_384), fixed("border", 24))
    out("chunk-border", "a plaintext of one whole chunk: an empty one follows", "ok", [border],
        outputs=digests(bytes(16_384)))  # fmt: skip
    out("replay", "the same record twice", "ReplayError", [first, first])
    out("gap", "the second record first", "ReplayError", [second])
    out("old", "the first record behind the second", "ReplayError", [first, second, first])
    out("renumbered", "the first record under the second number", "DecryptionError", [first, second[:8] + first[8:]])
    out("reflected", "a record of the client at the client", "DecryptionError", [back])
    out("other-session", "a record under another secret", "DecryptionError",
        [session("server", b"\x09" * 48).seal(header, b"one")])  # fmt: skip
    out("other-round", "the header of another round", "DecryptionError",
        [first[:8] + slow.enc(server.header("prepare", n_round=2)) + first[at:]])  # fmt: skip
    for name, place in (("salt", at), ("commitment", at + 24), ("text", at + 56), ("tag", len(first) - 1)):
        out(f"{name}-bit", f"one bit of the {name}", "DecryptionError", [flipped(first, place)])
    out("truncated", "without its last byte", "DecryptionError", [first[:-1]])
    out("longer", "one byte more", "DecryptionError", [first + b"\x00"])
    out("no-final-chunk", "cut behind the first whole chunk", "DecryptionError", [border[:-16]])
    out("swapped-chunks", "two whole chunks in the other order", "DecryptionError", [_swapped(header, at)])
    out("no-ciphertext", "ends behind its header", "DecryptionError", [first[:at]])
    out("ends-in-header", "ends inside its header", "MalformedMessageError", [first[: at - 1]])
    out("ends-in-number", "eleven bytes", "MalformedMessageError", [first[:11]])
    out("empty", "nothing", "MalformedMessageError", [b""])
    out(
        "long-header",
        "a header of 1,025 bytes",
        "MalformedMessageError",
        [bytes(8) + slow.enc(bytes(1025)) + first[at:]],
    )

    def sealed_by_the_peer(name: str, comment: str, expect: str, clear: bytes) -> None:
        out(name, comment, expect, [session("server").seal(clear, b"x", fixed(name, 24))])

    sealed_by_the_peer("header-of-another-run", "authentic, of another run", "MalformedMessageError",
                       header.replace(b"run-1", b"run-2"))  # fmt: skip
    sealed_by_the_peer("header-to-another", "authentic, to another client", "MalformedMessageError",
                       header.replace(b"north", b"south"))  # fmt: skip
    sealed_by_the_peer("header-from-client", "authentic, sender and receiver exchanged", "MalformedMessageError",
                       session("client").header("prepare"))  # fmt: skip
    sealed_by_the_peer("header-junk", "authentic, no header", "MalformedMessageError", b"junk")
    sealed_by_the_peer("header-version", "authentic, a header of version 2", "UnsupportedVersionError",
                       header.replace(b"CLST\x01", b"CLST\x02"))  # fmt: skip
    fields = slow.unpack(header)[1]
    for name, change, expect in (
        ("field-missing", {"round": None}, "MalformedMessageError"),
        ("round-limit", {"round": 1 << 31}, "LimitExceededError"),
        ("round-negative", {"round": -1}, "MalformedMessageError"),
        ("round-true", {"round": True}, "MalformedMessageError"),
        ("kind-upper-case", {"kind": "Prepare"}, "MalformedMessageError"),
    ):
        body = {key: value for key, value in {**fields, **change}.items() if value is not None}
        sealed_by_the_peer(f"header-{name}", f"authentic, {name.replace('-', ' ')}", expect, slow.pack("header", body))
    sealed_by_the_peer("header-key-order", "authentic, map keys out of order", "MalformedMessageError",
                       b"CLST\x01" + _out_of_order("header", fields))  # fmt: skip
    sealed_by_the_peer("header-long-integer", "authentic, a number not in its shortest form", "MalformedMessageError",
                       header.replace(slow.cbor("round") + b"\x01", slow.cbor("round") + b"\x18\x01"))  # fmt: skip


def _swapped(header: bytes, at: int) -> bytes:
    long = session("server").seal(header, fixed("two chunks", 2 * 16_384), fixed("swap", 24))
    start, n = at + 56, 16_400
    return long[:start] + long[start + n : start + 2 * n] + long[start : start + n] + long[start + 2 * n :]


def _out_of_order(kind: str, fields: dict[str, Any]) -> bytes:
    pairs = sorted(((slow.cbor(key), slow.cbor(value)) for key, value in fields.items()), reverse=True)
    return b"\x82" + slow.cbor(kind) + bytes([0xA0 + len(pairs)]) + b"".join(key + value for key, value in pairs)


# --- sealed files -----------------------------------------------------------------------------------------------------


def write_sealed_files() -> None:
    def out(name: str, comment: str, expect: str, file: bytes, outputs: Any = None, **more: Any) -> None:
        inputs = {"key": KEY, "label": "checkpoint", "at_least": 0, "file": file, **more}
        rest = {} if outputs is None else {"outputs": outputs}
        write(f"sealed-{name}", comment, expect, inputs, **rest)

    good = slow.seal_file(KEY, "checkpoint", 7, b"state", fixed("file", 24))
    opened = {"version": 7, "plaintext": b"state", "salt": fixed("file", 24)}
    out("ok", "version 7", "ok", good, opened)
    out("at-least", "version 7 where the counter says 7", "ok", good, opened, at_least=7)
    empty = slow.seal_file(KEY, "checkpoint", (1 << 64) - 1, b"", fixed("empty", 24))
    out("empty", "nothing, of the last version", "ok", empty,
        {"version": (1 << 64) - 1, "plaintext": b"", "salt": fixed("empty", 24)})  # fmt: skip
    out("roll-back", "version 7 where the counter says 8", "RollbackError", good, at_least=8)
    out("roll-back-and-bit", "altered and old: no word about its age", "DecryptionError", flipped(good, 20), at_least=8)
    out("other-label", "opened under another label", "DecryptionError", good, label="run-state")
    out("other-key", "opened with another key", "DecryptionError", good, key=bytes(32))
    out("short-key", "opened with a key of 16 bytes", "DecryptionError", good, key=KEY[:16])
    out("magic", "another magic", "DecryptionError", flipped(good, 0))
    out("format", "format 2", "DecryptionError", good[:4] + b"\x02" + good[5:])
    out("version", "the version raised by hand", "DecryptionError", good[:12] + b"\x08" + good[13:], at_least=8)
    out("commitment", "one bit of the commitment", "DecryptionError", flipped(good, 13 + 24))
    out("tag", "one bit of the tag", "DecryptionError", flipped(good, -1))
    out("truncated", "without its last byte", "DecryptionError", good[:-1])
    out("longer", "one byte more", "DecryptionError", good + b"\x00")
    out("header-only", "thirteen bytes", "DecryptionError", good[:13])
    out("nothing", "an empty file", "DecryptionError", b"")


if __name__ == "__main__":
    for old in [*HERE.glob("handshake-*.json"), *HERE.glob("record-*.json"), *HERE.glob("sealed-*.json")]:
        old.unlink()
    write_handshakes()
    write_records()
    write_sealed_files()
