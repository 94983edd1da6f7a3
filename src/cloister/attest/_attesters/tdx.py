"""Attester of an Intel TDX guest on Linux: quotes through configfs-tsm, measurements into RTMR3.

Played through in tests on a file system that follows the kernel's rules; not yet run on TDX hardware.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloister.attest._attesters.tsm import ATTEMPTS, FileSystem, HostFileSystem, Sleep, side_file, tsm_report
from cloister.attest._measure import register_history
from cloister.errors import AttestationError
from cloister.wire import Evidence

PROVIDER = "tdx_guest"
# Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest: reading gives the register, a write of 48 bytes
# extends it.
RTMR3_PATH = Path("/sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384")

_REGISTER_BYTES = 48
_PAUSE_S = 0.05
_RETRIED = (errno.EBUSY, errno.EINTR)
# Where the TD report begins in a quote: after the header, and from version 5 on after type and size of the body
# (Intel TDX DCAP Quoting Library API, appendix A). Inside, RTMR3 and REPORTDATA are its last fields.
_BODY_OFFSETS = {4: 48, 5: 54}
_RTMR3 = slice(472, 520)
_REPORT_DATA = slice(520, 584)
_COLLATERAL_HINT = "run `cloister collateral fetch` on a machine with network access and give its file here"
_COLLATERAL_FIELDS = (
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
)


class TdxAttester:
    """Vouches for a process in a TDX guest.

    RTMR3 is extended when the object is made, before any quote. A process that is started again in the same guest finds
    the register where its predecessor left it, and goes on; a register with anything else in it is refused, since no
    quote of this guest could ever be accepted.

    Args:
        collateral: JSON of spec/attestation.md section 1, as bytes or as a file; public. A file is read anew for each
            evidence, so that it can be renewed while the enclave runs. Never fetched.
        events: from `measurement_events`.
        fs: the port; tests play kernels.
        sleep: between attempts, in seconds.

    Raises:
        AttestationError: collateral is missing or no collateral, or RTMR3 cannot be extended or has been by others.
    """

    type = "tdx"
    binding = "TDREPORT.REPORTDATA"

    def __init__(
        self,
        collateral: bytes | Path | None,
        *,
        events: Sequence[bytes],
        fs: FileSystem | None = None,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._fs = fs or HostFileSystem()
        self._sleep = sleep
        self._source = collateral
        # Before the register: extending cannot be undone.
        self._collateral()
        self._rtmr3 = _extend(self._fs, events, sleep)

    def __repr__(self) -> str:
        return f"TdxAttester(rtmr3={self._rtmr3.hex()[:16]}…)"

    def evidence(self, report_data: bytes) -> Evidence:
        """A fresh quote over `report_data` (64 bytes, public), with the collateral to verify it.

        Raises:
            AttestationError: no quote, one over other data, or one with another RTMR3 than this process left.
        """
        collateral = self._collateral()
        quote = tsm_report(report_data, provider=PROVIDER, fs=self._fs, sleep=self._sleep).outblob
        version = int.from_bytes(quote[:2], "little")
        body = quote[_BODY_OFFSETS.get(version, len(quote)) :]
        if body[_REPORT_DATA] != report_data:
            raise AttestationError(f"the quote (version {version}) does not carry the report data asked for")
        if body[_RTMR3] != self._rtmr3:
            raise AttestationError(
                f"RTMR3 has changed since this process measured itself: it is {body[_RTMR3].hex()}",
                hint="something else in this guest extends RTMR3: let it use another register, start the guest anew",
            )
        return Evidence(type=self.type, blob=quote, aux=collateral)

    def sealing_key(self, label: str) -> bytes:
        """Always an error: TDX derives no keys.

        Raises:
            AttestationError: always.
        """
        raise AttestationError(
            f"TDX has no sealing key of its own (asked for {label!r})",
            hint="seal to a vTPM, or have a key broker release the key against this guest's evidence",
        )

    def counter(self) -> None:
        """None: TDX counts nothing."""

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, unproven; JSON types only."""
        return {"tee": "tdx", "evidence_type": self.type, "simulated": False, "rtmr3": self._rtmr3.hex()}

    def _collateral(self) -> bytes:
        if self._source is None:
            raise AttestationError("TDX evidence needs collateral, and none was given", hint=_COLLATERAL_HINT)
        text = side_file(self._source, what="TDX collateral", hint=_COLLATERAL_HINT)
        try:
            fields = json.loads(text)
            complete = all(isinstance(fields[name], str) for name in _COLLATERAL_FIELDS)
        except (ValueError, KeyError, TypeError, RecursionError):
            complete = False
        if not complete:
            raise AttestationError(
                "TDX collateral is not a JSON object with the fields of a collateral file", hint=_COLLATERAL_HINT
            )
        return text


def _extend(fs: FileSystem, events: Sequence[bytes], sleep: Sleep) -> bytes:
    """Bring RTMR3 to the state after all events; each is written once, whatever was interrupted before."""
    history = register_history(events)
    retries = 0
    while True:
        try:
            register = _read_register(fs)
            if register not in history:
                raise AttestationError(
                    f"{RTMR3_PATH} is {register.hex()}, which is no state of this job's measurements",
                    hint="another job or another program has extended RTMR3 since this guest started: start it anew",
                )
            done = history.index(register)
            if done == len(events):
                return register
            # The kernel does not retry by itself and a refused write has extended nothing; what counts is the register.
            fs.write(RTMR3_PATH, events[done])
        except OSError as error:
            retries += 1
            if error.errno not in _RETRIED or retries >= ATTEMPTS:
                raise AttestationError(
                    f"cannot extend RTMR3: {error.filename or RTMR3_PATH}: {error.strerror}",
                    hint="needs Linux 6.16 or newer in a TDX guest, and the right to write to that file",
                ) from None
            sleep(_PAUSE_S)


def _read_register(fs: FileSystem) -> bytes:
    register = fs.read(RTMR3_PATH, _REGISTER_BYTES)
    if len(register) != _REGISTER_BYTES:
        raise AttestationError(f"{RTMR3_PATH} holds {len(register)} bytes, not {_REGISTER_BYTES}")
    return register
