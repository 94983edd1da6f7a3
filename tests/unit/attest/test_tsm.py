"""Reports through configfs-tsm, on a kernel that is played by its rules, and the port on real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.attest.fake_tsm import FakeTsm, failure, raising

from cloister.attest._attesters import tsm
from cloister.attest._attesters.tsm import ATTEMPTS, REPORT_ROOT, HostFileSystem, TsmReport, side_file, tsm_report
from cloister.errors import AttestationError

DATA = bytes(range(64))
OTHER = b"\xee" * 64
STEPS = [
    "mkdir report",
    "read provider",
    "read generation",
    "write inblob",
    "read outblob",
    "read auxblob",
    "read generation",
    "rmdir report",
]


def guest(**options) -> FakeTsm:
    return FakeTsm(lambda inblob, level: (b"quote over " + inblob, b"certificates"), **options)


def ask(fs: FakeTsm, *, data: bytes = DATA, pauses: list[float] | None = None, **options) -> TsmReport:
    pauses = [] if pauses is None else pauses
    return tsm_report(data, provider="tdx_guest", fs=fs, sleep=pauses.append, **options)


def test_one_report_in_the_order_of_the_kernels_rules():
    fs = guest()
    assert ask(fs) == TsmReport("tdx_guest", b"quote over " + DATA, b"certificates")
    assert fs.log == STEPS
    assert fs.reports == {}


def test_a_driver_without_auxblob():
    assert ask(guest(hides_auxblob=True)).auxblob == b""


def test_privilege_level_is_written_before_the_data_and_counted():
    levels: list[int] = []

    def driver(inblob: bytes, level: int) -> tuple[bytes, bytes]:
        levels.append(level)
        return inblob, b""

    fs = FakeTsm(driver)
    ask(fs, privlevel=2)
    assert levels == [2]
    assert fs.log.index("write privlevel") == fs.log.index("write inblob") - 1


def test_privilege_level_below_the_floor():
    with pytest.raises(AttestationError, match=r"privlevel: Invalid argument"):
        ask(guest(floor=2), privlevel=1)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size(size):
    fs = guest()
    with pytest.raises(AttestationError, match=f"report_data is {size} bytes, not 64"):
        ask(fs, data=bytes(size))
    assert fs.log == []


# --- somebody else writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(3, 7), ids=lambda number: f"{number} {STEPS[number]}")
@pytest.mark.parametrize("attribute", ["inblob", "privlevel"])
def test_another_writer_at_any_step_makes_us_start_again(step, attribute):
    fs, pauses = guest(), []

    def other(_: str, path: Path) -> None:
        if len(fs.log) == step + 1:
            fs.store(path.parent / attribute, OTHER if attribute == "inblob" else b"1")

    fs.before = other
    assert ask(fs, pauses=pauses).outblob == b"quote over " + DATA
    assert len(pauses) == 1
    assert fs.log.count("mkdir report") == fs.log.count("rmdir report") == 2
    assert fs.reports == {}


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=ATTEMPTS * len(STEPS)))
def test_never_a_report_over_the_data_of_another_writer(writes):
    fs = guest()

    def other(_: str, path: Path) -> None:
        if path.parent in fs.reports and len(fs.log) <= len(writes) and writes[len(fs.log) - 1]:
            fs.store(path.parent / "inblob", OTHER)

    fs.before = other
    try:
        assert ask(fs).outblob == b"quote over " + DATA
    except AttestationError as error:
        assert "another process" in error.cause
    assert fs.reports == {}


def test_a_write_that_the_kernel_drops_in_silence():
    """configfs does not report a refused inblob: only the generation tells."""
    fs, pauses = guest(), []
    fs.before = raising(errno.EBUSY, "write inblob")
    with pytest.raises(AttestationError, match="outblob: Invalid argument"):
        ask(fs)

    def driver_with_old_data(_: str, path: Path) -> None:
        if fs.log[-1] == "write inblob" and fs.log.count("write inblob") == 2:
            fs.reports[path.parent].inblob = OTHER  # left by somebody, without a write of this generation
            raise failure(errno.EBUSY, path)

    fs.before = driver_with_old_data
    assert ask(fs, pauses=pauses).outblob == b"quote over " + DATA
    assert len(pauses) == 1


def test_two_processes_that_choose_one_name(monkeypatch):
    names = iter(["a", "a", "b"])
    monkeypatch.setattr(tsm.secrets, "token_hex", lambda _: next(names))
    fs = guest()
    inner: list[TsmReport] = []

    def other(step: str, _: Path) -> None:
        if step == "read outblob" and not inner:
            fs.before = lambda step, path: None
            inner.append(ask(fs, data=OTHER))

    fs.before = other
    assert ask(fs).outblob == b"quote over " + DATA
    assert [report.outblob for report in inner] == [b"quote over " + OTHER]


# --- faults of the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EINTR, errno.ETIMEDOUT])
@pytest.mark.parametrize("step", sorted(set(STEPS) - {"write inblob"}))
def test_passing_faults_are_retried(code, step):
    fs, pauses = guest(), []
    fs.before = raising(code, step)
    assert ask(fs, pauses=pauses).outblob == b"quote over " + DATA
    assert len(pauses) == 1
    assert fs.reports == {}


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EINTR, errno.ETIMEDOUT])
def test_retries_are_bounded(code):
    fs, pauses = guest(), []
    fs.before = raising(code, "read outblob", times=1000)
    with pytest.raises(AttestationError, match=rf"after {ATTEMPTS} attempts: {REPORT_ROOT}.*/outblob: ") as caught:
        ask(fs, pauses=pauses)
    assert caught.value.hint
    assert pauses == [0.05 * 2**i for i in range(ATTEMPTS - 1)]
    assert fs.reports == {}


@pytest.mark.parametrize(
    ("code", "step", "hint"),
    [
        (errno.ENOENT, "mkdir report", "mount -t configfs"),
        (errno.ENOTDIR, "mkdir report", "modprobe tdx_guest"),
        (errno.EACCES, "mkdir report", "work folders"),
        (errno.EPERM, "mkdir report", "work folders"),
        (errno.EROFS, "mkdir report", "work folders"),
        (errno.ENXIO, "mkdir report", "does not answer"),
        (errno.ENOTTY, "read outblob", "does not answer"),
        (errno.ENODEV, "read outblob", "does not answer"),
        (errno.EIO, "read outblob", "dmesg"),
    ],
)
def test_lasting_faults_end_at_once_with_path_and_hint(code, step, hint):
    fs, pauses = guest(), []
    fs.before = raising(code, step)
    with pytest.raises(AttestationError, match=rf"no attestation report: {REPORT_ROOT}/cloister-") as caught:
        ask(fs, pauses=pauses)
    assert os.strerror(code) in caught.value.cause
    assert hint in caught.value.hint
    assert pauses == []
    assert fs.reports == {}


def test_an_error_without_a_path_still_names_the_folder():
    fs = guest()

    def fail(step: str, _: Path) -> None:
        if step == "read outblob":
            raise OSError(errno.EIO, "Input/output error")

    fs.before = fail
    with pytest.raises(AttestationError, match=rf"{REPORT_ROOT}/cloister-[0-9]+-[0-9a-f]+: Input/output"):
        ask(fs)


def test_no_driver():
    with pytest.raises(AttestationError, match="No such device") as caught:
        ask(guest(provider=None))
    assert "modprobe" in caught.value.hint


def test_a_guest_of_another_tee():
    fs = guest(provider="sev_guest")
    with pytest.raises(AttestationError, match=r"provider is 'sev_guest', not 'tdx_guest'"):
        ask(fs)
    assert "write inblob" not in fs.log
    assert fs.reports == {}


def test_an_empty_report():
    with pytest.raises(AttestationError, match="outblob is empty"):
        ask(FakeTsm(lambda inblob, level: (b"", b"")))


def test_a_generation_that_is_no_number(monkeypatch):
    fs = guest()
    show = fs._show
    monkeypatch.setattr(fs, "_show", lambda path: b"many\n" if path.name == "generation" else show(path))
    with pytest.raises(AttestationError, match="generation does not hold a number"):
        ask(fs)


def test_the_folder_goes_even_when_we_are_interrupted():
    fs = guest()

    def interrupt(step: str, _: Path) -> None:
        if step == "read outblob":
            raise KeyboardInterrupt

    fs.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        ask(fs)
    assert fs.reports == {}


def test_a_folder_that_somebody_else_removed():
    fs = guest()

    def remove(step: str, path: Path) -> None:
        if step == "rmdir report":
            fs.reports.pop(path)

    fs.before = remove
    assert ask(fs).outblob


@pytest.mark.parametrize(("code", "tries"), [(errno.EBUSY, ATTEMPTS), (errno.EPERM, 1)])
def test_a_folder_that_cannot_be_removed(code, tries):
    fs = guest()
    fs.before = raising(code, "rmdir report", times=1000)
    with pytest.raises(AttestationError, match=f"cannot remove {REPORT_ROOT}/.*{os.strerror(code)}") as caught:
        ask(fs)
    assert "rmdir" in caught.value.hint
    assert fs.log.count("rmdir report") == tries


# --- the port on real files -----------------------------------------------------------------------------------------


def test_host_file_system(tmp_path):
    fs = HostFileSystem()
    folder = tmp_path / "folder"
    fs.mkdir(folder)
    assert fs.exists(folder)
    with pytest.raises(FileExistsError):
        fs.mkdir(folder)
    (folder / "file").write_bytes(b"")
    fs.write(folder / "file", b"0123456789")
    assert fs.read(folder / "file", 10) == b"0123456789"
    with pytest.raises(OSError, match="too large") as caught:
        fs.read(folder / "file", 9)
    assert caught.value.filename == str(folder / "file")
    with pytest.raises(FileNotFoundError):
        fs.write(folder / "missing", b"x")
    assert not fs.exists(folder / "missing")
    (folder / "file").unlink()
    fs.rmdir(folder)
    assert not fs.exists(folder)


def test_host_file_system_uses_one_call_and_leaves_no_descriptor(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"")
    written: list[int] = []

    def part(descriptor: int, data: bytes) -> int:
        written.append(descriptor)
        return len(data) - 1

    monkeypatch.setattr(os, "write", part)
    with pytest.raises(OSError, match="part") as caught:
        HostFileSystem().write(path, bytes(64))
    assert caught.value.filename == str(path)
    assert len(written) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(written[0])


def test_side_file(tmp_path):
    path = tmp_path / "collateral.json"
    for source, reason in ((path, "cannot be read"), (b"", "is empty"), (bytes((1 << 20) + 1), "over the limit")):
        with pytest.raises(AttestationError, match=reason) as caught:
            side_file(source, what="collateral", hint="fetch it")
        assert caught.value.hint == "fetch it"
    path.write_bytes(b"")
    with pytest.raises(AttestationError, match=r"collateral .*collateral\.json is empty"):
        side_file(path, what="collateral", hint="")
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(AttestationError, match=r"collateral\.json is over the limit"):
        side_file(path, what="collateral", hint="")
    path.write_bytes(bytes(1 << 20))
    assert side_file(path, what="collateral", hint="") == bytes(1 << 20)
