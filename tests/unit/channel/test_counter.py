"""A counter outside of the disk tells an older sealed file, and a missing one, from the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister import channel
from cloister.errors import ChannelError, DecryptionError, RollbackError, StoreError

_KEY = bytes(range(32))


class FileCounter:
    """What a TPM's NV counter does, in a file that the test does not let the host touch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def value(self) -> int:
        return int(self._path.read_text()) if self._path.exists() else 0

    def advance(self, to: int) -> None:
        self._path.write_text(str(max(to, self.value())))


@pytest.fixture
def counter(tmp_path: Path) -> FileCounter:
    return FileCounter(tmp_path / "counter")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sealed"


def _counted(path: Path, counter: channel.Counter, label: str = "state") -> channel.CountedFile:
    return channel.CountedFile(path, key=_KEY, label=label, counter=counter)


def test_the_newest_comes_back_also_in_another_process(path: Path, counter: FileCounter) -> None:
    file = _counted(path, counter)
    assert file.read() is None
    assert [file.write(text) for text in (b"one", b"two")] == [1, 2]
    assert file.read() == _counted(str(path), counter).read() == b"two"  # type: ignore[arg-type]
    assert counter.value() == 2
    assert repr(file) == f"CountedFile({str(path)!r})"


def test_an_older_file_is_refused(path: Path, counter: FileCounter) -> None:
    file = _counted(path, counter)
    file.write(b"one")
    old = path.read_bytes()
    file.write(b"two")
    path.write_bytes(old)
    with pytest.raises(RollbackError, match="version 1, and version 2") as caught:
        file.read()
    assert isinstance(caught.value, ChannelError)
    assert (caught.value.code, caught.value.exit_code, bool(caught.value.hint)) == ("channel.rollback", 6, True)


def test_a_file_that_is_gone_is_refused(path: Path, counter: FileCounter) -> None:
    file = _counted(path, counter)
    file.write(b"one")
    path.unlink()
    with pytest.raises(RollbackError, match="gone"):
        file.read()


def test_a_crash_between_the_file_and_its_count_locks_nobody_out(path: Path, counter: FileCounter) -> None:
    file = _counted(path, counter)
    file.write(b"one")
    before = path.read_bytes()
    channel.write_sealed(path, b"two", key=_KEY, label="state", version=2)  # and then the power went
    assert _counted(path, counter).read() == b"two"
    assert counter.value() == 2
    path.write_bytes(before)
    with pytest.raises(RollbackError):
        file.read()


def test_what_cannot_be_written_is_not_counted(tmp_path: Path, counter: FileCounter) -> None:
    with pytest.raises(StoreError):
        _counted(tmp_path / "no" / "state.sealed", counter).write(b"one")
    assert counter.value() == 0


def test_an_altered_file_says_nothing_of_its_age(path: Path, counter: FileCounter) -> None:
    _counted(path, counter).write(b"one")
    counter.advance(9)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(DecryptionError):
        _counted(path, counter).read()
    with pytest.raises(DecryptionError):
        _counted(path, counter, "other").read()


def test_at_least(path: Path) -> None:
    channel.write_sealed(path, b"x", key=_KEY, label="a", version=7)
    for low in (0, 6, 7):
        assert channel.read_sealed(path, key=_KEY, label="a", at_least=low) == (7, b"x")
    with pytest.raises(RollbackError):
        channel.read_sealed(path, key=_KEY, label="a", at_least=8)
