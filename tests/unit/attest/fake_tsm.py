"""A confidential guest's kernel in memory: configfs-tsm and the TDX measurement files, by the kernel's own rules.

The rules are those of drivers/virt/coco/guest/report.c, tsm-mr.c and fs/configfs/file.c of Linux.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloister.attest._attesters.tdx import RTMR3_PATH
from cloister.attest._attesters.tsm import REPORT_ROOT

Driver = Callable[[bytes, int], tuple[bytes, bytes]]  # (inblob, privlevel) -> (outblob, auxblob)


def failure(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))


@dataclass
class _Report:
    inblob: bytes = b""
    privlevel: int = 0
    write_generation: int = 0
    read_generation: int = 0
    blobs: tuple[bytes, bytes] | None = None


@dataclass
class FakeTsm:
    """One guest.

    Attributes:
        driver: makes the blobs; may raise OSError.
        provider: None plays a kernel whose driver is not loaded.
        hides_auxblob: as the TDX driver of newer kernels does.
        rtmr3: the register, None where the kernel has no such file.
        before: called before each step with its name, such as "read outblob", and the path; plays other processes, and
            raises OSError for a fault.
    """

    driver: Driver
    provider: str | None = "tdx_guest"
    floor: int = 0
    hides_auxblob: bool = False
    rtmr3: bytes | None = field(default_factory=lambda: bytes(48))
    before: Callable[[str, Path], None] = lambda step, path: None
    log: list[str] = field(default_factory=list)
    reports: dict[Path, _Report] = field(default_factory=dict)

    def _step(self, call: str, path: Path) -> None:
        name = "report" if path.parent == REPORT_ROOT else path.name
        self.log.append(f"{call} {name}")
        self.before(self.log[-1], path)

    def mkdir(self, path: Path) -> None:
        self._step("mkdir", path)
        assert path.parent == REPORT_ROOT
        if path in self.reports:
            raise failure(errno.EEXIST, path)
        if self.provider is None:
            raise failure(errno.ENXIO, path)
        self.reports[path] = _Report()

    def rmdir(self, path: Path) -> None:
        self._step("rmdir", path)
        if path not in self.reports:
            raise failure(errno.ENOENT, path)
        del self.reports[path]

    def exists(self, path: Path) -> bool:
        if path == RTMR3_PATH:
            return self.rtmr3 is not None
        if path.name == "auxblob" and self.hides_auxblob:
            return False
        return path.parent in self.reports

    def write(self, path: Path, data: bytes) -> None:
        try:
            self._step("write", path)
            self.store(path, data)
        except OSError:
            # configfs hands a binary attribute over when the file is closed, and drops the driver's answer.
            if path.name != "inblob":
                raise

    def store(self, path: Path, data: bytes) -> None:
        """A write of anybody; `write` is one of ours."""
        if path == RTMR3_PATH:
            return self._extend(data)
        report = self._report(path)
        if path.name == "inblob":
            if len(data) > 64:
                raise failure(errno.EFBIG, path)
            report.inblob = data
        elif path.name == "privlevel":
            level = int(data)
            if not self.floor <= level <= 3:
                raise failure(errno.EINVAL, path)
            report.privlevel = level
        else:
            raise failure(errno.EACCES, path)
        report.write_generation += 1
        return None

    def read(self, path: Path, limit: int) -> bytes:
        self._step("read", path)
        data = self._show(path)
        if len(data) > limit:
            raise failure(errno.EFBIG, path)
        return data

    def _show(self, path: Path) -> bytes:
        if path == RTMR3_PATH:
            if self.rtmr3 is None:
                raise failure(errno.ENOENT, path)
            return self.rtmr3
        report = self._report(path)
        if path.name == "provider":
            return f"{self.provider}\n".encode()
        if path.name == "generation":
            return f"{report.write_generation}\n".encode()
        assert path.name in ("outblob", "auxblob")
        if not report.inblob:
            raise failure(errno.EINVAL, path)
        if report.blobs is None or report.read_generation != report.write_generation:
            report.blobs = None
            report.blobs = self.driver(report.inblob, report.privlevel)
            report.read_generation = report.write_generation
        return report.blobs[path.name == "auxblob"]

    def _extend(self, data: bytes) -> None:
        if self.rtmr3 is None:
            raise failure(errno.ENOENT, RTMR3_PATH)
        if len(data) != 48:
            raise failure(errno.EINVAL, RTMR3_PATH)
        self.rtmr3 = hashlib.sha384(self.rtmr3 + data).digest()

    def _report(self, path: Path) -> _Report:
        if path.parent not in self.reports:
            raise failure(errno.ENOENT, path)
        return self.reports[path.parent]


def raising(code: int, at: str, *, times: int = 1) -> Callable[[str, Path], None]:
    """For `FakeTsm.before`: the first `times` steps named `at` fail with `code`."""
    left = [times]

    def before(step: str, path: Path) -> None:
        if step == at and left[0]:
            left[0] -= 1
            raise failure(code, path)

    return before
