"""Prints the table of all results: `python -m bench.report`, `make bench-report`.

python -m bench.report [--markdown] [bench/results/*.csv]
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import COLUMNS, RESULTS

HEADER = ("bench", "measure", "ours", "peer", "unit", "ratio (95 %)", "goal", "met", "n", "date")
_DIFFERENCE = re.compile(r"^difference within ([0-9.]+) or around 0$")
_GOAL = re.compile(r"^(ours - peer )?(<=|>=)\s*([0-9.]+)")


def met(line: dict[str, str]) -> str:
    """Whether the goal holds: `<= 0.5` speaks of the ratio, `ours - peer <= 0.1 s` of the difference; else empty.

    `difference within 0.5 or around 0` speaks of lines that hold differences in place of ratios, and their interval.
    """
    if (near := _DIFFERENCE.match(line["goal"])) and line["ratio"]:
        is_around_0 = line["ratio_low"] != "" and float(line["ratio_low"]) <= 0 <= float(line["ratio_high"])
        return "yes" if abs(float(line["ratio"])) <= float(near.group(1)) or is_around_0 else "no"
    found = _GOAL.match(line["goal"])
    if not found or not line["ratio"]:  # no goal, or not run here
        return ""
    value = float(line["ours"]) - float(line["peer"]) if found.group(1) else float(line["ratio"])
    bound = float(found.group(3))
    return "yes" if (value <= bound if found.group(2) == "<=" else value >= bound) else "no"


def lines(path: Path) -> list[tuple[str, ...]]:
    """The rows of one bench, as they are shown."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            sys.exit(f"error: {path} has the columns {reader.fieldnames}\nhint: expected {','.join(COLUMNS)}")
        found = []
        for r in reader:
            interval = f" [{r['ratio_low']}, {r['ratio_high']}]" if r["ratio_low"] not in ("", "nan") else ""
            shown = (r["measure"], r["ours"], r["peer"], r["unit"], r["ratio"] + interval, r["goal"])
            found.append((path.stem, *shown, met(r), r["n"], r["date"]))
        return found


def main() -> None:
    """One line a measure, all benches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: every CSV of bench/results")
    parser.add_argument("--markdown", action="store_true", help="as a table for a README")
    args = parser.parse_args()
    rows = [line for path in args.files or sorted(RESULTS.glob("*.csv")) for line in lines(path)]
    if not rows:
        sys.exit("error: no results\nhint: `make bench` writes them")
    table = [HEADER, *rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    for number, line in enumerate(table):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells).rstrip())
        if number == 0:
            print(
                f"|{'|'.join('-' * (w + 2) for w in widths)}|" if args.markdown else "  ".join("-" * w for w in widths)
            )
    for note in sorted({_hardware(path) for path in args.files or RESULTS.glob("*.csv")}):
        print(f"\n{note}")


def _hardware(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        return "; ".join(sorted({f"{path.stem}: {r['hardware']}, commit {r['commit']}" for r in csv.DictReader(file)}))


if __name__ == "__main__":
    main()
