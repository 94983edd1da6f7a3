"""`python -m cloister.api._accelerator_main`: an accelerator's process that ends with the run that started it."""

from __future__ import annotations

import argparse
import sys

from cloister.errors import CloisterError

from ._process import die_with_parent


def main() -> int:
    """Serves one client enclave, and a restarted one after it, until the run is over."""
    parser = argparse.ArgumentParser(prog="cloister-accelerator")
    parser.add_argument("--connect", required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    from cloister.offload import dial_accelerator

    try:
        dial_accelerator(args.connect, "auto", on_ready=_say)
    except CloisterError as error:
        sys.stderr.write(f"error: {error.cause}\n")
        return error.exit_code


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
