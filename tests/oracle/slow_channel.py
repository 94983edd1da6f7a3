"""A second implementation of spec/wire.md, sections 1, 2, 4 to 7: slow, obvious, and without a line of cloister's code.

Every function follows the specification's words in their order. Bytes only: no streams, no buffers, no care for speed.
Refusals are `Refused(code)` with the specification's codes. Random values are arguments, so that vectors can freeze
them. HPKE is opened by hand (RFC 9180) and sealed by the cryptographic library.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, hmac, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

V = b"cloister-channel/v1"
SUITE = b"MLKEM768-X25519+HKDF-SHA256+AES-256-GCM/HKDF-SHA384/C2SP-CHUNKED-AES-256-GCM"
F3_LIMIT = 2_100_704
EVIDENCE_LIMIT = (2 << 20) + 256
RECORD_LIMIT = 1_149_239_296


class Refused(Exception):
    """What the specification says must be refused; `code` is the one it names."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


# --- section 1 --------------------------------------------------------------------------------------------------------


def enc(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def dec(blob: bytes, n_parts: int) -> list[bytes]:
    parts: list[bytes] = []
    for _ in range(n_parts):
        if len(blob) < 4:
            raise Refused("wire.malformed")
        (size,) = struct.unpack(">I", blob[:4])
        if len(blob) < 4 + size:
            raise Refused("wire.malformed")
        parts.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    if blob:
        raise Refused("wire.malformed")
    return parts


# --- section 2 --------------------------------------------------------------------------------------------------------


def cbor(value: Any) -> bytes:
    """The one encoding of a value."""

    def head(major: int, n: int) -> bytes:
        if n < 24:
            return bytes([major * 32 + n])
        for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
            if n < 256**size:
                return bytes([major * 32 + info]) + n.to_bytes(size, "big")
        raise Refused("wire.malformed")

    if value is False or value is True or value is None:
        return {False: b"\xf4", True: b"\xf5", None: b"\xf6"}[value]
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, bytes):
        return head(2, len(value)) + value
    if isinstance(value, str):
        return head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(cbor(item) for item in value)
    pairs = sorted((cbor(key), cbor(item)) for key, item in value.items())
    return head(5, len(pairs)) + b"".join(key + item for key, item in pairs)


def _float(value: float) -> bytes:
    if math.isnan(value):
        return b"\xf9\x7e\x00"
    for first, form in ((b"\xf9", ">e"), (b"\xfa", ">f")):
        try:
            if struct.unpack(form, struct.pack(form, value))[0] == value:
                return first + struct.pack(form, value)
        except OverflowError:
            pass
    return b"\xfb" + struct.pack(">d", value)


def uncbor(blob: bytes) -> Any:
    """Reads any CBOR of the allowed items, and accepts it if it is the encoding of what was read."""
    value, rest = _item(blob, 0)
    if rest or cbor(value) != blob:
        raise Refused("wire.malformed")
    return value


def _take(blob: bytes, n: int) -> tuple[bytes, bytes]:
    if len(blob) < n:
        raise Refused("wire.malformed")
    return blob[:n], blob[n:]


def _item(blob: bytes, depth: int) -> tuple[Any, bytes]:
    if depth > 16:
        raise Refused("wire.limit")
    first, blob = _take(blob, 1)
    major, info = divmod(first[0], 32)
    if major == 7:
        return _simple(first[0], blob)
    if info < 24:
        n = info
    elif info < 28:
        raw, blob = _take(blob, 1 << (info - 24))
        n = int.from_bytes(raw, "big")
    else:
        raise Refused("wire.malformed")
    if major == 0:
        return n, blob
    if major == 1:
        return -1 - n, blob
    if major in (2, 3):
        raw, blob = _take(blob, n)
        try:
            return (raw if major == 2 else raw.decode()), blob
        except UnicodeDecodeError:
            raise Refused("wire.malformed") from None
    if major == 4:
        items: list[Any] = []
        for _ in range(n):
            item, blob = _item(blob, depth + 1)
            items.append(item)
        return items, blob
    if major == 5:
        found: dict[str, Any] = {}
        for _ in range(n):
            key, blob = _item(blob, depth + 1)
            item, blob = _item(blob, depth + 1)
            if not isinstance(key, str) or key in found:
                raise Refused("wire.malformed")
            found[key] = item
        return found, blob
    raise Refused("wire.malformed")


