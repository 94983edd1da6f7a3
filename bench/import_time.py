"""Time of `import cloister` in a fresh interpreter, beside an interpreter that imports nothing.

Whoever asks for `cloister --help`, or imports the package to use a part of it, waits for this; torch and Flower must
not be in it.

    python bench/import_time.py [--quick] [--pairs 15] [--out bench/results/import_time.csv]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import out_path, row, write_csv

GOAL_S = 0.1
HEAVY = ("torch", "transformers", "peft", "flwr", "datasets", "pyarrow", "numpy", "pydantic")
_OURS = f"""
import json, sys
import cloister
print(json.dumps(sorted(set({HEAVY!r}) & sys.modules.keys())))
"""


def seconds(program: str) -> tuple[float, str]:
    """Wall time of a fresh interpreter that runs the program, and what it printed."""
    began = time.perf_counter()
    # -I: neither the caller's environment nor its folder decides what is imported.
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: three pairs")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    programs = {"cloister": _OURS, "nothing": "pass", "flwr": "import flwr.app, flwr.serverapp, flwr.clientapp"}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        seconds(program)  # once for the compiled files and the page cache
    for _ in range(3 if args.quick else args.pairs):
        for name, program in programs.items():
            spent, printed = seconds(program)
            times[name].append(spent)
            if name == "cloister" and (heavy := json.loads(printed)):
                sys.exit(f"error: `import cloister` imports {', '.join(heavy)}")
    goal = f"ours - peer <= {GOAL_S} s"
    rows = [
        row("interpreter that imports cloister / nothing", times["cloister"], times["nothing"], "s", goal),
        row("interpreter that imports cloister / Flower's app packages", times["cloister"], times["flwr"], "s"),
    ]
    write_csv(out_path("import_time", args.out, quick=args.quick), rows)
    print(f"`import cloister` loads none of {', '.join(HEAVY)}", file=sys.stderr)


if __name__ == "__main__":
    main()
