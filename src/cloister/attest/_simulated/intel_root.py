"""The software Intel: the root of trust of runs on machines without a TEE. It protects nobody from its own operator.

Success of a verification under this root proves only that whoever holds the root's folder issued the evidence. Only a
policy that names this root and says `allow_simulated = true` accepts it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister._files import write_whole
from cloister.attest._simulated import intel_pki as pki
from cloister.attest._simulated import tdquote
from cloister.errors import AttestationError, StoreError
from cloister.wire import pack

PROVISION_KIND = "attest.provision"
_STATE_FILE = "root.json"
_COLLATERAL_FILES = {"tdx": "collateral.json", "sgx": "collateral-sgx.json"}
_NAMES = {
    "root": "SIMULATED SGX Root CA",
    "platform": "SIMULATED SGX PCK Platform CA",
    "tcb": "SIMULATED SGX TCB Signing",
    "pck": "SIMULATED SGX PCK Certificate",
}
_SECRET_BYTES = {"fuse_key": 32, "ppid": 16, "fmspc": 6, "piid": 16}


@dataclass(frozen=True)
class _State:
    """Everything that the folder keeps. Secret: keys and values are never shown."""

    keys: dict[str, ec.EllipticCurvePrivateKey] = field(repr=False)
    certificates: dict[str, x509.Certificate] = field(repr=False)
    values: dict[str, bytes] = field(repr=False)


class SimulatedRoot:
    """A folder (mode 0700, files 0600) with the certificates and keys of one simulated platform.

    Make one with `create` or `open`. The folder belongs to the launcher; the enclave only ever gets `provision()`.
    """

    def __init__(self, folder: Path, state: _State) -> None:
        self._folder = folder
        self._state = state

    def __repr__(self) -> str:
        return f"SimulatedRoot({self.root_sha256[:16]}…)"

    @classmethod
    def create(cls, folder: str | Path, *, now: int) -> SimulatedRoot:
        """Make a new simulated platform in `folder` and issue its first collateral.

        Args:
            folder: made if it is missing; must not hold a root yet.
            now: Unix seconds; certificates are valid for ten years, collateral for 30 days.

        Raises:
            AttestationError: the folder holds a root already, or cannot be written.
        """
        path = Path(folder)
        if (path / _STATE_FILE).exists():
            raise AttestationError(f"{path} holds a simulated root already", hint="open it, or name another folder")
        values = {name: secrets.token_bytes(size) for name, size in _SECRET_BYTES.items()}
        root = cls(path, _issue_hierarchy(values, now=now))
        _write_private(path / _STATE_FILE, _dump_state(root._state))
        root.refresh(now)
        return root

    @classmethod
    def open(cls, folder: str | Path) -> SimulatedRoot:
        """Open the root that `create` left in `folder`.

        Raises:
            AttestationError: there is none, or it does not parse.
        """
        path = Path(folder)
        try:
            return cls(path, _load_state((path / _STATE_FILE).read_bytes()))
        except OSError as error:
            raise AttestationError(f"no simulated root in {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            # The parser's words could quote a key, so they are dropped.
            raise AttestationError(f"the simulated root in {path} is damaged", hint="make a new one") from None

    @property
    def root_der(self) -> bytes:
        """The root certificate. Public."""
        return self._state.certificates["root"].public_bytes(serialization.Encoding.DER)

    @property
    def root_sha256(self) -> str:
        """Lower-case hex SHA-256 of `root_der`: what a policy pins."""
        return hashlib.sha256(self.root_der).hexdigest()

    def refresh(
        self, now: int, *, status: str = "UpToDate", advisories: tuple[str, ...] = (), tee: str = "tdx"
    ) -> None:
        """Issue CRLs, TCB info and QE identity anew, valid from `now` for 30 days.

        Args:
            now: Unix seconds.
            status: what the TCB info says of the platform; anything but "UpToDate" plays an unpatched one.
            advisories: advisory names that the TCB info attaches.
            tee: "tdx" or "sgx"; each has collateral of its own.
        """
        keys, certificates = self._state.keys, self._state.certificates
        fmspc = self._state.values["fmspc"]
        tcb_info = pki.tcb_info(fmspc=fmspc, now=now, status=status, advisories=advisories, tee=tee)
        qe_identity = pki.qe_identity(now=now, tee=tee)
        signing_chain = pki.pem(certificates["tcb"], certificates["root"])
        collateral = {
            "pck_crl_issuer_chain": pki.pem(certificates["platform"], certificates["root"]),
            "root_ca_crl": pki.issue_crl(_NAMES["root"], keys["root"], now=now).hex(),
            "pck_crl": pki.issue_crl(_NAMES["platform"], keys["platform"], now=now).hex(),
            "tcb_info_issuer_chain": signing_chain,
            "tcb_info": tcb_info,
            "tcb_info_signature": pki.sign_raw(keys["tcb"], tcb_info.encode()).hex(),
            "qe_identity_issuer_chain": signing_chain,
            "qe_identity": qe_identity,
            "qe_identity_signature": pki.sign_raw(keys["tcb"], qe_identity.encode()).hex(),
        }
        _write_private(self._folder / _COLLATERAL_FILES[tee], json.dumps(collateral).encode())

    def revoke_platform(self, now: int) -> None:
        """Issue a CRL that revokes the platform's PCK certificate: what a vendor does after a key was extracted."""
        collateral = json.loads(self.collateral_json())
        serial = self._state.certificates["pck"].serial_number
        crl = pki.issue_crl(_NAMES["platform"], self._state.keys["platform"], now=now, revoked=(serial,))
        collateral["pck_crl"] = crl.hex()
        _write_private(self._folder / _COLLATERAL_FILES["tdx"], json.dumps(collateral).encode())

    def collateral_json(self, *, tee: str = "tdx") -> bytes:
        """The collateral last issued, as `dcap_qvl` reads it. Public."""
        path = self._folder / _COLLATERAL_FILES[tee]
        try:
            return path.read_bytes()
        except OSError as error:
            raise AttestationError(f"cannot read {path}: {error.strerror}", hint="refresh the collateral") from None

    def provision(self, *, tee: str = "tdx") -> bytes:
        """What an enclave process needs to attest. SECRET: hand it over a pipe, after the process has hardened itself.

        Each call certifies a new attestation key. The PCK key and the CA keys stay in the folder; the fuse key, from
        which sealing keys come, is the same at each call.
        """
        certificates, values = self._state.certificates, self._state.values
        attestation_key = ec.generate_private_key(ec.SECP256R1())
        auth_data = secrets.token_bytes(32)
        bound = hashlib.sha256(pki.public_xy(attestation_key.public_key()) + auth_data).digest()
        qe_report = tdquote.qe_report_bytes(
            cpu_svn=pki.CPU_SVN,
            attributes=pki.QE_ATTRIBUTES,
            mr_enclave=pki.QE_MR_ENCLAVE,
            mr_signer=pki.QE_MR_SIGNER,
            prod_id=pki.QE_PROD_ID if tee == "tdx" else pki.SGX_QE_PROD_ID,
            svn=pki.QE_SVN,
            report_data=bound,
        )
        body = {
            "attestation_key": _private_der(attestation_key),
            "qe_report": qe_report,
            "qe_report_signature": pki.sign_raw(self._state.keys["pck"], qe_report),
            "qe_auth_data": auth_data,
            "qe_id": hashlib.sha256(values["ppid"]).digest()[:16],
            "pck_chain": pki.pem(certificates["pck"], certificates["platform"], certificates["root"]).encode(),
            "fuse_key": values["fuse_key"],
            "collateral": self.collateral_json(tee=tee),
        }
        return pack(PROVISION_KIND, body)


