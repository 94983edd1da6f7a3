"""Doubles and helpers for tests, shipped so that users can test their own jobs. Production code may not import it."""

from __future__ import annotations

from cloister.testing._jobs import write_tiny_job
from cloister.testing._models import TINY_FAMILIES, write_tiny_model
from cloister.testing._relay import FakeRelay
from cloister.testing._shared import shared_dir

__all__ = ["TINY_FAMILIES", "FakeRelay", "shared_dir", "write_tiny_job", "write_tiny_model"]
