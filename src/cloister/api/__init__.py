"""What `import cloister` offers: run a job, ask the tuned model. Starts processes; prints nothing."""

from __future__ import annotations

from cloister.api._launch import Launch, Programs
from cloister.api._predict import predict
from cloister.api._result import RunResult
from cloister.api._run import run

__all__ = ["Launch", "Programs", "RunResult", "predict", "run"]
