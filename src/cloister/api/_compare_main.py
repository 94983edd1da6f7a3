"""`python -m cloister.api._compare_main`: one method with one seed of a comparison, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from ._compare_files import MethodFolder
from ._compare_work import Order, carry_out
from ._events import EventFile
from ._process import die_with_parent, run_main, set_up_logging


def main() -> None:
    """The order comes over standard input: its job may hold a store's credentials."""
    parser = argparse.ArgumentParser(prog="cloister-compare-one")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    os.umask(0o077)
    folder = MethodFolder(args.folder)
    set_up_logging(folder.log)
    order = Order.from_dict(json.loads(sys.stdin.buffer.read()))
    events = EventFile(folder.events, f"compare/{order.name}")

    def body() -> None:
        # Leave by every context's end, so that what was started is taken down.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        folder.write_result(carry_out(order, folder.path, events))

    run_main(body, events)


if __name__ == "__main__":
    main()
