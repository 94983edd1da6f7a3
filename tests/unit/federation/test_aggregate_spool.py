"""The sealed spool: pieces come back as they went, and the host can neither read nor exchange them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloister.errors import DecryptionError, StoreError, StoreFullError
from cloister.federation import _aggregate_spool as spool_module
from cloister.federation._aggregate_spool import Spool

from ._seeded import Seeded

SIZES = (5, 1, 40_000)


def pieces(seed: int) -> list[np.ndarray]:
    rng = Seeded(seed)
    return [rng.normal(size=size).astype(np.float32) for size in SIZES]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with closing(Spool(tmp_path, SIZES)) as made:
        yield made


def content(spool: Spool) -> bytes:
    return os.pread(spool._file.fileno(), 1 << 30, 0)


def put(spool: Spool, blob: bytes) -> None:
    os.pwrite(spool._file.fileno(), blob, 0)


def test_pieces_come_back(spool: Spool) -> None:
    for seed in range(3):
        spool.append(iter(pieces(seed)))
    assert len(spool) == 3
    for index in range(len(SIZES)):
        for seed, piece in enumerate(spool.read(index)):
            assert np.array_equal(piece, pieces(seed)[index])
    assert repr(spool) == "Spool(n=3, pieces=3)"


def test_what_lies_on_the_disk_is_sealed_and_has_no_name(spool: Spool, tmp_path: Path) -> None:
    spool.append(iter([np.full(size, 1.5, np.float32) for size in SIZES]))
    assert np.full(2, 1.5, np.float32).tobytes() not in content(spool)
    assert list(tmp_path.iterdir()) == []
    spool.close()
    with pytest.raises((StoreError, ValueError)):
        next(spool.read(0))


@pytest.mark.parametrize("at", [0, 30, 60, -1])
def test_a_changed_bit_is_found(spool: Spool, at: int) -> None:
    spool.append(iter(pieces(1)))
    blob = bytearray(content(spool))
    blob[at] ^= 1
    put(spool, bytes(blob))
    with pytest.raises(DecryptionError):
        for index in range(len(SIZES)):
            list(spool.read(index))


def test_two_clients_cannot_be_exchanged(spool: Spool) -> None:
    for seed in range(2):
        spool.append(iter(pieces(seed)))
    blob = content(spool)
    half = len(blob) // 2
    put(spool, blob[half:] + blob[:half])
    with pytest.raises(DecryptionError):
        list(spool.read(0))


def test_another_spools_file_does_not_open(spool: Spool, tmp_path: Path) -> None:
    with closing(Spool(tmp_path, SIZES)) as other:
        for each in (spool, other):
            each.append(iter(pieces(1)))
        put(spool, content(other))
    with pytest.raises(DecryptionError):
        list(spool.read(0))


def test_a_full_disk_loses_nothing_and_its_pieces_do_not_open_later(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.append(iter(pieces(0)))
    real, calls = os.pwrite, []

    def full(*args: Any) -> int:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "full")
        return real(*args)

    monkeypatch.setattr(spool_module.os, "pwrite", full)
    with pytest.raises(StoreFullError):
        spool.append(iter(pieces(1)))
    failed = content(spool)
    monkeypatch.undo()
    assert len(spool) == 1
    spool.append(iter(pieces(2)))
    assert [np.array_equal(p, pieces(s)[2]) for p, s in zip(spool.read(2), (0, 2), strict=True)] == [True, True]
    blob = content(spool)
    first = spool._at[-1]
    put(spool, blob[:first] + failed[first : first + spool._at[1]] + blob[first + spool._at[1] :])
    with pytest.raises(DecryptionError):
        list(spool.read(0))


def test_short_writes_go_on(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(spool_module.os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:1000], at))
    spool.append(iter(pieces(4)))
    assert np.array_equal(next(spool.read(2)), pieces(4)[2])


def test_a_disk_that_does_not_read(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.append(iter(pieces(4)))

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(spool_module.os, "pread", broken)
    with pytest.raises(StoreError, match="cannot be read"):
        next(spool.read(0))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        Spool(tmp_path / "nowhere", SIZES)


def test_pieces_of_other_sizes_are_refused(spool: Spool) -> None:
    with pytest.raises(ValueError, match="piece 0"):
        spool.append(iter([np.zeros(4, np.float32), *pieces(0)[1:]]))
    with pytest.raises(ValueError, match="argument"):
        spool.append(iter(pieces(0)[:2]))
    assert len(spool) == 0
