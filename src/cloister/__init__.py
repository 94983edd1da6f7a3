"""cloister: tune one language model together, without showing each other the data or the tuned layers.

    import cloister

    result = cloister.run("job.toml")
    answers = cloister.predict(result.run_dir, "hospital-north", ["acute appendicitis"])

Importing this module has no side effect and does not import torch; each name is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloister.api import RunResult, predict, run
    from cloister.config import Job, load_job
    from cloister.errors import CloisterError

__version__ = "0.1.0"

_HOME = {
    "CloisterError": "errors",
    "Job": "config",
    "RunResult": "api",
    "load_job": "config",
    "predict": "api",
    "run": "api",
}

__all__ = ["CloisterError", "Job", "RunResult", "load_job", "predict", "run"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
