"""A client's node key (EC P-384, as Flower's SuperNode authentication wants): its identity in a run."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister._files import write_whole
from cloister.errors import ConfigError


def generate_node_key(path: Path) -> None:
    """Writes a fresh private key (*secret*, this institution only) to `path`, as PKCS 8 PEM."""
    write_node_key(ec.generate_private_key(ec.SECP384R1()), path)


def write_node_key(key: ec.EllipticCurvePrivateKey, path: Path) -> None:
    """Writes a private node key to `path`, readable by this user only."""
    write_whole(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def register_node_key(private: Path, registered: Path) -> None:
    """Writes the public half of a node key as OpenSSH text: what Flower registers and the server enclave trusts."""
    public = load_node_key(private).public_key()
    write_whole(
        registered,
        public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n",
    )


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a private node key.

    Raises:
        ConfigError: no such file, or not an EC P-384 private key without a passphrase.
    """
    hint = "make one with `openssl ecparam -name secp384r1 -genkey -noout`"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise ConfigError(f"node key {path} does not exist", hint=hint) from error
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"node key {path} is not a readable PEM private key", hint=hint) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"node key {path} is not an EC P-384 key", hint=hint)
    return key


def read_node_key(registered: Path) -> bytes:
    """A registered public node key as DER SubjectPublicKeyInfo: how the server enclave knows a client.

    Raises:
        ConfigError: no such file, or not a public key.
    """
    try:
        key = serialization.load_ssh_public_key(registered.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"node key {registered} is not a readable public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"node key {registered} is not an EC key")
    return spki(key)


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """DER SubjectPublicKeyInfo, the form in which a node key is bound into a session."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
