"""The command line: the only package that prints. Talk goes to stderr, data to stdout."""

from __future__ import annotations

from cloister.cli._main import main

__all__ = ["main"]
