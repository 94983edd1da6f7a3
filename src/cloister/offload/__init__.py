"""Frozen linear layers on an untrusted accelerator, over masked features, with every answer checked; spec/pad.md."""

from __future__ import annotations

__all__: list[str] = []
