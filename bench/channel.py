"""The attested channel beside its limits: a mutual TLS 1.3 handshake, and raw AES-256-GCM of the same chunk size.

Handshake: both sides of F1 to F4 in one process, with simulated evidence made and verified, against both sides of a
TLS 1.3 handshake with certificates of both (P-384, one CA) through memory buffers. TLS proves two keys; ours also
proves what code holds the server's, and its key agreement is hybrid with ML-KEM-768. Bytes are those of each flight.

Records: sealing and opening of one record, against AES-256-GCM by `cryptography` over the same 16 KiB chunks. A record
and its plaintext are new memory each time, and so are the buffers of the peer with the goal; the other peer writes into
buffers that it keeps, which shows what new memory costs on this machine.

    python bench/channel.py [--quick] [--pairs 9] [--out bench/results/channel.csv]
"""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import load_average, out_path, row, write_csv
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister import channel, wire
from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, render_policy, verify_evidence

NOW = 1_800_000_000
CHUNK = 16 * 1024
SIZES = {"16 KiB": 16 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
RTMR3 = b"r" * 48


class Parties:
    """One simulated server enclave and one client with a node key."""

    def __init__(self, folder: Path) -> None:
        root = SimulatedRoot.create(folder / "root", now=NOW)
        self.policy = Policy.parse(render_policy(root_sha256=root.root_sha256, server_rtmr3=[RTMR3]))
        self.attester = SimulatedAttester(root.provision(), rtmr3=RTMR3)
        self.key = ec.generate_private_key(ec.SECP384R1())
        public = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        digest = self.policy.sha384
        self.context = channel.SessionContext("bench", "north", digest, digest, public)
        self.public = public

    def shake(self) -> tuple[dict[str, int], channel.Session, channel.Session]:
        """One handshake: bytes of each flight, and both sessions."""
        server = channel.ServerHandshake(
            self.context,
            make_evidence=self.attester.evidence,
            verify_client=channel.NodeKeyVerifier(self.public),
            now=time.monotonic,
        )
        client = channel.ClientHandshake(
            self.context, prove=channel.NodeKeyProver(self.key), verify_server=self._verify, now=time.monotonic
        )
        f1 = server.flight1()
        f2 = client.flight2(f1)
        f3 = server.flight3(f2)
        f4, of_client = client.flight4(f3)
        of_server = server.finish(f4)
        return {"F1": len(f1), "F2": len(f2), "F3": len(f3), "F4": len(f4)}, of_server, of_client

    def _verify(self, evidence: wire.Evidence, report_data: bytes) -> object:
        return verify_evidence(evidence, self.policy, role="server", report_data=report_data, now=NOW)


class Tls:
    """Mutual TLS 1.3 with certificates of one CA, through memory buffers."""

    def __init__(self, folder: Path) -> None:
        self._server = self._context(folder, "server", ssl.PROTOCOL_TLS_SERVER)
        self._client = self._context(folder, "client", ssl.PROTOCOL_TLS_CLIENT)

    @staticmethod
    def _context(folder: Path, name: str, protocol: int) -> ssl.SSLContext:
        _write_certificate(folder, name)
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(folder / f"{name}.pem")
        context.load_verify_locations(folder / "ca.pem")
        return context

    def shake(self) -> int:
        """One handshake; returns the bytes that crossed."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = self._server.wrap_bio(to_server, to_client, server_side=True)
        client = self._client.wrap_bio(to_client, to_server, server_hostname="localhost")
        crossed, open_ends = 0, {server, client}
        while open_ends:
            for end in tuple(open_ends):
                before = to_server.pending + to_client.pending
                try:
                    end.do_handshake()
                    open_ends.discard(end)
                except ssl.SSLWantReadError:
                    pass
                crossed += max(0, to_server.pending + to_client.pending - before)
        return crossed


def _write_certificate(folder: Path, name: str) -> None:
    """`NAME.pem` with key and certificate, issued by `ca.pem`, which the first call makes."""
    start = datetime.now(UTC) - timedelta(days=1)
    if not (folder / "ca.key").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _save(folder / "ca", key, _issue("ca", "ca", key, key, start, is_ca=True))
    ca = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(ca, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    _save(folder / name, key, _issue(name, "ca", key, ca, start, is_ca=False))
    pem = folder / f"{name}.pem"
    pem.write_bytes((folder / f"{name}.key").read_bytes() + pem.read_bytes())


def _issue(
    name: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: datetime,
    *,
    is_ca: bool,
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(issuer_key, hashes.SHA384())
    )


def _save(path: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    path.with_suffix(".key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path.with_suffix(".pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def timed(call: Callable[[], object], times: int) -> float:
    """Seconds for one call, over `times`."""
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def raw_gcm(data: bytes, sealed: bytearray | None = None, opened: bytearray | None = None) -> None:
    """Encrypt and decrypt `data` in chunks of 16 KiB under one key; without buffers it makes its own."""
    cipher = AESGCM(bytes(32))
    n = -(-len(data) // CHUNK)
    out = memoryview(sealed if sealed is not None else bytearray(len(data) + 16 * n))
    for i in range(n):
        piece = memoryview(data)[i * CHUNK : (i + 1) * CHUNK]
        cipher.encrypt_into(
            i.to_bytes(12, "big"), piece, None, out[i * (CHUNK + 16) : i * (CHUNK + 16) + len(piece) + 16]
        )
    back = memoryview(opened if opened is not None else bytearray(len(data)))
    for i in range(n):
        piece = out[i * (CHUNK + 16) : (i + 1) * (CHUNK + 16)]
        cipher.decrypt_into(i.to_bytes(12, "big"), piece, None, back[i * CHUNK : i * CHUNK + len(piece) - 16])


def record_rows(label: str, size: int, parties: Parties, *, pairs: int, quick: bool) -> list[dict[str, object]]:
    """Records of one size against both kinds of peer."""
    _, of_server, of_client = parties.shake()
    data, times = os.urandom(size), max(1, (32 << 20) // size // (20 if quick else 1))
    header, n = of_client.header("bench"), -(-size // CHUNK)
    sealed, opened = bytearray(size + 16 * n), bytearray(size)
    ours, fresh, reused = [], [], []
    for _ in range(pairs):
        ours.append(1 / timed(lambda: of_server.open(of_client.seal(header, data)), times))
        fresh.append(1 / timed(lambda: raw_gcm(data), times))
        reused.append(1 / timed(lambda: raw_gcm(data, sealed, opened), times))
    goal = ">= 0.7" if size >= 64 << 20 else ""
    return [
        row(f"records of {label}, sealed and opened / raw AES-256-GCM into new buffers", ours, fresh, "1/s", goal),
        row(f"records of {label}, sealed and opened / raw AES-256-GCM into kept buffers", ours, reused, "1/s"),
    ]


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pairs = 2 if args.quick else args.pairs
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        parties, tls = Parties(Path(name)), Tls(Path(name))
        flights, _, _ = parties.shake()
        crossed = tls.shake()
        ours, peer = [], []
        for _ in range(pairs):
            ours.append(1e3 * timed(parties.shake, 10))
            peer.append(1e3 * timed(tls.shake, 10))
        rows = [
            row("handshake with evidence, both sides / mutual TLS 1.3", ours, peer, "ms"),
            row("handshake bytes / mutual TLS 1.3", [sum(flights.values())] * pairs, [crossed] * pairs, "bytes"),
        ]
        for flight, n_bytes in flights.items():
            rows.append(row(f"bytes of {flight} / whole mutual TLS 1.3", [n_bytes] * pairs, [crossed] * pairs, "bytes"))
        for label, size in SIZES.items():
            rows += record_rows(label, size, parties, pairs=pairs, quick=args.quick)
    write_csv(out_path("channel", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
