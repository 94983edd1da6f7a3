"""What both process mains share: dying with their parent, reporting errors, and serving the host port."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cloister.errors import CloisterError

from ._events import EventFile

_PR_SET_PDEATHSIG = 1
BUG_CODE = "bug"
EXIT_BUG = 70
"""Exit code for an exception that is no CloisterError (EX_SOFTWARE of sysexits)."""

_GC_THRESHOLD = 200_000


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its launcher dies, so that no orphan outlives a run."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(EXIT_BUG)


def set_up_logging(path: Path) -> None:
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


def fail_on_thread_bug() -> None:
    """A bug in any thread ends the process: a run must not wait for a thread that is gone."""

    def hook(args: threading.ExceptHookArgs) -> None:
        logging.getLogger("cloister").error(
            "bug in thread %s",
            args.thread.name if args.thread else "?",
            exc_info=(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback),
        )
        os._exit(EXIT_BUG)

    threading.excepthook = hook


def run_main(body: Callable[[], None], events: EventFile) -> NoReturn:
    """Runs a process main; a CloisterError becomes an event and its exit code, anything else is a bug."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle; it stops us in order
    # Importing torch, transformers and peft makes a million objects that stay: a quarter of its time goes into looking
    # for garbage among them.
    gc.set_threshold(_GC_THRESHOLD, 20, 20)
    code = 0
    try:
        body()
    except CloisterError as error:
        events.emit("error", code=error.code, cause=error.cause, hint=error.hint, exit_code=error.exit_code,
                    fatal=True)  # fmt: skip
        code = error.exit_code
    except SystemExit:
        raise
    except BaseException:
        logging.getLogger("cloister").exception("bug")
        events.emit("error", code=BUG_CODE, cause="a bug in cloister; the log has the details", hint="", fatal=True,
                    exit_code=EXIT_BUG)  # fmt: skip
        code = EXIT_BUG
    sys.stdout.flush()
    os._exit(code)  # worker threads (near run, host port) may still hold the interpreter
