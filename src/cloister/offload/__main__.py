"""`python -m cloister.offload --listen unix:/path --device auto`: the accelerator's process, as `cloister accelerator`.

With `--listen fd:N` it serves the connection that it was started with, and ends with it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import NoReturn

from cloister.errors import OffloadError
from cloister.offload._process import serve_accelerator, serve_inherited

_FD = "fd:"


def main(argv: list[str] | None = None) -> int:
    """Serve; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cloister.offload", description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    fd = str(args.listen).removeprefix(_FD)
    try:
        if fd != args.listen and fd.isdecimal():
            serve_inherited(int(fd), args.device)
        else:
            serve_accelerator(args.listen, args.device, on_ready=_say)
    except OffloadError as error:
        _say(f"error: {error.cause}")
        return error.exit_code
    except KeyboardInterrupt:
        pass
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":  # pragma: no cover  # real processes run it
    sys.exit(main())