def _simple(first: int, blob: bytes) -> tuple[Any, bytes]:
    if first in (0xF4, 0xF5, 0xF6):
        return {0xF4: False, 0xF5: True, 0xF6: None}[first], blob
    for initial, size, form in ((0xF9, 2, ">e"), (0xFA, 4, ">f"), (0xFB, 8, ">d")):
        if first == initial:
            raw, blob = _take(blob, size)
            return struct.unpack(form, raw)[0], blob
    raise Refused("wire.malformed")


def pack(kind: str, body: dict[str, Any]) -> bytes:
    return b"CLST\x01" + cbor([kind, body])


def unpack(blob: bytes) -> tuple[str, dict[str, Any]]:
    if not blob.startswith(b"CLST") or len(blob) < 5:
        raise Refused("wire.malformed")
    if blob[4] != 1:
        raise Refused("wire.version")
    pair = uncbor(blob[5:])
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], dict):
        raise Refused("wire.malformed")
    if not re.fullmatch("[a-z0-9][a-z0-9._-]{0,63}", pair[0]):
        raise Refused("wire.malformed")
    return pair[0], pair[1]


# --- section 3, the messages that the channel itself reads ------------------------------------------------------------


def need(condition: bool, code: str = "wire.malformed") -> None:
    if not condition:
        raise Refused(code)


def _fields(body: dict[str, Any], **kinds: type) -> None:
    need(set(body) == set(kinds) and all(type(body[name]) is kind for name, kind in kinds.items()))


