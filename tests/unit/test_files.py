from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cloister._files import write_whole
from cloister.attest import SimulatedRoot, write_policy
from cloister.errors import AttestationError, ConfigError, StoreError, StoreFullError


def test_parts_are_joined_and_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"one ", bytearray(b"two "), memoryview(b"three"))
    assert path.read_bytes() == b"one two three"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_whole(path, mode=0o640)
    assert path.read_bytes() == b""
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 & ~_umask()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


def test_file_then_name_then_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "file", []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(fd: int) -> None:
        said.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_sync(fd)

    def replace(self: Path, target: Path) -> Path:
        said.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_whole(path, b"x")
    assert said == ["file", "rename", "folder"]


def test_an_interrupt_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_each_owner_raises_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = SimulatedRoot.create(tmp_path / "root", now=1_800_000_000)
    with pytest.raises(StoreError, match="cannot be written"):
        write_whole(tmp_path / "no" / "file", b"")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError) as caught:
        write_whole(tmp_path / "file", b"")
    assert caught.value.hint
    with pytest.raises(ConfigError, match="cannot write the policy"):
        write_policy(tmp_path / "policy.toml", root_sha256="ab" * 32)
    with pytest.raises(AttestationError, match="cannot write a simulated root"):
        root.refresh(1_800_000_001)
