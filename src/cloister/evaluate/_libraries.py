"""The libraries of the extra `evaluate`, imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cloister.errors import CloisterError

_PACKAGES = {"rouge_score": "rouge-score", "sklearn": "scikit-learn"}


def library(module: str) -> Any:
    """The module of this name.

    Raises:
        CloisterError: it cannot be imported; the hint has the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CloisterError(
            f"cloister.evaluate needs {_PACKAGES.get(package, package)}: {error}",
            hint="pip install 'cloister[evaluate]'",
        ) from None
