"""The report of a comparison: one HTML file that needs nothing else, from compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cloister._files import write_whole
from cloister._format import human_bytes, human_metric, human_time
from cloister.report import _charts
from cloister.report._page import render

Row = Mapping[str, Any]


def write_compare_page(path: Path, table: Mapping[str, Any]) -> None:
    """Write the page. The table is public: metrics and costs, no text, no label."""
    write_whole(path, render_compare_page(table).encode())


def render_compare_page(table: Mapping[str, Any]) -> str:
    """The page as text, from the content of compare.json. Sections without anything to show are left out."""
    rows: Sequence[Row] = table["rows"]
    done, cells = [row for row in rows if row.get("figure")], compare_cells(table)
    return render(
        "compare.html.j2",
        {
            "table": table,
            "simulated": any(row.get("simulated") for row in rows),
            "cells": cells,
            "figures": _figures(done, table),
            "differences": _differences(done, table),
            "per_client": _per_client(done, table),
            "costs": _costs(done),
            "texts": [row for row in cells if row["done"] and (row["rouge_l"] or row["exact_match"])],
            "facts": _facts(table),
            "color": _charts.part_color,
        },
    )


def compare_cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's lines as a person reads them, from the content of compare.json: the page's and the terminal's."""
    return [_cells(row, table) for row in table["rows"]]


def shown_figure(row: Row, metric: str) -> str:
    """82.9 % (79.1 to 86.2); the value alone where there is no interval."""
    figure = row["figure"]
    value = human_metric(metric, figure["value"])
    if figure["low"] is None:
        return value
    low, high = (human_metric(metric, figure[key]).removesuffix(" %") for key in ("low", "high"))
    return f"{value} ({low} to {high})"


def shown_difference(row: Row, *, in_points: bool) -> str:
    """+1.2 (-0.4 to 2.8), in points of a share or as the log ratio; empty where there is none."""
    pair = row.get("pair") or row.get("pair_over_seeds")
    if not pair:
        return ""
    scale, digits = (100, 1) if in_points else (1, 3)
    value, low, high = (scale * pair[key] for key in ("difference", "low", "high"))
    return f"{value:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _cells(row: Row, table: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table for people."""
    shown: dict[str, Any] = {"label": row["label"], "name": row["method"], "status": row["status"],
                             "reason": row["reason"]}  # fmt: skip
    if not row.get("figure"):
        return shown | {"done": False}
    peak, moved = row["enclave_peak_bytes"], row["accelerator_bytes"]
    p_value = row.get("p_corrected")
    return shown | {
        "done": True,
        "figure": shown_figure(row, table["metric"]),
        "difference": shown_difference(row, in_points=table["higher_is_better"]),
        "p": "" if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}",
        "f1": "" if row.get("macro_f1") is None else f"{100 * row['macro_f1']:.1f} %",
        "seconds": human_time(row["seconds"]),
        "wire": human_bytes(row["wire_bytes"]) + (f" + {human_bytes(moved)} masked" if moved else ""),
        "peak": "" if peak is None else human_bytes(peak),
        "trained": f"{row['n_trained']:,}",
        "steps": f"{row['n_steps']:,}",
        **{key: _share(row.get(key)) for key in ("rouge_l", "exact_match")},
    }


def _figures(rows: Sequence[Row], table: Mapping[str, Any]) -> Markup | None:
    if not rows:
        return None
    metric = table["metric"]
    points = [
        (row["label"], *(row["figure"][key] for key in ("value", "low", "high")),
         human_metric(metric, row["figure"]["value"]))
        for row in rows
    ]  # fmt: skip
    words = "; ".join(f"{row['label']} {shown_figure(row, metric)}" for row in rows)
    return _charts.intervals(
        points, label=f"{metric} of each method: {words}", percent=table["higher_is_better"], width=520
    )


def _differences(rows: Sequence[Row], table: Mapping[str, Any]) -> Markup | None:
    in_points = table["higher_is_better"]
    found = [(row, pair) for row in rows if (pair := row.get("pair") or row.get("pair_over_seeds"))]
    if not found:
        return None
    points = [
        (row["label"], pair["difference"], pair["low"], pair["high"],
         f"{100 * pair['difference']:+.1f}" if in_points else f"{pair['difference']:+.3f}")
        for row, pair in found
    ]  # fmt: skip
    words = "; ".join(f"{row['label']} {shown_difference(row, in_points=in_points)}" for row, _ in found)
    return _charts.intervals(
        points, label=f"difference to {table['reference']}: {words}", percent=in_points, mark=0.0, width=520
    )


def _per_client(rows: Sequence[Row], table: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each client's own held-out examples, method by method."""
    clients = sorted({client for row in rows for client in row.get("per_client") or {}})
    if len(clients) < 2:
        return None
    series = [(row["label"], [row["per_client"].get(client) for client in clients]) for row in rows]
    words = "; ".join(
        f"{client}: " + ", ".join(f"{label} {100 * x:.1f} %" for label, own in series if (x := own[i]) is not None)
        for i, client in enumerate(clients)
    )
    chart = _charts.columns(
        clients, series, label=f"{table['metric']} on each client's own held-out examples. {words}", top=1.0,
        percent=True, width=1000,
    )  # fmt: skip
    return {"chart": chart, "legend": [label for label, _ in series]}


def _costs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Bars of what each method costs: time, bytes, memory, parameters."""
    kinds = (
        ("seconds", "Seconds", "From the first process to the last metric, mean over seeds.", human_time),
        (
            "wire_bytes",
            "Bytes over the wire",
            "Between institutions and server; central: the text itself.",
            human_bytes,
        ),
        ("enclave_peak_bytes", "Peak memory of an enclave", "Resident set of the largest one.", human_bytes),
        ("n_trained", "Trainable parameters", "", lambda n: f"{round(n):,}"),
    )
    found = []
    for key, title, lead, shown in kinds:
        bars = [(row["label"], float(row[key]), shown(row[key])) for row in rows if row.get(key) is not None]
        if bars:
            words = ", ".join(f"{label} {text}" for label, _, text in bars)
            top = max(value for _, value, _ in bars) or 1.0
            chart = _charts.bars(bars, label=f"{title}: {words}", top=top, highlight=None, width=520)
            found.append({"title": title, "lead": lead, "chart": chart})
    return found


def _share(figure: Mapping[str, Any] | None) -> str:
    if not figure:
        return ""
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _facts(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    rounds = f"{table['epochs']} in all; {table['rounds']} rounds where there are rounds"
    rates = ", ".join(f"{name} {rate:g}" for name, rate in table["lr"].items())
    machine = table["machine"]
    facts = [
        ("epochs", rounds),
        ("seeds", ", ".join(map(str, table["seeds"]))),
        ("learning rates of their own", rates),
        ("machine", f"{machine['processor']}, {machine['threads']} threads"),
        *table["versions"].items(),
    ]
    return [(name, str(value)) for name, value in facts if value]
