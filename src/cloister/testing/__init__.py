"""Doubles and helpers for tests, shipped so that users can test their own jobs. Production code may not import it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports
from cloister.testing._jobs import write_tiny_job
from cloister.testing._models import TINY_FAMILIES, write_tiny_model
from cloister.testing._relay import FakeRelay
from cloister.testing._shared import shared_dir

if TYPE_CHECKING:
    from cloister.testing._accelerators import (
        FakeAccelerator,
        FakeDyingAccelerator,
        FakeLyingAccelerator,
        FakeStallingAccelerator,
    )
    from cloister.testing._pad_helpers import FakePadHelper

# These import torch.
_HOME = {
    "FakeAccelerator": "_accelerators",
    "FakeDyingAccelerator": "_accelerators",
    "FakeLyingAccelerator": "_accelerators",
    "FakePadHelper": "_pad_helpers",
    "FakeStallingAccelerator": "_accelerators",
}

__all__ = [
    "TINY_FAMILIES",
    "FakeAccelerator",
    "FakeDyingAccelerator",
    "FakeLyingAccelerator",
    "FakePadHelper",
    "FakeRelay",
    "FakeStallingAccelerator",
    "shared_dir",
    "write_tiny_job",
    "write_tiny_model",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