def parse_header(blob: bytes) -> dict[str, Any]:
    need(len(blob) <= 1024, "wire.limit")
    kind, body = unpack(blob)
    need(kind == "header")
    _fields(body, run_id=str, round=int, kind=str, sender=str, receiver=str, attempt=int)
    need(bool(re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,127}", body["run_id"])))
    need(bool(re.fullmatch("[a-z0-9][a-z0-9._-]{0,63}", body["kind"])))
    for name in ("sender", "receiver"):
        need(bool(re.fullmatch("[a-z0-9][a-z0-9-]{0,31}", body[name])))
    for name in ("round", "attempt"):
        need(body[name] >= 0)
        need(body[name] < 1 << 31, "wire.limit")
    return body


def parse_proof(blob: bytes) -> tuple[str, dict[str, Any]]:
    need(len(blob) <= EVIDENCE_LIMIT, "wire.limit")
    kind, body = unpack(blob)
    if kind == "node-proof":
        _fields(body, signature=bytes)
        need(len(body["signature"]) <= 104)
        return kind, body
    if kind == "attested-node-proof":
        _fields(body, signature=bytes, evidence=bytes)
        need(len(body["signature"]) <= 104)
        need(parse_proof(body["evidence"])[0] == "evidence")
        return kind, body
    need(kind == "evidence")
    _fields(body, type=str, blob=bytes, aux=bytes)
    need(bool(re.fullmatch("[a-z0-9][a-z0-9-]{0,31}", body["type"])))
    need(max(len(body["blob"]), len(body["aux"])) <= 1 << 20, "wire.limit")
    return kind, body


# --- section 4, key schedule ------------------------------------------------------------------------------------------


def sha(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def H(*parts: bytes) -> bytes:
    return sha(hashes.SHA384(), enc(V, *parts))


def expand(key: bytes, *labels: bytes, n: int = 32) -> bytes:
    return HKDFExpand(hashes.SHA384(), n, enc(V, *labels)).derive(key)


def mac(key: bytes, data: bytes) -> bytes:
    keyed = hmac.HMAC(key, hashes.SHA384())
    keyed.update(data)
    return keyed.finalize()


def ctx(run_id: str, node_id: str, server_policy: bytes, client_policy: bytes, node_key: bytes) -> bytes:
    return enc(run_id.encode(), node_id.encode(), server_policy, client_policy, SUITE, node_key)


def report_data(role: bytes, th: bytes, ex: bytes) -> bytes:
    return sha(hashes.SHA512(), enc(V, b"report-data", role, th, ex))


# --- section 6 --------------------------------------------------------------------------------------------------------

CHUNK = 16_384


def _chunk_keys(key: bytes, salt: bytes, context: bytes) -> tuple[bytes, bytes, bytes]:
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM" + b"\x00" + salt + context
    okm = HKDFExpand(hashes.SHA512(), 76, info).derive(key)
    return okm[:32], okm[32:44], okm[44:]


def _nonce(base: bytes, i: int) -> bytes:
    return bytes(a ^ b for a, b in zip(base, i.to_bytes(12, "big"), strict=True))


def chunked_seal(key: bytes, context: bytes, plaintext: bytes, salt: bytes | None = None) -> bytes:
    salt = os.urandom(24) if salt is None else salt
    aead_key, base, commitment = _chunk_keys(key, salt, context)
    out = salt + commitment
    for i in range(len(plaintext) // CHUNK + 1):
        out += AESGCM(aead_key).encrypt(_nonce(base, i), plaintext[i * CHUNK : (i + 1) * CHUNK], None)
    return out


def chunked_open(key: bytes, context: bytes, ciphertext: bytes) -> bytes:
    salt, commitment, rest = ciphertext[:24], ciphertext[24:56], ciphertext[56:]
    if len(key) != 32 or len(commitment) != 32:
        raise Refused("channel.decryption")
    aead_key, base, expected = _chunk_keys(key, salt, context)
    if commitment != expected:
        raise Refused("channel.decryption")
    out, i = b"", 0
    while True:
        chunk, rest = rest[: CHUNK + 16], rest[CHUNK + 16 :]
        try:
            plaintext = AESGCM(aead_key).decrypt(_nonce(base, i), chunk, None)
        except (InvalidTag, ValueError):
            raise Refused("channel.decryption") from None
        out, i = out + plaintext, i + 1
        if len(plaintext) < CHUNK:  # the final one
            if rest:
                raise Refused("channel.decryption")
            return out


# --- section 4, the flights -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KemKey:
    """An HPKE private key: the 64-byte seed of ML-KEM-768 (FIPS 203) and the 32 bytes of X25519."""

    mlkem_seed: bytes = field(default_factory=lambda: os.urandom(64))
    x25519_key: bytes = field(default_factory=lambda: os.urandom(32))

    def _halves(self) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
        return (
            mlkem.MLKEM768PrivateKey.from_seed_bytes(self.mlkem_seed),
            x25519.X25519PrivateKey.from_private_bytes(self.x25519_key),
        )

    @property
    def public(self) -> bytes:
        first, second = self._halves()
        return first.public_key().public_bytes_raw() + second.public_key().public_bytes_raw()

    def shared(self, encapsulated: bytes) -> bytes:
        first, second = self._halves()
        ct_m, ct_x = encapsulated[:1088], encapsulated[1088:]
        ss_m = first.decapsulate(ct_m)
        ss_x = second.exchange(x25519.X25519PublicKey.from_public_bytes(ct_x))
        return sha(hashes.SHA3_256(), ss_m + ss_x + ct_x + second.public_key().public_bytes_raw() + b"\\.//^\\")

    def open(self, sealed: bytes, info: bytes) -> bytes:
        try:
            key, nonce = hpke_schedule(self.shared(sealed[:1120]), info)
            seed = AESGCM(key).decrypt(nonce, sealed[1120:], None)
        except (InvalidTag, ValueError):  # ValueError: an X25519 point of low order
            raise Refused("channel.decryption") from None
        need(len(seed) == 32, "channel.decryption")
        return seed


def hpke_schedule(shared: bytes, info: bytes, suite: str = "647a00010002", n_key: int = 32) -> tuple[bytes, bytes]:
    """Key and nonce of RFC 9180 section 5.1, base mode, HKDF-SHA256; by default KEM 0x647a and AES-256-GCM."""
    suite_id = b"HPKE" + bytes.fromhex(suite)

    def extract(salt: bytes, label: bytes, data: bytes) -> bytes:
        keyed = hmac.HMAC(salt or bytes(32), hashes.SHA256())
        keyed.update(b"HPKE-v1" + suite_id + label + data)
        return keyed.finalize()

    def derive(label: bytes, n: int) -> bytes:
        labelled = struct.pack(">H", n) + b"HPKE-v1" + suite_id + label + context
        return HKDFExpand(hashes.SHA256(), n, labelled).derive(secret)

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    return derive(b"key", n_key), derive(b"base_nonce", 12)


def hpke_seal(public: bytes, info: bytes, seed: bytes) -> bytes:
    try:
        key = hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(public[:1184]),
            x25519.X25519PublicKey.from_public_bytes(public[1184:]),
        )
        return hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM).encrypt(
            seed, key, info
        )
    except ValueError:
        raise Refused("wire.malformed") from None


@dataclass
class Side:
    """One side's random values, and after each flight what it knows. `ctx` is agreed beforehand.

    `sealed_seed` replaces the randomised HPKE encryption by a recorded one, `salt` that of chunked encryption.
    """

    ctx: bytes
    nonce: bytes = field(default_factory=lambda: os.urandom(32))
    key: KemKey = field(default_factory=KemKey)
    seed: bytes = field(default_factory=lambda: os.urandom(32))
    salt: bytes = field(default_factory=lambda: os.urandom(24))
    sealed_seed: bytes | None = None
    th: list[bytes] = field(default_factory=list)
    hs: bytes = b""
    ex: bytes = b""

    def _seal_seed(self, public: bytes, info: bytes) -> bytes:
        fresh = hpke_seal(public, info, self.seed)  # also refuses a key that gives no secret
        return fresh if self.sealed_seed is None else self.sealed_seed

    def _secrets(self, seed_client: bytes, seed_server: bytes) -> None:
        self.hs = mac(self.th[2], enc(seed_client, seed_server))
        self.ex = expand(self.hs, b"exporter", n=48)

    def session_id(self) -> bytes:
        return H(b"session-id", self.th[4])[:32]

    def chain(self, direction: bytes) -> bytes:
        return expand(self.hs, b"app", direction, self.th[4], n=48)


def _lengths(parts: list[bytes], *lengths: int) -> None:
    need([len(part) for part in parts] == list(lengths))


class SlowServer(Side):
    """F1, F3 and the check of F4. `evidence(report_data)` makes an encoded `evidence` message."""

    def f1(self) -> bytes:
        self.th.append(H(self.ctx, self.nonce, self.key.public))
        return enc(self.nonce, self.key.public)

    def f3(self, f2: bytes, evidence: Any) -> bytes:
        need(len(f2) <= 2428, "wire.limit")
        parts = dec(f2, 3)
        _lengths(parts, 32, 1216, 1168)
        nonce_c, public_c, c1 = parts
        seed_c = self.key.open(c1, H(self.th[0], nonce_c, public_c))
        self.th.append(H(self.th[0], nonce_c, public_c, c1))
        c2 = self._seal_seed(public_c, self.th[1])
        self.th.append(H(self.th[1], c2))
        self._secrets(seed_c, self.seed)
        ev = evidence(report_data(b"server", self.th[2], self.ex))
        s3 = chunked_seal(expand(self.hs, b"hs", b"s"), enc(V, b"flight", self.th[2]), ev, self.salt)
        self.th.append(H(self.th[2], ev))
        return enc(c2, s3)

    def check_f4(self, f4: bytes, verify: Any) -> None:
        """`verify(kind, body, th3, ex)` refuses a proof."""
        need(len(f4) <= F3_LIMIT, "wire.limit")
        proof = chunked_open(expand(self.hs, b"hs", b"c"), enc(V, b"flight", self.th[3]), f4)
        verify(*parse_proof(proof), self.th[3], self.ex)
        self.th.append(H(self.th[3], proof))


class SlowClient(Side):
    """F2 and F4."""

    def f2(self, f1: bytes) -> bytes:
        need(len(f1) <= 1256, "wire.limit")
        parts = dec(f1, 2)
        _lengths(parts, 32, 1216)
        nonce_s, public_s = parts
        self.th.append(H(self.ctx, nonce_s, public_s))
        c1 = self._seal_seed(public_s, H(self.th[0], self.nonce, self.key.public))
        self.th.append(H(self.th[0], self.nonce, self.key.public, c1))
        return enc(self.nonce, self.key.public, c1)

    def f4(self, f3: bytes, verify: Any, prove: Any) -> bytes:
        """`verify(body, report_data)` refuses evidence; `prove(th3, ex)` makes the encoded proof."""
        need(len(f3) <= F3_LIMIT, "wire.limit")
        c2, s3 = dec(f3, 2)
        seed_s = self.key.open(c2, self.th[1])
        self.th.append(H(self.th[1], c2))
        self._secrets(self.seed, seed_s)
        ev = chunked_open(expand(self.hs, b"hs", b"s"), enc(V, b"flight", self.th[2]), s3)
        kind, body = parse_proof(ev)
        need(kind == "evidence")
        verify(body, report_data(b"server", self.th[2], self.ex))
        self.th.append(H(self.th[2], ev))
        proof = prove(self.th[3], self.ex)
        f4 = chunked_seal(expand(self.hs, b"hs", b"c"), enc(V, b"flight", self.th[3]), proof, self.salt)
        self.th.append(H(self.th[3], proof))
        return f4


def signed_by_node(th3: bytes, ex: bytes) -> bytes:
    return enc(V, b"node-proof", th3, ex)


def node_proof(private: ec.EllipticCurvePrivateKey, th3: bytes, ex: bytes) -> bytes:
    return pack("node-proof", {"signature": private.sign(signed_by_node(th3, ex), ec.ECDSA(hashes.SHA384()))})


def check_attested_node_proof(spki: bytes, verify: Any, kind: str, body: dict[str, Any], th3: bytes, ex: bytes) -> None:
    """`verify(body, report_data)` refuses evidence."""
    need(kind == "attested-node-proof", "attest.signature")
    check_node_proof(spki, "node-proof", {"signature": body["signature"]}, th3, ex)
    verify(parse_proof(body["evidence"])[1], report_data(b"client", th3, ex))


def check_node_proof(spki: bytes, kind: str, body: dict[str, Any], th3: bytes, ex: bytes) -> None:
    if kind != "node-proof":
        raise Refused("attest.signature")
    key = serialization.load_der_public_key(spki)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(body["signature"], signed_by_node(th3, ex), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Refused("attest.signature") from None


# --- section 5 --------------------------------------------------------------------------------------------------------


class SlowSession:
    """The records of one side; `role` is "server" or "client"."""

    def __init__(self, role: str, run_id: str, client: str, session_id: bytes, k_s: bytes, k_c: bytes) -> None:
        self.run_id, self.session_id = run_id, session_id
        self.me, self.other = ("server", client) if role == "server" else (client, "server")
        self.out, self.into = (b"s", b"c") if role == "server" else (b"c", b"s")
        self.chains = {b"s": k_s, b"c": k_c}
        self.seqs = {b"s": 0, b"c": 0}

    @classmethod
    def of(cls, role: str, run_id: str, client: str, hs: bytes, th4: bytes) -> SlowSession:
        chains = [expand(hs, b"app", d, th4, n=48) for d in (b"s", b"c")]
        return cls(role, run_id, client, H(b"session-id", th4)[:32], *chains)

    def message_key(self, d: bytes) -> bytes:
        return expand(self.chains[d], b"msg", struct.pack(">Q", self.seqs[d]))

    def _advance(self, d: bytes) -> None:
        self.chains[d] = expand(self.chains[d], b"next", n=48)
        self.seqs[d] += 1

    def _context(self, d: bytes, header: bytes) -> bytes:
        return enc(self.session_id, d, struct.pack(">Q", self.seqs[d]), header)

    def header(self, kind: str, *, n_round: int = 1, attempt: int = 0) -> bytes:
        body = {"run_id": self.run_id, "round": n_round, "kind": kind, "sender": self.me, "receiver": self.other}
        return pack("header", {**body, "attempt": attempt})

    def seal(self, header: bytes, plaintext: bytes, salt: bytes | None = None) -> bytes:
        d = self.out
        sealed = chunked_seal(self.message_key(d), self._context(d, header), plaintext, salt)
        record = struct.pack(">Q", self.seqs[d]) + enc(header) + sealed
        self._advance(d)
        return record

    def open(self, record: bytes) -> tuple[dict[str, Any], bytes]:
        d = self.into
        need(len(record) <= RECORD_LIMIT, "wire.limit")
        need(len(record) >= 12)
        seq, size = struct.unpack(">QI", record[:12])
        need(size <= 1024 and len(record) >= 12 + size)
        header, sealed = record[12 : 12 + size], record[12 + size :]
        need(seq == self.seqs[d], "channel.replay")
        plaintext = chunked_open(self.message_key(d), self._context(d, header), sealed)
        fields = parse_header(header)
        need((fields["run_id"], fields["sender"], fields["receiver"]) == (self.run_id, self.other, self.me))
        self._advance(d)
        return fields, plaintext


# --- section 7 --------------------------------------------------------------------------------------------------------


def seal_file(key: bytes, label: str, version: int, plaintext: bytes, salt: bytes | None = None) -> bytes:
    number = struct.pack(">Q", version)
    return b"CLSF" + b"\x01" + number + chunked_seal(key, enc(V, b"file", label.encode(), number), plaintext, salt)


def open_file(key: bytes, label: str, blob: bytes, at_least: int = 0) -> tuple[int, bytes]:
    need(len(blob) >= 13 and blob[:5] == b"CLSF\x01", "channel.decryption")
    plaintext = chunked_open(key, enc(V, b"file", label.encode(), blob[5:13]), blob[13:])
    (version,) = struct.unpack(">Q", blob[5:13])
    need(version >= at_least, "channel.rollback")
    return version, plaintext
