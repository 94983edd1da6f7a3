"""The order and the decisions of hardening, on played kernels. What it does to a real process: tests/adversary."""

from __future__ import annotations

import errno
import os
import resource
import struct
from pathlib import Path

import pytest

from cloister.attest import HARDENING_LAYERS
from cloister.enclave import REQUIRED_LAYERS, _harden
from cloister.enclave._kernel import LinuxKernel
from cloister.errors import HardeningError


class FakeKernel:
    """Grants everything, unless told otherwise; `calls` has the order."""

    def __init__(self, *, landlock: int = 7, status: str = "TracerPid:\t0\nThreads:\t1\n", **results: int) -> None:
        self.machine = "x86_64"
        self.landlock = landlock
        self.status = status
        self.results = results
        self.calls: list[str] = []
        self.rules: list[tuple[int, str]] = []
        self.handled = (0, 0, 0)

    def syscall(self, name: str, *arguments) -> int:
        if name == "prctl":
            name = f"prctl_{arguments[0]}"
        self.calls.append(name)
        if name in self.results:
            return self.results[name]
        if name == "landlock_create_ruleset":
            if arguments[0] is None:
                return self.landlock
            self.handled = struct.unpack("=QQQ", arguments[0])
            return os.open("/dev/null", os.O_RDONLY)
        if name == "landlock_add_rule":
            rights, descriptor = struct.unpack("=Qi", arguments[2].raw[:12])
            self.rules.append((rights, str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        if name == "memfd_secret":
            return os.open("/dev/null", os.O_RDONLY)
        return 1 if name == "prctl_39" else 0

    def process_status(self) -> str:
        return self.status


@pytest.fixture(autouse=True)
def core_limit(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The test process keeps its own limit."""
    limits: list[tuple] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *args: limits.append(args))
    return limits


def harden(kernel: FakeKernel, work: Path, *read: Path, require=REQUIRED_LAYERS) -> tuple[str, ...]:
    return _harden.harden_with(kernel, work_dirs=[work], read_dirs=read, require=require)


def test_all_layers_in_the_order_of_the_evidence(tmp_path, core_limit):
    kernel = FakeKernel()
    assert harden(kernel, tmp_path) == HARDENING_LAYERS
    assert core_limit == [(resource.RLIMIT_CORE, (0, 0))]
    order = [call for call in dict.fromkeys(kernel.calls) if call != "landlock_add_rule"]
    assert order == [
        "prctl_4",
        "prctl_3",
        "prctl_38",
        "prctl_39",
        "landlock_create_ruleset",
        "landlock_restrict_self",
        "memfd_secret",
        "seccomp",
    ]


def test_rights_of_each_kind_of_path(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "read").mkdir()
    (tmp_path / "file").write_text("x")
    kernel = FakeKernel()
    harden(kernel, tmp_path / "work", tmp_path / "read", tmp_path / "file")
    rights = {path: right for right, path in kernel.rules}
    execute, write, read, read_dir, make_socket, ioctl = 1, 2, 4, 8, 1 << 9, 1 << 15
    work = rights[str(tmp_path / "work")]
    assert work & write
    assert work & read
    assert not work & (execute | make_socket | ioctl)
    assert rights[str(tmp_path / "read")] == read | read_dir
    assert rights[str(tmp_path / "file")] == read
    assert rights["/dev/null"] == read | write
    assert not any(right & execute for right in rights.values())


@pytest.mark.parametrize(
    ("version", "layers", "handled"),
    [
        (1, ("landlock",), ((1 << 13) - 1, 0, 0)),
        (2, ("landlock",), ((1 << 14) - 1, 0, 0)),
        (3, ("landlock",), ((1 << 15) - 1, 0, 0)),
        (4, ("landlock", "landlock_net"), ((1 << 15) - 1, 3, 0)),
        (5, ("landlock", "landlock_net"), ((1 << 16) - 1, 3, 0)),
        (6, ("landlock", "landlock_net", "landlock_scope"), ((1 << 16) - 1, 3, 3)),
    ],
)
def test_each_landlock_version(tmp_path, version, layers, handled):
    kernel = FakeKernel(landlock=version)
    achieved = harden(kernel, tmp_path)
    assert tuple(name for name in achieved if name.startswith("landlock")) == layers
    assert kernel.handled == handled


def test_missing_optional_layers_are_left_out(tmp_path):
    kernel = FakeKernel(landlock=-errno.EOPNOTSUPP, memfd_secret=-errno.ENOSYS)
    assert harden(kernel, tmp_path) == ("no_dump", "no_tracer", "no_core", "no_new_privs", "seccomp")


def test_missing_optional_layer_that_is_required(tmp_path):
    with pytest.raises(HardeningError, match="landlock"):
        harden(FakeKernel(landlock=0), tmp_path, require=frozenset({"landlock"}))


@pytest.mark.parametrize(
    ("results", "layer"), [({"prctl_3": 1}, "no_dump"), ({"prctl_39": 0}, "no_new_privs"), ({"seccomp": -1}, "seccomp")]
)
def test_missing_required_layer(tmp_path, results, layer):
    with pytest.raises(HardeningError, match=layer):
        harden(FakeKernel(**results), tmp_path)
    assert layer not in harden(FakeKernel(**results), tmp_path, require=frozenset())


def test_attached_debugger(tmp_path):
    with pytest.raises(HardeningError, match="TracerPid 41"):
        harden(FakeKernel(status="TracerPid:\t41\nThreads:\t1\nno colon here\n"), tmp_path, require=frozenset())


def test_threads_before_hardening(tmp_path):
    with pytest.raises(HardeningError, match="3 threads"):
        harden(FakeKernel(status="TracerPid:\t0\nThreads:\t3\n"), tmp_path, require=frozenset())


def test_status_that_cannot_be_read(tmp_path, monkeypatch):
    kernel = FakeKernel(status="")
    with pytest.raises(HardeningError, match="TracerPid -1"):
        harden(kernel, tmp_path, require=frozenset())

    def fail() -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(kernel, "process_status", fail)
    with pytest.raises(HardeningError, match="/proc/self/status"):
        harden(kernel, tmp_path, require=frozenset())


def test_unknown_required_layer(tmp_path):
    with pytest.raises(HardeningError, match="unknown hardening layers: magic"):
        harden(FakeKernel(), tmp_path, require=frozenset({"magic"}))


def test_work_folder_that_does_not_exist(tmp_path):
    with pytest.raises(HardeningError, match="missing"):
        harden(FakeKernel(), tmp_path / "missing")


@pytest.mark.parametrize("call", ["landlock_add_rule", "landlock_restrict_self"])
def test_landlock_that_fails_half_way(tmp_path, call):
    with pytest.raises(HardeningError, match="Landlock is there and cannot"):
        harden(FakeKernel(**{call: -errno.EINVAL}), tmp_path)


def test_harden_asks_the_kernel_below(tmp_path, monkeypatch):
    kernel = FakeKernel()
    monkeypatch.setattr(_harden, "LinuxKernel", lambda: kernel)
    assert _harden.harden(work_dirs=[tmp_path], read_dirs=[]) == HARDENING_LAYERS
    assert "Threads" in LinuxKernel().process_status()
