"""Reports of a confidential guest through Linux's configfs-tsm, which TDX and SNP share (Linux 6.7 or newer).

The rules are the kernel's, Documentation/ABI/testing/configfs-tsm-report: one folder for each report, `inblob` in one
write, and a `generation` that counts writes, so that a reader knows whether somebody else wrote in between.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cloister.attest._types import REPORT_DATA_BYTES
from cloister.errors import AttestationError

REPORT_ROOT = Path("/sys/kernel/config/tsm/report")

Sleep = Callable[[float], None]

# include/linux/tsm.h limits a blob to 32 KiB, later kernels to more; evidence on the wire is limited to 1 MiB.
_MAX_BLOB_BYTES = 1 << 20
_MAX_SIDE_FILE_BYTES = 1 << 20
_MAX_TEXT_BYTES = 4096  # a configfs text attribute
# A busy quoting service, a signal, a quote that the host did not deliver in time, a name that is taken.
_RETRIED = frozenset({errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.EEXIST})
ATTEMPTS = 8
_FIRST_PAUSE_S = 0.05  # doubled each time: 6.4 s in all


class FileSystem(Protocol):
    """The five calls that an attester makes to the kernel's file systems. Each raises OSError that names its path."""

    def mkdir(self, path: Path) -> None:
        """Make one folder; an existing one is an error."""
        ...

    def rmdir(self, path: Path) -> None:
        """Remove one folder. In configfs the attributes in it go along."""
        ...

    def read(self, path: Path, limit: int) -> bytes:
        """What one read() returns; more than `limit` bytes are an error."""
        ...

    def write(self, path: Path, data: bytes) -> None:
        """Write `data` in exactly one write(); anything less is an error."""
        ...

    def exists(self, path: Path) -> bool:
        """Whether there is something at `path` that this user may see."""
        ...


class HostFileSystem:
    """The file systems of this machine."""

    def mkdir(self, path: Path) -> None:
        """As `FileSystem.mkdir`."""
        path.mkdir()

    def rmdir(self, path: Path) -> None:
        """As `FileSystem.rmdir`."""
        path.rmdir()

    def read(self, path: Path, limit: int) -> bytes:
        """As `FileSystem.read`."""
        with _opened(path, os.O_RDONLY) as descriptor:
            data = os.read(descriptor, limit + 1)
            if len(data) > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return data

    def write(self, path: Path, data: bytes) -> None:
        """As `FileSystem.write`. configfs acts on a binary attribute when the file is closed, so it is closed here."""
        with _opened(path, os.O_WRONLY) as descriptor:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.EIO, "only a part was written")

    def exists(self, path: Path) -> bool:
        """As `FileSystem.exists`."""
        return os.path.exists(path)  # noqa: PTH110 - Path.exists raises where this user may not look


@contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    except OSError as error:
        # read() and write() do not know the path, and whoever reads the error needs it.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class TsmReport:
    """One report, exactly as the kernel handed it out. Public; nothing in it is verified.

    Attributes:
        provider: the kernel's name of the driver, "tdx_guest" or "sev_guest".
        outblob: TDX: the quote. SNP: the attestation report.
        auxblob: SNP: the host's certificate table. Empty where there is none.
    """

    provider: str
    outblob: bytes = field(repr=False)
    auxblob: bytes = field(repr=False)


