"""The end of a run in a few lines: the metric beside everything it is compared with, and where to read on."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Any

from cloister._format import human_bytes, human_epsilons, human_metric, human_time
from cloister.cli._views import STAMP
from cloister.report import model_rows


def summary(result: dict[str, Any], run_dir: Path) -> str:
    """The result as text, a table of models by clients first."""
    lines = [*_table(result), ""]
    lines += [f"examples  {_examples(result)}", f"time      {_times(result)}"]
    moved = "  ".join(f"{boundary} {human_bytes(n)}" for boundary, n in sorted(result.get("bytes", {}).items()))
    if moved:
        lines.append(f"moved     {moved}")
    if rounds := result.get("rounds"):
        lines.append(f"rounds    {len(rounds)}, {_updates(rounds)}")
    if pad := result.get("pad"):
        lines.append(f"pad       {pad['mode']}, ring {pad['ring']}: {pad['assumption']}")
    if result.get("epsilon") is not None:
        lines.append(f"privacy   epsilon {result['epsilon']:.2f} for each client")
    if spent := result.get("epsilon_per_example"):
        lines.append(f"privacy   epsilon for each example: {human_epsilons(spent)}")
    if result.get("left_out"):
        lines.append(f"left out  {', '.join(result['left_out'])} (did not deliver in time)")
    if result.get("simulated"):
        lines.append(f"enclave   {STAMP}: a hardened process on this machine, not a TEE")
    lines.append(f"report    {_short(run_dir / 'report.html')}")
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any]) -> list[str]:
    rows = model_rows(result)
    if not rows:
        return ["no metric: the run ended before its evaluation"]
    name = str(rows[0].metric["name"])
    clients = sorted(rows[0].metric.get("per_client") or {})
    table = [[f"{name} on held-out examples", "all", *clients]]
    for row in rows:
        values = [row.metric["value"], *((row.metric.get("per_client") or {}).get(client) for client in clients)]
        table.append([row.label, *("-" if value is None else human_metric(name, value) for value in values)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]


def _examples(result: dict[str, Any]) -> str:
    counts = result.get("n_examples") or {}
    train = sum(count.get("train", 0) for count in counts.values())
    test = sum(count.get("test", 0) for count in counts.values())
    return f"{train} for training, {test} held out, of {len(counts)} clients"


def _updates(rounds: list[dict[str, Any]]) -> str:
    counted = sum(len(found["clients"]) for found in rounds)
    refused = sum(len(found["rejected"]) for found in rounds)
    missing = sum(len(found["missing"]) for found in rounds)
    return f"{counted} updates aggregated, {refused} refused, {missing} missing"


def _times(result: dict[str, Any]) -> str:
    phases = result.get("phases_s") or {}
    longest = sorted(phases.items(), key=lambda item: -item[1])[:3]
    inside = ", ".join(f"{phase} {human_time(seconds)}" for phase, seconds in longest)
    return human_time(result.get("wall_s") or 0) + (f" ({inside})" if inside else "")


def _short(path: Path) -> str:
    """Relative to where the person is, when that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        return str(path)
    return relative if len(relative) < len(str(path)) else str(path)
