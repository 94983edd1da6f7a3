"""A TPM 2.0 through tpm2-pytss: a device, or a software TPM over loopback sockets. Imports the library when used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cloister.attest._verifiers.tpm import PCR_BYTES
from cloister.errors import AttestationError, WireError
from cloister.wire import dec, enc

DEFAULT_TCTI = "device:/dev/tpmrm0"
KEY_ALGORITHMS = {"ecc": "ecc256:ecdsa-sha256:null", "rsa": "rsa2048:rsassa-sha256:null"}
_STORAGE_KEY = "ecc256:null:aes128cfb"
_PCRS_A_READ = 8  # TPML_DIGEST holds no more
_NV_CHUNK = 512  # every TPM reads that much at once; 1,024 is only usual
_MAX_NV_BYTES = 16 << 10
_MAX_SEALED_BYTES = 4096
_COUNTER_BYTES = 8
_N_VENDOR_PROPERTIES = 5  # manufacturer, and four parts of the vendor's text


class DeviceTpm:
    """A `TpmPort` over tpm2-pytss. One object for a process; not for several threads.

    The attestation key is a primary key of the endorsement hierarchy, restricted to statements that the TPM makes
    itself: the same template gives the same key for as long as the TPM is not cleared by its vendor, and nothing has to
    be stored. Or it is one that stands ready under a persistent handle.

    Args:
        tcti: how to reach the TPM: "device:/dev/tpmrm0", "swtpm:host=127.0.0.1,port=2321".
        algorithm: "ecc" (P-256) or "rsa" (2048 bits) of the key that this object makes.
        key_handle: persistent handle of a ready attestation key, in place of making one.

    Raises:
        AttestationError: tpm2-pytss is not installed, or there is no TPM at `tcti`.
    """

    def __init__(self, tcti: str = DEFAULT_TCTI, *, algorithm: str = "ecc", key_handle: int | None = None) -> None:
        if algorithm not in KEY_ALGORITHMS:
            raise AttestationError(f'attestation keys are of "ecc" or "rsa", not "{algorithm}"')
        self._t = _library()
        self._algorithm = algorithm
        self._key_handle = key_handle
        try:
            self._esys = self._t.ESAPI(tcti)
        except (self._t.TSS2_Exception, OSError, RuntimeError, ValueError):
            raise AttestationError(
                f"no TPM at {tcti}",
                hint="is there a TPM 2.0, is its driver loaded, and may this user open it (group tss)?",
            ) from None

    def close(self) -> None:
        """Let go of the TPM. The object is of no use afterwards."""
        self._esys.close()

    def vendor(self) -> str:
        """Manufacturer and vendor text: "IBM SW TPM" for swtpm."""
        with self._named("read its properties"):
            values = self._properties(self._t.TPM2_PT.MANUFACTURER, _N_VENDOR_PROPERTIES)
        texts = [value.to_bytes(4, "big").rstrip(b"\0").decode("ascii", "replace") for value in values]
        return " ".join(f"{texts[0].strip()} {''.join(texts[1:])}".split())

    def nonce_bytes(self) -> int:
        """`TPM2_PT_MAX_DIGEST`: 64 with SHA-512, else 48 or 32."""
        with self._named("read its properties"):
            return self._properties(self._t.TPM2_PT.MAX_DIGEST, 1)[0]

    def attestation_key(self) -> bytes:
        """DER SubjectPublicKeyInfo of the attestation key. Public."""
        with self._named("give its attestation key"), self._key() as (_, public):
            return public.publicArea.to_der()

    def read_pcrs(self, pcrs: Sequence[int]) -> bytes:
        """Values of the PCRs in this order, 32 bytes each."""
        values: list[bytes] = []
        with self._named("read its PCRs"):
            for at in range(0, len(pcrs), _PCRS_A_READ):
                _, _, digests = self._esys.pcr_read(_selection(pcrs[at : at + _PCRS_A_READ]))
                values += [bytes(digests[i]) for i in range(digests.count)]
        if len(values) != len(pcrs) or any(len(value) != PCR_BYTES for value in values):
            raise AttestationError("the TPM has no SHA-256 bank of all PCRs", hint="enable it in the firmware's setup")
        return b"".join(values)

    def extend_pcr(self, pcr: int, digest: bytes) -> None:
        """PCR = SHA-256(PCR || digest)."""
        t = self._t
        value = t.TPMT_HA(hashAlg=t.TPM2_ALG.SHA256, digest=t.TPMU_HA(sha256=digest))
        with self._named(f"extend PCR {pcr}"):
            self._esys.pcr_extend(t.ESYS_TR(pcr), t.TPML_DIGEST_VALUES([value]))

    def quote(self, nonce: bytes, pcrs: Sequence[int]) -> tuple[bytes, bytes]:
        """TPMS_ATTEST and TPMT_SIGNATURE."""
        with self._named("quote its PCRs"), self._key() as (key, _):
            message, signature = self._esys.quote(key, _selection(pcrs), nonce)
        return bytes(message), signature.marshal()

    def read_nv(self, index: int) -> bytes:
        """The contents of an NV index, with the owner's (empty) authorisation."""
        with self._named(f"read its NV index {index:#010x}"):
            handle = self._esys.tr_from_tpmpublic(index)
            public, _ = self._esys.nv_read_public(handle)
            size = min(int(public.nvPublic.dataSize), _MAX_NV_BYTES)
            owner = self._t.ESYS_TR.OWNER
            parts = [
                bytes(self._esys.nv_read(handle, min(_NV_CHUNK, size - at), at, auth_handle=owner))
                for at in range(0, size, _NV_CHUNK)
            ]
        return b"".join(parts)

    def seal(self, secret: bytes, pcrs: Sequence[int]) -> bytes:
        """A blob, public, from which only this TPM with the present values of `pcrs` gives `secret` back."""
        t = self._t
        with self._named("seal"), self._storage_key() as parent:
            with self._session(t.TPM2_SE.TRIAL) as trial:
                self._esys.policy_pcr(trial, None, _selection(pcrs))
                policy = self._esys.policy_get_digest(trial)
            public = t.TPMT_PUBLIC.parse(
                "keyedhash", objectAttributes=t.TPMA_OBJECT.FIXEDTPM | t.TPMA_OBJECT.FIXEDPARENT
            )
            public.authPolicy = policy
            sensitive = t.TPM2B_SENSITIVE_CREATE(t.TPMS_SENSITIVE_CREATE(data=secret))
            # The session encrypts what goes over the bus to the TPM.
            with self._session(t.TPM2_SE.HMAC, parent) as session:
                made = self._esys.create(parent, sensitive, t.TPM2B_PUBLIC(public), session1=session)
        return enc(made[0].marshal(), made[1].marshal())

    def unseal(self, sealed: bytes, pcrs: Sequence[int]) -> bytes:
        """The inverse of `seal`. Secret."""
        t = self._t
        with (
            self._named("release the sealed secret (PCRs or TPM are not those that it was sealed to)"),
            ExitStack() as on,
        ):
            private, public = dec(sealed, 2, max_bytes=_MAX_SEALED_BYTES)
            parent = on.enter_context(self._storage_key())
            handle = self._esys.load(parent, t.TPM2B_PRIVATE.unmarshal(private)[0], t.TPM2B_PUBLIC.unmarshal(public)[0])
            on.callback(self._esys.flush_context, handle)
            session = on.enter_context(self._session(t.TPM2_SE.POLICY, parent))
            self._esys.policy_pcr(session, None, _selection(pcrs))
            return bytes(self._esys.unseal(handle, session1=session))

    def read_counter(self, index: int) -> int | None:
        """Value of the NV counter, None where there is none yet."""
        handle = self._counter_handle(index)
        return None if handle is None else self._read_counter(handle)

    def increment_counter(self, index: int) -> int:
        """Count up by one, after making the counter where there is none, and return the new value."""
        handle = self._counter_handle(index)
        with self._named("count"):
            handle = self._define_counter(index) if handle is None else handle
            self._esys.nv_increment(handle)
        return self._read_counter(handle)

    def _define_counter(self, index: int) -> Any:
        t = self._t
        # A counter that is deleted and made again starts above every value that this TPM's counters ever had.
        public = t.TPMS_NV_PUBLIC(
            nvIndex=index,
            nameAlg=t.TPM2_ALG.SHA256,
            attributes=t.TPMA_NV.AUTHREAD | t.TPMA_NV.AUTHWRITE | t.TPMA_NV.NO_DA | _counter_type(t),
            dataSize=_COUNTER_BYTES,
        )
        return self._esys.nv_define_space(None, t.TPM2B_NV_PUBLIC(public))

    def _read_counter(self, handle: Any) -> int:
        with self._named("read its counter"):
            return int.from_bytes(bytes(self._esys.nv_read(handle, _COUNTER_BYTES)), "big")

    def _counter_handle(self, index: int) -> Any:
        """The counter's handle, None where the TPM has nothing at `index`."""
        t = self._t
        with self._named("look for its counter"):
            more = self._esys.get_capability(t.TPM2_CAP.HANDLES, index, 1)[1]
            data = more.data
            handles = data.handles
            if handles.count == 0 or int(handles[0]) != index:
                return None
            handle = self._esys.tr_from_tpmpublic(index)
            public, _ = self._esys.nv_read_public(handle)
        attributes = public.nvPublic.attributes
        if attributes & t.TPMA_NV.TPM2_NT_MASK != _counter_type(t) or int(public.nvPublic.dataSize) != _COUNTER_BYTES:
            raise AttestationError(f"NV index {index:#010x} of the TPM is no counter", hint="name another index")
        return handle

    def _properties(self, first: int, count: int) -> list[int]:
        # Each object keeps a view into the one before: all must live while the values are read.
        found = self._esys.get_capability(self._t.TPM2_CAP.TPM_PROPERTIES, first, count)[1]
        data = found.data
        properties = data.tpmProperties
        return [int(properties[i].value) for i in range(properties.count)]

    @contextmanager
    def _key(self) -> Generator[tuple[Any, Any]]:
        """Handle and public part of the attestation key."""
        if self._key_handle is not None:
            handle = self._esys.tr_from_tpmpublic(self._key_handle)
            yield handle, self._esys.read_public(handle)[0]
            return
        flags = self._t.TPMA_OBJECT.RESTRICTED | self._t.TPMA_OBJECT.SIGN_ENCRYPT
        with self._primary(KEY_ALGORITHMS[self._algorithm], flags, self._t.ESYS_TR.ENDORSEMENT) as made:
            yield made

    @contextmanager
    def _storage_key(self) -> Generator[Any]:
        flags = self._t.TPMA_OBJECT.RESTRICTED | self._t.TPMA_OBJECT.DECRYPT
        with self._primary(_STORAGE_KEY, flags, self._t.ESYS_TR.OWNER) as (handle, _):
            yield handle

    @contextmanager
    def _primary(self, algorithm: str, flags: Any, hierarchy: Any) -> Generator[tuple[Any, Any]]:
        a = self._t.TPMA_OBJECT
        flags |= a.FIXEDTPM | a.FIXEDPARENT | a.SENSITIVEDATAORIGIN | a.USERWITHAUTH | a.NODA
        public = self._t.TPM2B_PUBLIC(self._t.TPMT_PUBLIC.parse(algorithm, objectAttributes=flags))
        made = self._esys.create_primary(None, public, hierarchy)
        try:
            yield made[0], made[1]
        finally:
            self._esys.flush_context(made[0])

    @contextmanager
    def _session(self, kind: Any, salt_key: Any = None) -> Generator[Any]:
        """A session; one that is salted with a key encrypts the secret parameters of its commands."""
        t = self._t
        salt = t.ESYS_TR.NONE if salt_key is None else salt_key
        session = self._esys.start_auth_session(salt, t.ESYS_TR.NONE, kind, "aes128cfb", t.TPM2_ALG.SHA256)
        try:
            if salt_key is not None:
                flags = t.TPMA_SESSION.DECRYPT | t.TPMA_SESSION.ENCRYPT | t.TPMA_SESSION.CONTINUESESSION
                self._esys.trsess_set_attributes(session, flags)
            yield session
        finally:
            self._esys.flush_context(session)

    @contextmanager
    def _named(self, what: str) -> Generator[None]:
        """The library's errors as ours. Its texts name error codes of the TPM and nothing secret."""
        try:
            yield
        except (self._t.TSS2_Exception, WireError, LookupError, ValueError, RuntimeError) as error:
            raise AttestationError(f"the TPM does not {what}: {error}") from None


def _library() -> Any:
    # The C library writes each error to stderr as well, which would come on top of ours. It reads this once.
    os.environ.setdefault("TSS2_LOG", "all+none")
    try:
        return importlib.import_module("tpm2_pytss")
    except ImportError:
        hint = "pip install 'cloister[vtpm]' (it builds against the TPM2-TSS libraries)"
        raise AttestationError("a TPM needs the extra cloister[vtpm], which is not installed", hint=hint) from None


def _counter_type(t: Any) -> Any:
    return t.TPMA_NV(int(t.TPM2_NT.COUNTER) << int(t.TPMA_NV.TPM2_NT_SHIFT))


def _selection(pcrs: Sequence[int]) -> str:
    return "sha256:" + ",".join(str(pcr) for pcr in pcrs)