def tsm_report(
    report_data: bytes,
    *,
    provider: str,
    fs: FileSystem,
    privlevel: int | None = None,
    sleep: Sleep = time.sleep,
) -> TsmReport:
    """A fresh report over `report_data`, in a folder of its own that is removed again whatever happens.

    Success means that nobody wrote to the folder between our first look and the last read: the generation moved by
    exactly our own writes. The caller must still check that the report carries `report_data`.

    Args:
        report_data: 64 bytes, public.
        provider: the driver that must answer; one of another TEE is refused.
        fs: the port; tests play kernels.
        privlevel: SNP's VMPL, written where it is given.
        sleep: between attempts, in seconds.

    Raises:
        AttestationError: `report_data` is not 64 bytes, or there is no report; the error names the path.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError(f"report_data is {len(report_data)} bytes, not {REPORT_DATA_BYTES}")
    cause = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
        folder = REPORT_ROOT / f"cloister-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            report = _attempt(fs, folder, report_data, provider=provider, privlevel=privlevel, sleep=sleep)
        except OSError as error:
            cause = f"{error.filename or folder}: {error.strerror}"
            if error.errno not in _RETRIED:
                raise AttestationError(f"no attestation report: {cause}", hint=_hint(error.errno, provider)) from None
            continue
        if report is not None:
            return report
        cause = f"{folder}: another process writes to it"
    raise AttestationError(
        f"no attestation report after {ATTEMPTS} attempts: {cause}",
        hint="the quoting service of the host is busy or gone; try again later, and ask the operator of the host",
    )


def _attempt(
    fs: FileSystem, folder: Path, report_data: bytes, *, provider: str, privlevel: int | None, sleep: Sleep
) -> TsmReport | None:
    """One report, or None where somebody else wrote to the folder."""
    fs.mkdir(folder)
    try:
        found = fs.read(folder / "provider", _MAX_TEXT_BYTES).decode(errors="replace").strip()
        if found != provider:
            raise AttestationError(
                f"{folder / 'provider'} is {found!r}, not {provider!r}",
                hint="this guest is of another TEE: choose its backend (`cloister doctor` names it)",
            )
        before = _generation(fs, folder)
        writes = 1
        if privlevel is not None:
            fs.write(folder / "privlevel", str(privlevel).encode())
            writes += 1
        fs.write(folder / "inblob", report_data)
        outblob = fs.read(folder / "outblob", _MAX_BLOB_BYTES)
        # TDX has no such attribute on newer kernels, and an empty one on older.
        auxblob = fs.read(folder / "auxblob", _MAX_BLOB_BYTES) if fs.exists(folder / "auxblob") else b""
        # Last, so that it vouches for everything above: configfs does not even report a refused inblob.
        if _generation(fs, folder) != before + writes:
            return None
        if not outblob:
            raise AttestationError(f"{folder / 'outblob'} is empty", hint=_hint(None, provider))
        return TsmReport(found, outblob, auxblob)
    finally:
        _remove(fs, folder, sleep)


def _generation(fs: FileSystem, folder: Path) -> int:
    text = fs.read(folder / "generation", _MAX_TEXT_BYTES)
    try:
        return int(text)
    except ValueError:
        raise AttestationError(f"{folder / 'generation'} does not hold a number") from None


def _remove(fs: FileSystem, folder: Path, sleep: Sleep) -> None:
    """Remove the folder: a report in it stays in kernel memory until somebody does."""
    cause = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(_FIRST_PAUSE_S)
        try:
            return fs.rmdir(folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            cause = error.strerror
            if error.errno not in _RETRIED:
                break
    raise AttestationError(f"cannot remove {folder}: {cause}", hint=f"remove it by hand: rmdir {folder}")


def _hint(code: int | None, provider: str) -> str:
    if code in (errno.ENOENT, errno.ENOTDIR):
        return (
            f"needs Linux 6.7 or newer with the driver {provider} (modprobe {provider}) and configfs "
            "(mount -t configfs none /sys/kernel/config)"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"let this user make folders in {REPORT_ROOT}; a hardened process needs it among its work folders"
    if code in (errno.ENXIO, errno.ENOTTY, errno.ENODEV):
        return f"the driver {provider} does not answer; load it again (modprobe {provider}) or start the guest anew"
    return f"the kernel's log (dmesg) says what the driver {provider} met"


def side_file(source: bytes | Path, *, what: str, hint: str) -> bytes:
    """Public material that travels with evidence, given as bytes or as a file; never fetched.

    Raises:
        AttestationError: it is missing, empty, unreadable or over 1 MiB; the error names the file.
    """
    if isinstance(source, bytes):
        data, name = source, what
    else:
        name = f"{what} {source}"
        try:
            with source.open("rb") as stream:
                data = stream.read(_MAX_SIDE_FILE_BYTES + 1)
        except OSError as error:
            raise AttestationError(f"{name} cannot be read: {error.strerror}", hint=hint) from None
    if not data:
        raise AttestationError(f"{name} is empty", hint=hint)
    if len(data) > _MAX_SIDE_FILE_BYTES:
        raise AttestationError(f"{name} is over the limit of {_MAX_SIDE_FILE_BYTES} bytes", hint=hint)
    return data
