"""cloister: tune one language model together, without showing each other the data or the tuned layers.

    import cloister

    result = cloister.run("job.toml")
    answers = cloister.predict(result.run_dir, "hospital-north", ["acute appendicitis"])

Importing this module has no side effect and does not import torch; each name is loaded at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

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

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
