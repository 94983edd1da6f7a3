"""From a backend's name to its attester: what must be opened before the process hardens itself, and the start after.

No caller asks which backend it has. A backend says which folders the hardened process must still write and read, and
makes its attester from the same measurements as all others.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.attest._attesters.azure import AK_HANDLE, AzureAttester
from cloister.attest._attesters.gpu import NvmlGpus, WithGpuAttester
from cloister.attest._attesters.sgx import GRAMINE_FOLDER, SgxAttester
from cloister.attest._attesters.snp import SevGuestDevice, SnpAttester
from cloister.attest._attesters.tdx import RTMR3_PATH, TdxAttester
from cloister.attest._attesters.tpm_device import DEFAULT_TCTI, DeviceTpm
from cloister.attest._attesters.tsm import REPORT_ROOT
from cloister.attest._attesters.vtpm import VtpmAttester
from cloister.attest._measure import register_history
from cloister.attest._simulated.attester import SimulatedAttester
from cloister.attest._types import Attester
from cloister.errors import AttestationError
from cloister.wire import Evidence

SEALING_BYTES = 32


@dataclass(frozen=True)
class BackendSettings:
    """What the operator of the machine gives a backend.

    Attributes:
        collateral: a file with what verifiers need and the platform does not hand out: collateral JSON (tdx, sgx), or
            the certificate chain (snp, azure). Public; read anew for each evidence.
        td_quote: a file with the quote of a TDX machine (azure).
        tcti: how to reach the TPM (vtpm, azure), as tpm2-tss names it.
        state_dir: a folder for sealed blobs (vtpm, azure).
        counter_index: NV index of a TPM counter that this run alone uses, against roll-back (vtpm, azure).
        gpu: evidence of the GPUs goes along.
        sealing: "platform", or "ephemeral": sealed files do not outlive the process.
    """

    collateral: Path | None = None
    td_quote: Path | None = None
    tcti: str = DEFAULT_TCTI
    state_dir: Path | None = None
    counter_index: int | None = None
    gpu: bool = False
    sealing: str = "platform"


@dataclass(frozen=True)
class Backend:
    """One TEE of this machine, opened and not yet measured into.

    Attributes:
        name: of the backend, which is the type of its evidence.
        needs_provision: whether the launcher hands over a secret after hardening (the simulated platform's).
        write_dirs, read_dirs: what the hardened process must still reach.
        start: makes the attester.
    """

    name: str
    start: Callable[[Measured], Attester] = field(repr=False)
    needs_provision: bool = False
    write_dirs: tuple[Path, ...] = ()
    read_dirs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What a process knows of itself once it is hardened.

    Attributes:
        events: from `measurement_events`.
        layers: hardening layers that it achieved.
        provision: *secret*, of the simulated platform; empty for all others.
    """

    events: tuple[bytes, ...]
    layers: tuple[str, ...] = ()
    provision: bytes = field(default=b"", repr=False)

    @property
    def register(self) -> bytes:
        """The run-time register after these events, 48 bytes."""
        return register_history(self.events)[-1]


class EphemeralSealing:
    """An attester whose sealing keys live as long as this process: sealed files are of no use to the next one."""

    def __init__(self, attester: Attester) -> None:
        self._attester = attester
        self._keys: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"EphemeralSealing({self._attester!r})"

    @property
    def type(self) -> str:
        """That of the attester."""
        return self._attester.type

    @property
    def binding(self) -> str:
        """That of the attester."""
        return self._attester.binding

    def evidence(self, report_data: bytes) -> Evidence:
        """That of the attester."""
        return self._attester.evidence(report_data)

    def sealing_key(self, label: str) -> bytes:
        """32 secret bytes from the CSPRNG, the same for the same label while the process lives."""
        return self._keys.setdefault(label, secrets.token_bytes(SEALING_BYTES))

    def counter(self) -> None:
        """None: there is no older sealed file that would open."""

    def claims(self) -> dict[str, Any]:
        """Those of the attester, and that its sealing is ephemeral."""
        return {**self._attester.claims(), "sealing": "ephemeral"}


def open_backend(name: str, settings: BackendSettings) -> Backend:
    """Open what a backend needs of the machine. Call it before `harden`; nothing secret is received here.

    Raises:
        AttestationError: the backend is unknown, or the machine lacks what it needs.
    """
    if name not in _OPENERS:
        raise AttestationError(f'backend "{name}" is unknown', hint="one of " + ", ".join(BACKENDS))
    if settings.sealing not in {"platform", "ephemeral"}:
        raise AttestationError(f'sealing "{settings.sealing}" is unknown', hint="platform or ephemeral")
    backend = _OPENERS[name](settings)
    start = backend.start
    if settings.gpu:
        gpu = NvmlGpus()
        start = _wrapped(start, lambda attester: WithGpuAttester(attester, gpu))
    if settings.sealing == "ephemeral":
        start = _wrapped(start, EphemeralSealing)
    return Backend(name, start, backend.needs_provision, backend.write_dirs, backend.read_dirs)


def _wrapped(
    start: Callable[[Measured], Attester], wrap: Callable[[Attester], Attester]
) -> Callable[[Measured], Attester]:
    return lambda measured: wrap(start(measured))


def _simulated(settings: BackendSettings) -> Backend:
    def start(measured: Measured) -> Attester:
        return SimulatedAttester(measured.provision, rtmr3=measured.register, layers=measured.layers)

    return Backend("simulated", start, needs_provision=True)


def _tdx(settings: BackendSettings) -> Backend:
    def start(measured: Measured) -> Attester:
        return TdxAttester(settings.collateral, events=measured.events)

    return Backend("tdx", start, write_dirs=(REPORT_ROOT, RTMR3_PATH.parent), read_dirs=_files(settings))


def _snp(settings: BackendSettings) -> Backend:
    # Opened now: the kernel refuses ioctl on devices that a confined process opens itself.
    keys = SevGuestDevice() if settings.sealing == "platform" else None

    def start(measured: Measured) -> Attester:
        return SnpAttester(settings.collateral, register=measured.register, keys=keys)

    return Backend("snp", start, write_dirs=(REPORT_ROOT,), read_dirs=_files(settings))


def _sgx(settings: BackendSettings) -> Backend:
    def start(measured: Measured) -> Attester:
        return SgxAttester(_needed(settings.collateral, "sgx"))

    return Backend("sgx", start, write_dirs=(GRAMINE_FOLDER,), read_dirs=_files(settings))


def _vtpm(settings: BackendSettings) -> Backend:
    port = DeviceTpm(settings.tcti)  # a connection that is open before hardening stays usable

    def start(measured: Measured) -> Attester:
        return VtpmAttester(
            settings.tcti,
            events=measured.events,
            folder=settings.state_dir,
            counter_index=settings.counter_index,
            port=port,
        )

    return Backend("vtpm", start)


def _azure(settings: BackendSettings) -> Backend:
    port = DeviceTpm(settings.tcti, key_handle=AK_HANDLE)

    def start(measured: Measured) -> Attester:
        return AzureAttester(
            _needed(settings.collateral, "azure"),
            td_quote=settings.td_quote,
            events=measured.events,
            folder=settings.state_dir,
            counter_index=settings.counter_index,
            port=port,
        )

    quote = (settings.td_quote,) if settings.td_quote is not None else ()
    return Backend("azure", start, read_dirs=(*_files(settings), *quote))


def _files(settings: BackendSettings) -> tuple[Path, ...]:
    return (settings.collateral,) if settings.collateral is not None else ()


def _needed(collateral: Path | None, backend: str) -> Path:
    if collateral is None:
        raise AttestationError(
            f"the backend {backend} needs a collateral file", hint="run `cloister collateral fetch`, then name the file"
        )
    return collateral


_OPENERS: dict[str, Callable[[BackendSettings], Backend]] = {
    "azure": _azure,
    "sgx": _sgx,
    "simulated": _simulated,
    "snp": _snp,
    "tdx": _tdx,
    "vtpm": _vtpm,
}
BACKENDS = tuple(sorted(_OPENERS))
