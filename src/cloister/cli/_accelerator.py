"""`cloister accelerator`: the untrusted device's process, in the foreground."""

from __future__ import annotations

import argparse
import sys


def accelerator(args: argparse.Namespace) -> int:
    """`cloister accelerator`: serves until Ctrl-C."""
    from cloister.offload import dial_accelerator, serve_accelerator

    if args.connect:
        dial_accelerator(args.connect, args.device, on_ready=_say)
    serve_accelerator(args.listen, args.device, on_ready=_say)
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\nCtrl-C stops it.\n")