def _issue_hierarchy(values: dict[str, bytes], *, now: int) -> _State:
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in _NAMES}
    issuers = {"root": "root", "platform": "root", "tcb": "root", "pck": "platform"}
    path_lengths = {"root": 1, "platform": 0, "tcb": None, "pck": None}
    extension = pki.sgx_extension(ppid=values["ppid"], fmspc=values["fmspc"], piid=values["piid"])
    certificates = {
        role: pki.issue_certificate(
            name,
            keys[role].public_key(),
            _NAMES[issuers[role]],
            keys[issuers[role]],
            now=now,
            path_length=path_lengths[role],
            sgx_extension=extension if role == "pck" else None,
        )
        for role, name in _NAMES.items()
    }
    return _State(keys, certificates, values)


def _private_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _dump_state(state: _State) -> bytes:
    def text(blob: bytes) -> str:
        return base64.b64encode(blob).decode()

    fields: dict[str, Any] = {
        "version": 1,
        "keys": {role: text(_private_der(key)) for role, key in state.keys.items()},
        "certificates": {
            role: text(c.public_bytes(serialization.Encoding.DER)) for role, c in state.certificates.items()
        },
        "values": {name: text(value) for name, value in state.values.items()},
    }
    return json.dumps(fields).encode()


def _load_state(blob: bytes) -> _State:
    """The inverse of `_dump_state`; raises ValueError, KeyError or TypeError for anything else."""
    fields = json.loads(blob)
    if fields["version"] != 1:
        raise ValueError
    keys: dict[str, ec.EllipticCurvePrivateKey] = {}
    for role in _NAMES:
        key = serialization.load_der_private_key(base64.b64decode(fields["keys"][role]), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError
        keys[role] = key
    certificates = {
        role: x509.load_der_x509_certificate(base64.b64decode(fields["certificates"][role])) for role in _NAMES
    }
    values = {name: base64.b64decode(fields["values"][name]) for name in _SECRET_BYTES}
    return _State(keys, certificates, values)


def _write_private(path: Path, content: bytes) -> None:
    """Write `content` for the owner only; a reader sees the old file or the whole new one."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise AttestationError(f"cannot write {path}: {error.strerror}") from None
    except StoreError as error:
        raise AttestationError(f"cannot write a simulated root: {error.cause}", hint=error.hint) from None
