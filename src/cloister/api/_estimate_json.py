"""An estimate as JSON: the numbers that the command prints, under names that stay; docs/plan.md section 7."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import _estimate_memory as memory
from ._estimate import Baseline, Estimate, SplitEstimate
from ._estimate_words import method1_words, method2_words, recommendation
from ._machine import constants

JSON_VERSION = 1


def estimate_to_json(found: Estimate) -> dict[str, Any]:
    """JSON types only. A width that no layer reaches and a speed that has no limit are null."""
    model, machine, spf = found.model, found.machine, found.work.spf
    linears = [{**dataclasses.asdict(linear), "n_weights": linear.n_weights} for linear in model.linears]
    return {
        "version": JSON_VERSION,
        "model": {
            **dataclasses.asdict(model),
            "n_parameters": model.n_parameters,
            "n_frozen": sum(linear.n_weights for linear in model.linears),
            "linears": linears,
        },
        "machine": {
            "name": machine.name,
            "about": machine.about,
            "is_measured": machine.is_measured,
            "constants": {key: {"value": value, "source": machine.source(key)} for key, value in constants(machine)},
        },
        "work": dataclasses.asdict(found.work) | {"spf": spf and {"heads": spf.heads, "neurons": spf.neurons}},
        "baselines": [_baseline(each) for each in (*found.inside.values(), found.plain, found.gpu_tee) if each],
        "method1": {
            "n_adapter": found.n_adapter,
            "update_bytes": found.update_bytes,
            "rows": [
                {
                    **dataclasses.asdict(row),
                    "pad": row.pad.value,
                    "memory_bytes": memory.total(row.memory),
                    "is_usable": row.is_usable,
                }
                for row in found.masked
            ],
        },
        "method2": _split(found.split),
        "method2_spf": None if found.split_spf is None else _split(found.split_spf),
        "verdicts": {"method1": method1_words(found), "method2": method2_words(found)},
        "recommendation": recommendation(found),
    }


def _split(found: SplitEstimate) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "memory_bytes": memory.total(found.memory)}


def _baseline(found: Baseline) -> dict[str, Any]:
    return {**dataclasses.asdict(found), "memory_bytes": memory.total(found.memory)}
