"""Draws what `bench/spf_accuracy.py --curve` kept: which criterion of SPF wins at which share of rows.

One panel a data set: mean accuracy over the seeds on the validation split, by the share of heads and of neurons that
train, with the range of the seeds behind it; a share of 1 trains every row whatever the criterion. Also writes the
means as a table.

    python bench/spf_criteria.py [--runs bench/results/kept/spf_accuracy.csv] [--out docs/spf-criteria.svg]
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
from bench._common import REPOSITORY, RESULTS
from matplotlib import pyplot

CRITERIA = {"l1": "#0b6e75", "gradient": "#e08a1e", "fisher": "#7a5cc0", "random": "#98a2b3"}
Curves = dict[str, dict[str, dict[float, list[float]]]]
"""Accuracies in points by data set, criterion and share."""


def read(path: Path) -> Curves:
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            kind, *rest = line["method"].split()
            if kind == "curve":
                found[line["data"]][rest[0]][float(rest[1])].append(100 * float(line["accuracy"]))
    return found


def _by_share(by_criterion: dict[str, dict[float, list[float]]], criterion: str) -> list[tuple[float, list[float]]]:
    """In order; all rows are the same rows whatever the criterion."""
    everything = {share: found for share, found in by_criterion["l1"].items() if share == 1}
    return sorted((by_criterion[criterion] | everything).items())


def draw(curves: Curves, path: Path) -> None:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cloister", "font.size": 10})
    figure, panels = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.4), squeeze=False)
    for panel, (data, by_criterion) in zip(panels[0], sorted(curves.items()), strict=True):
        for criterion, color in CRITERIA.items():
            by_share = _by_share(by_criterion, criterion)
            shares = [share for share, _ in by_share]
            panel.plot(
                shares, [statistics.fmean(v) for _, v in by_share], color=color, marker="o", ms=4, label=criterion
            )
            panel.fill_between(
                shares, [min(v) for _, v in by_share], [max(v) for _, v in by_share], color=color, alpha=0.1
            )
        n = len(next(iter(by_criterion["l1"].values())))
        title = f"{data}, {n} seed{'s' * (n > 1)}"
        panel.set(title=title, xlabel="share of heads and neurons that train", ylabel="accuracy, points")
        panel.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draws, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RESULTS / "kept" / "spf_accuracy.csv")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "spf-criteria.svg")
    args = parser.parse_args()
    curves = read(args.runs)
    if not curves:
        sys.exit(f"error: {args.runs} has no curve\nhint: python bench/spf_accuracy.py --curve --data hoc mtsdialog")
    draw(curves, args.out)
    for data, by_criterion in sorted(curves.items()):
        print(f"{data}, accuracy by share: {', '.join(map(str, sorted(by_criterion['l1'])))}")
        for criterion in CRITERIA:
            means = (f"{statistics.fmean(v):.1f}" for _, v in _by_share(by_criterion, criterion))
            print(f"  {criterion:9} {'  '.join(means)}")
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
