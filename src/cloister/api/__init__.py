"""What `import cloister` offers: run a job, ask the tuned model. Starts processes; prints nothing.

Names are loaded at first use, so that the enclave and client processes, whose mains are here, never load the launcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.api._launch import Launch, Programs
    from cloister.api._predict import predict
    from cloister.api._result import RunResult
    from cloister.api._run import run

_HOME = {"Launch": "_launch", "Programs": "_launch", "RunResult": "_result", "predict": "_predict", "run": "_run"}

__all__ = ["Launch", "Programs", "RunResult", "predict", "run"]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
