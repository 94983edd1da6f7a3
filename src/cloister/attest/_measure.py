"""Measurements: digests of what is loaded, and the run-time register that they are extended into.

Normative: spec/attestation.md section 3. Two builds of one commit give the same values on any machine, with the same
compiler and Python: the compiled kernels are measured as the file that they are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from cloister.errors import AttestationError
from cloister.wire import enc

_EVENT_LABEL = b"cloister-measure/v1"
_DIGEST_BYTES = 48
_SKIPPED_SUFFIXES = (".pyc", ".pyo")
_SKIPPED_FOLDERS = ("__pycache__",)


def measure_package(root: str | Path | None = None) -> bytes:
    """SHA-384 over the installed cloister files, the lock file `constraints.txt` and the kernels among them. Public.

    Compiled caches and hidden files are left out; everything else that the package ships is in. The libraries that it
    imports are named by the lock file with their versions, and are not themselves hashed.

    Args:
        root: the package folder; by default the one that this module was imported from.

    Raises:
        AttestationError: the folder cannot be measured, or has no lock file.
    """
    folder = Path(root) if root is not None else Path(__file__).resolve().parent.parent
    if not (folder / "constraints.txt").is_file():
        raise AttestationError(f"{folder} has no constraints.txt, so the measured code has no lock file")
    return measure_folder(folder)


def measure_folder(path: str | Path) -> bytes:
    """SHA-384 over the files of a folder: relative paths in order of their bytes, sizes and contents. Public.

    Links to files count as the files (the Hugging Face cache is made of such links); links to folders are refused,
    since what is behind them would be loaded and not measured.

    Raises:
        AttestationError: not a folder, empty, unreadable, or with a link to a folder.
    """
    folder = Path(path)
    whole = hashlib.sha384()
    try:
        files = sorted(_files(folder), key=lambda file: _relative(folder, file))
        if not files:
            raise AttestationError(f"{folder} is not a folder with files, so there is nothing to measure")
        for file in files:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha384").digest()
            whole.update(enc(_relative(folder, file), digest))
    except OSError as error:
        raise AttestationError(f"cannot measure {folder}: {error.strerror}: {error.filename}") from None
    return whole.digest()


def measurement_events(*, package: bytes, job_sha384: bytes, policy_template: bytes, weights: bytes) -> list[bytes]:
    """What the run-time register is extended with before the first evidence, in this order; 48 bytes each. Public.

    Args:
        package: from `measure_package`.
        job_sha384: SHA-384 of the job's shared part.
        policy_template: `Policy.template_sha384`.
        weights: from `measure_folder` of the backbone.

    Raises:
        AttestationError: a value is not 48 bytes.
    """
    values = {"package": package, "job": job_sha384, "policy": policy_template, "weights": weights}
    for label, value in values.items():
        _check_digest(f"measurement {label}", value)
    return [hashlib.sha384(enc(_EVENT_LABEL, label.encode(), value)).digest() for label, value in values.items()]


def register_history(events: Iterable[bytes]) -> list[bytes]:
    """The register before the first event and after each, 48 bytes each; the last is what evidence must state."""
    history = [bytes(_DIGEST_BYTES)]
    for event in events:
        history.append(hashlib.sha384(history[-1] + event).digest())
    return history


def expected_rtmr3(*, package: bytes, job_sha384: bytes, policy_template: bytes, weights: bytes) -> bytes:
    """The run-time register of an enclave that loaded exactly these, 48 bytes. Public; deterministic.

    Args:
        package, job_sha384, policy_template, weights: as `measurement_events`.

    Raises:
        AttestationError: a value is not 48 bytes.
    """
    events = measurement_events(
        package=package, job_sha384=job_sha384, policy_template=policy_template, weights=weights
    )
    return register_history(events)[-1]


def expected_host_data(register: bytes) -> bytes:
    """HOST_DATA with which an SNP guest must be launched, 32 bytes: SHA-256 of the register. Public; deterministic.

    SNP has no register that a guest can extend. The host writes HOST_DATA at launch and cannot change it afterwards,
    and the enclave refuses to start under another value than that of what it loaded.

    Args:
        register: from `expected_rtmr3`.

    Raises:
        AttestationError: `register` is not 48 bytes.
    """
    _check_digest("run-time register", register)
    return hashlib.sha256(register).digest()


def _check_digest(name: str, value: bytes) -> None:
    if len(value) != _DIGEST_BYTES:
        raise AttestationError(f"the {name} is {len(value)} bytes, not {_DIGEST_BYTES}")


def _relative(folder: Path, file: Path) -> bytes:
    return os.fsencode(file.relative_to(folder).as_posix())


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=_raise):
        # Pruned in place: os.walk then does not descend.
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise AttestationError(f"{Path(parent) / name} is a link to a folder and cannot be measured")
        for name in names:
            if not name.startswith(".") and not name.endswith(_SKIPPED_SUFFIXES):
                yield Path(parent) / name


def _raise(error: OSError) -> None:
    raise error
