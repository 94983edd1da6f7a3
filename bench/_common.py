"""What every bench shares: the table's format (design/style.md), 95 % intervals, and watching a tree of processes."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from cloister._process_tree import TreeWatch  # noqa: F401  for the benches of whole runs

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"

COLUMNS = (
    "measure",
    "ours",
    "peer",
    "unit",
    "ratio",
    "ratio_low",
    "ratio_high",
    "goal",
    "n",
    "hardware",
    "commit",
    "date",
)

# Student's t at 97.5 % for n - 1 degrees of freedom, by n; beyond the table the next smaller n's, which is wider.
_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_T_975 |= {15: 2.145, 20: 2.093, 30: 2.045}


# --- the table --------------------------------------------------------------------------------------------------------


def row(measure: str, ours: Sequence[float], peer: Sequence[float], unit: str, goal: str = "") -> dict[str, Any]:
    """One line of a bench's results: means of both, and the mean of the pairs' ratios with its 95 % interval.

    The interval is Student's over the pairs; with one pair there is none and its ends stay empty.
    """
    ratios = [a / b if b else math.inf for a, b in zip(ours, peer, strict=True)]
    mean, n = statistics.fmean(ratios), len(ratios)
    half = t_975(n) * statistics.stdev(ratios) / math.sqrt(n) if n > 1 else math.nan
    return {
        "measure": measure,
        "ours": f"{statistics.fmean(ours):.6g}",
        "peer": f"{statistics.fmean(peer):.6g}",
        "unit": unit,
        "ratio": f"{mean:.4f}",
        "ratio_low": "" if math.isnan(half) else f"{mean - half:.4f}",
        "ratio_high": "" if math.isnan(half) else f"{mean + half:.4f}",
        "goal": goal,
        "n": n,
        "hardware": hardware(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def not_run(measure: str, unit: str, goal: str = "") -> dict[str, Any]:
    """The line of a measure that this machine cannot take."""
    line = row(measure, [1], [1], unit, goal)
    return line | {"ours": "not run", "peer": "", "ratio": "", "ratio_low": "", "ratio_high": "", "n": 0}


def ours_alone(measure: str, ours: Sequence[float], unit: str) -> dict[str, Any]:
    """The line of a measure that the peer does not have."""
    return row(measure, ours, ours, unit) | {"peer": "", "ratio": "", "ratio_low": "", "ratio_high": ""}


def difference(measure: str, ours: Sequence[float], peer: Sequence[float], unit: str, goal: str = "") -> dict[str, Any]:
    """A line whose ratio columns hold the mean of the pairs' differences, ours - peer, and its interval."""
    apart = [a - b for a, b in zip(ours, peer, strict=True)]
    found = row(measure, apart, [1.0] * len(apart), unit, goal)
    return found | {side: f"{statistics.fmean(values):.6g}" for side, values in (("ours", ours), ("peer", peer))}


def t_975(n: int) -> float:
    """Half-width of a 95 % interval of a mean of n, in standard errors."""
    return _T_975[max(known for known in _T_975 if known <= n)]


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the results and tells them, and where they are."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for line in rows:
        goal = f" (goal {line['goal']})" if line["goal"] else ""
        print(f"{line['measure']}: {line['ours']} / {line['peer']} {line['unit']} = {line['ratio']}{goal}")
    print(f"wrote {path}", file=sys.stderr)


def out_path(name: str, given: Path | None, *, quick: bool) -> Path:
    """Where results go: a smoke run does not overwrite the figures that the README quotes."""
    return given or RESULTS / ("quick" if quick else "") / f"{name}.csv"


def hardware() -> str:
    """The processor, and how many of its threads this process may use."""
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} threads"


def commit() -> str:
    """The checkout's commit; with a plus sign where the source differs from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", "src") else "")


def source() -> str:
    """The trees of the package and of the peers: equal where their files are, whatever the commit."""
    trees = [_git("rev-parse", f"HEAD:{folder}") for folder in ("src", "native", "bench/peers")]
    return " ".join(tree[:12] for tree in trees) + _git("status", "--porcelain", "--", "src", "native", "bench/peers")


def _git(*arguments: str) -> str:
    argv = ["git", "-C", str(REPOSITORY), *arguments]
    found = subprocess.run(argv, capture_output=True, text=True, check=False)
    return found.stdout.strip() or ("unknown" if arguments[0] == "rev-parse" else "")


def load_average() -> float:
    """Processes that wanted a processor in the last minute: a bench on a busy machine says little."""
    return os.getloadavg()[0]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
