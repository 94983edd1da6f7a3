"""The models that a run measured, in the order in which a reader compares them."""

from __future__ import annotations

from typing import Any, NamedTuple


class ModelRow(NamedTuple):
    """One measured model: its kind ("tuned", "before", "linear-head", "alone", "majority"), its label, its metric."""

    kind: str
    label: str
    metric: dict[str, Any]
    client: str = ""


def model_rows(result: dict[str, Any]) -> list[ModelRow]:
    """Tuned together, before tuning, linear head, each client alone, majority class; only those that were measured."""
    baselines = result.get("baselines") or {}
    alone = sorted((baselines.get("alone") or {}).items())
    rows = [
        ("tuned", "tuned together", result.get("metric"), ""),
        ("before", "before tuning", result.get("before"), ""),
        ("linear-head", "linear head, frozen model", baselines.get("linear_head"), ""),
        *(("alone", f"{client} alone", metric, client) for client, metric in alone),
        ("majority", "majority class", baselines.get("majority"), ""),
    ]
    return [ModelRow(kind, label, metric, client) for kind, label, metric, client in rows if metric]
