from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cloister import channel
from cloister.errors import ChannelError, DecryptionError, StoreError, StoreFullError

_KEY = bytes(range(32))


def _write(path: Path, plaintext: bytes = b"state", **kwargs: object) -> None:
    arguments: dict[str, object] = {"key": _KEY, "label": "checkpoint", "version": 7, **kwargs}
    channel.write_sealed(path, plaintext, **arguments)  # type: ignore[arg-type]


def test_comes_back_with_its_version(tmp_path: Path) -> None:
    path = tmp_path / "state.sealed"
    _write(path)
    assert channel.read_sealed(path, key=_KEY, label="checkpoint") == (7, b"state")
    assert channel.read_sealed(str(path), key=_KEY, label="checkpoint") == (7, b"state")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes()[:13] == b"CLSF\x01" + (7).to_bytes(8, "big")


def test_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.sealed"
    _write(path)
    _write(path, b"newer", version=8)
    assert channel.read_sealed(path, key=_KEY, label="checkpoint") == (8, b"newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.sealed"]


@pytest.mark.parametrize("version", [-1, 1 << 64])
def test_version_is_64_bits(version: int, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        _write(tmp_path / "x", version=version)
    _write(tmp_path / "x", version=(1 << 64) - 1)


def test_wrong_key_or_label_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "state.sealed"
    _write(path)
    for key, label in ((bytes(32), "checkpoint"), (_KEY, "other"), (bytes(16), "checkpoint")):
        with pytest.raises(DecryptionError, match=r"state\.sealed"):
            channel.read_sealed(path, key=key, label=label)
    with pytest.raises(ChannelError):
        _write(path, key=bytes(16))


def test_one_altered_bit_anywhere_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "state.sealed"
    _write(path, b"ab")
    sealed = path.read_bytes()
    for bit in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(DecryptionError):
            channel.read_sealed(path, key=_KEY, label="checkpoint")
    for size in range(len(sealed)):
        path.write_bytes(sealed[:size])
        with pytest.raises(DecryptionError):
            channel.read_sealed(path, key=_KEY, label="checkpoint")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.sealed") as caught:
        channel.read_sealed(tmp_path / "gone.sealed", key=_KEY, label="checkpoint")
    assert caught.value.path == str(tmp_path / "gone.sealed")


def test_a_missing_folder_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written") as caught:
        _write(tmp_path / "no" / "state.sealed")
    assert not isinstance(caught.value, StoreFullError)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_the_old_file(
    code: int, owner: object, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.sealed"
    _write(path)

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(StoreFullError, match=r"state\.sealed") as caught:
        _write(path, b"newer", version=8)
    monkeypatch.undo()
    assert caught.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.sealed"]
    assert channel.read_sealed(path, key=_KEY, label="checkpoint") == (7, b"state")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to write to a full disk")
def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: real_open("/dev/full", os.O_WRONLY))
    with pytest.raises(StoreFullError):
        _write(tmp_path / "state.sealed", bytes(100_000))
    assert not list(tmp_path.iterdir())
