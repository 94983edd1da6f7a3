"""Where tests look for shared data."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.testing import shared_dir


def test_the_environment_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("CLOISTER_SHARED", str(tmp_path))
    assert shared_dir() == tmp_path


def test_a_folder_without_data_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_SHARED", str(tmp_path))
    assert shared_dir() is None
