"""How every enclave process starts: listen, harden, then take secrets; measure, then make evidence."""

from __future__ import annotations

import os
import site
import socket
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.attest import (
    Attester,
    BackendSettings,
    Measured,
    Policy,
    measure_folder,
    measure_package,
    measurement_events,
    open_backend,
)
from cloister.enclave import bind_host_socket, harden

if TYPE_CHECKING:
    from cloister.config import Job

    from ._folder import RunFolder

MAX_PROVISION_BYTES = 1 << 20


@dataclass(frozen=True)
class StartedEnclave:
    """A hardened and measured process.

    Attributes:
        listener: the host port, bound and not yet served.
        attester: makes evidence and sealing keys.
        layers: of hardening, as the evidence says.
        register: value of the run-time register.
    """

    listener: socket.socket
    attester: Attester
    layers: tuple[str, ...]
    register: bytes


def start_enclave(
    job: Job,
    folder: RunFolder,
    policy: Policy,
    *,
    socket_path: Path,
    work: Path,
    read: Iterable[Path],
) -> StartedEnclave:
    """Start-up order of attestation-and-channel.md section 2. The one secret comes over standard input.

    Args:
        job, policy: read before hardening; they are measured here.
        socket_path: the host port.
        work: the one folder that this process writes; untrusted at rest.
        read: what it reads besides the backbone, the system and the installed packages.

    Raises:
        EnclaveError, AttestationError: it cannot be hardened or measured, or the backend does not work here.
    """
    listener = bind_host_socket(socket_path)
    os.environ["TMPDIR"] = str(work)
    backend = open_backend(job.enclave.backend, _settings(job, work))
    layers = harden(
        work_dirs=[work, *backend.write_dirs],
        read_dirs=[*_code_dirs(), folder.model, *read, *backend.read_dirs],
    )
    provision = sys.stdin.buffer.read(MAX_PROVISION_BYTES) if backend.needs_provision else b""
    events = measurement_events(
        package=measure_package(),
        job_sha384=job.sha384,
        policy_template=policy.template_sha384,
        weights=measure_folder(folder.model),
    )
    measured = Measured(tuple(events), layers, provision)
    return StartedEnclave(listener, backend.start(measured), tuple(layers), measured.register)


def _settings(job: Job, work: Path) -> BackendSettings:
    given = job.enclave
    return BackendSettings(
        collateral=Path(given.collateral) if given.collateral else None,
        td_quote=Path(given.td_quote) if given.td_quote else None,
        tcti=given.tcti,
        state_dir=work,
        counter_index=given.counter_index,
        gpu=given.gpu,
        sealing=given.sealing,
    )


def _code_dirs() -> list[Path]:
    """Where the interpreter and the installed packages lie."""
    import cloister

    found = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()}
    found.add(str(Path(cloister.__file__).parent))
    return [Path(path) for path in sorted(found) if Path(path).exists()]
