"""What `import cloister` offers: run a job, ask the tuned model. Starts processes; prints nothing.

Names are loaded at first use, so that the enclave and client processes, whose mains are here, never load the launcher.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloister.api._launch import Launch, Programs
    from cloister.api._predict import predict
    from cloister.api._result import RunResult
    from cloister.api._run import run

_HOME = {"Launch": "_launch", "Programs": "_launch", "RunResult": "_result", "predict": "_predict", "run": "_run"}

__all__ = ["Launch", "Programs", "RunResult", "predict", "run"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
