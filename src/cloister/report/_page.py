"""The report of a run: one HTML file that needs nothing else, from result.json and the events."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cloister._files import write_whole
from cloister._format import human_bytes, human_epsilons, human_metric, human_time, is_share
from cloister.report import _charts
from cloister.report._models import ModelRow, model_rows

Event = dict[str, Any]

_CLAIM_WORDS = {
    "tee": "TEE",
    "evidence_type": "evidence type",
    "debug": "debug mode",
    "tcb_status": "TCB status",
    "advisories": "advisories",
    "platform_id": "platform id",
    "root_sha256": "root of trust (SHA-256)",
}
_MEASUREMENT_WORDS = {
    "mr_td": "MRTD (firmware)",
    "rtmr3": "RTMR3 (code, job, policy, weights)",
    "mr_seam": "MRSEAM (TDX module)",
    "measurement": "launch digest",
}
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ?")
# In the order of a run: result.json sorts its keys.
_PHASE_COLORS = {
    "start": "#cbd2da",
    "handshake": "#7a5cc0",
    "prepare": "#e08a1e",
    "train": "#0b6e75",
    "evaluate": "#3b82c4",
    "baselines": "#98a2b3",
    "finish": "#5b9a3c",
}
_METHODS = {"split": "split fine-tuning (Method 2)", "enclave": "adapters in enclaves (Method 1)"}
_PROCESS_WORDS = {"server": "server enclave", "superlink": "SuperLink"}


def write_report(run_dir: Path, result: dict[str, Any], events: list[Event]) -> Path:
    """Write `run_dir/report.html` and return it. Both arguments are public: what the job lets its host see."""
    path = Path(run_dir) / "report.html"
    write_whole(path, render_report(result, events).encode())
    return path


def render_report(result: dict[str, Any], events: list[Event]) -> str:
    """The page as text. Sections without anything to show are left out."""
    return render("report.html.j2", _context(result, events))


def render(template: str, context: dict[str, Any]) -> str:
    """A template of this package, filled in; every text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cloister.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def _context(result: dict[str, Any], events: list[Event]) -> dict[str, Any]:
    rows = model_rows(result)
    return {
        "result": result,
        "started": _started(events),
        "simulated": bool(result.get("simulated")),
        "headline": _headline(rows),
        "comparison": _comparison(rows),
        "per_client": _per_client(rows),
        "loss": _loss(result, events),
        "is_enclave": result.get("method") == "enclave",
        "client_enclaves": sorted(result.get("client_enclaves") or {}),
        "rounds": _rounds(result),
        "pad": _pad(result),
        "clients": _clients(result),
        "decisions": _decisions(result),
        "claims": _claims(result),
        "bytes_chart": _byte_bars(result),
        "phases": _phases(result),
        "memory_chart": _memory_bars(result),
        "facts": _facts(result),
        "left_out": result.get("left_out") or [],
        "visibility": result.get("visibility") or [],
        "warnings": [str(e["cause"]) for e in events if e.get("event") == "warning" and e.get("cause")],
        "restarts": _restarts(events),
        "color": _charts.part_color,
    }


def _restarts(events: list[Event]) -> list[str]:
    counts = Counter(str(e["process"]) for e in events if e.get("event") == "restart" and e.get("process"))
    return [process if n == 1 else f"{process} ({n} times)" for process, n in counts.items()]


def _started(events: list[Event]) -> str:
    first = next((event["t"] for event in events if "t" in event), None)
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(first)) if first is not None else ""


def _headline(rows: list[ModelRow]) -> dict[str, Any] | None:
    if not rows or rows[0].kind != "tuned":
        return None
    metric = rows[0].metric
    name = str(metric["name"])
    n = metric.get("n") or {}
    other = [row for row in rows[1:] if row.metric.get("value") is not None]
    pick = max if is_share(name) else min
    best = pick(other, key=lambda row: row.metric["value"]) if other else None
    return {
        "name": name,
        "value": human_metric(name, metric["value"]),
        "n_test": sum(n.values()) if isinstance(n, dict) else n,
        "n_clients": len(metric.get("per_client") or {}),
        "best_other": best and {"label": best.label, "value": human_metric(name, best.metric["value"])},
        "lower_is_better": not is_share(name),
    }


def _comparison(rows: list[ModelRow]) -> Markup | None:
    if not rows:
        return None
    name = str(rows[0].metric["name"])
    shown = [(row.label, float(row.metric["value"]), human_metric(name, row.metric["value"])) for row in rows]
    words = "; ".join(f"{label} {text}" for label, _, text in shown)
    top = 1.0 if is_share(name) else max(value for _, value, _ in shown)
    return _charts.bars(shown, label=f"{name} of each model on held-out examples: {words}", top=top)


def _per_client(rows: list[ModelRow]) -> dict[str, Any] | None:
    """Each client's own held-out examples: tuned together, the client's own model, and the common baselines."""
    if not rows or not rows[0].metric.get("per_client"):
        return None
    name = str(rows[0].metric["name"])
    clients = sorted(rows[0].metric["per_client"])
    series: list[tuple[str, list[float | None]]] = []
    for row in rows:
        if row.kind != "alone":
            series.append((row.label, [(row.metric.get("per_client") or {}).get(client) for client in clients]))
    own = {row.client: (row.metric.get("per_client") or {}).get(row.client) for row in rows if row.kind == "alone"}
    if own:
        series.insert(1, ("its own model alone", [own.get(client) for client in clients]))
    values = [value for _, numbers in series for value in numbers if value is not None]
    words = "; ".join(
        f"{client}: " + ", ".join(f"{label} {human_metric(name, x)}" for label, v in series if (x := v[i]) is not None)
        for i, client in enumerate(clients)
    )
    chart = _charts.columns(
        clients,
        series,
        label=f"{name} on each client's own held-out examples. {words}",
        top=1.0 if is_share(name) else max([*values, 1e-9]) * 1.1,
        percent=is_share(name),
    )
    return {"chart": chart, "legend": [label for label, _ in series], "name": name}


def _loss(result: dict[str, Any], events: list[Event]) -> dict[str, Any] | None:
    """Curves of the federated model and of each client alone. A repeated step of a resumed run counts once."""
    curves: dict[str, dict[int, float]] = {}
    epochs: dict[int, int] = {}
    if result.get("method") == "enclave":
        return _loss_of_rounds(events)
    for event in events:
        if event.get("event") != "step":
            continue
        model = str(event.get("model", "federated"))
        if event.get("loss") is not None and math.isfinite(event["loss"]):
            curves.setdefault(model, {})[int(event["step"])] = float(event["loss"])
        if model == "federated":
            epochs[int(event["step"])] = int(event.get("epoch", 0))
    if result.get("losses"):
        curves["federated"] = {i: float(loss) for i, loss in enumerate(result["losses"], 1)}
    if not curves.get("federated"):
        return None
    names = ["federated", *sorted(name for name in curves if name != "federated")]
    labels = ["tuned together", *(f"{name.partition('/')[2]} alone" for name in names[1:])]
    series = [(label, sorted(curves[name].items())) for label, name in zip(labels, names, strict=True)]
    steps = sorted(epochs)
    marks = [now - 0.5 for before, now in itertools.pairwise(steps) if epochs[now] != epochs[before]]
    first, last = series[0][1][0][1], series[0][1][-1][1]
    chart = _charts.lines(
        [(label, [(float(x), y) for x, y in curve]) for label, curve in series],
        label=f"training loss by step: from {first:.2f} to {last:.2f} in {len(series[0][1])} steps",
        x_name="step" + (" (dotted: a new epoch)" if marks else ""),
        y_name="loss",
        marks=marks,
    )
    return {"chart": chart, "legend": labels}


def _loss_of_rounds(events: list[Event]) -> dict[str, Any] | None:
    """Each client's own curve over all rounds; a round that was done again counts once."""
    curves: dict[str, dict[int, float]] = {}
    marks: set[float] = set()
    for event in events:
        if event.get("event") == "step" and event.get("loss") is not None and math.isfinite(event["loss"]):
            begun = (int(event["round"]) - 1) * int(event["n_steps"])
            name = str(event["model"]).partition("/")[2]
            curves.setdefault(name, {})[begun + int(event["step"])] = float(event["loss"])
            marks |= {begun + 0.5} if begun else set()
    if not curves:
        return None
    series = [(name, sorted(curve.items())) for name, curve in sorted(curves.items())]
    told = "; ".join(f"{name} from {curve[0][1]:.2f} to {curve[-1][1]:.2f}" for name, curve in series)
    chart = _charts.lines(
        [(name, [(float(x), y) for x, y in curve]) for name, curve in series],
        label=f"training loss by step at each client: {told}",
        x_name="step" + (" (dotted: a new round)" if marks else ""),
        y_name="loss",
        marks=sorted(marks),
    )
    return {"chart": chart, "legend": [name for name, _ in series]}


def _rounds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each round's updates."""
    rows: list[dict[str, Any]] = []
    for found in result.get("rounds") or []:
        told = list(found["per_client"].values())
        losses = [one["loss"] for one in told if one.get("loss") is not None]
        rows.append({
            "number": found["round"],
            "clients": ", ".join(found["clients"]),
            "refused": "; ".join(f"{name}: {why['cause']}" for name, why in sorted(found["rejected"].items())),
            "missing": ", ".join(found["missing"]),
            "loss": f"{sum(losses) / len(losses):.3f}" if losses else "",
            "seconds": f"{max((one.get('wall_s', 0.0) for one in told), default=0.0):.1f} s",
        })  # fmt: skip
    return rows


def _pad(result: dict[str, Any]) -> dict[str, Any] | None:
    """The mode, what it rests on, and what each client used."""
    pad = result.get("pad")
    if not pad:
        return None
    rows = [
        {
            "client": name,
            "device": pad["devices"].get(name, ""),
            "products": pad["products"][name],
            "elements": f"{pad['elements'][name]:,}",
            "out": human_bytes(moved["out"]),
            "back": human_bytes(moved["back"]),
            "retries": pad["retries"][name],
        }
        for name, moved in sorted(pad["accelerator_bytes"].items())
    ]
    outside, inside = pad["weights_outside"], pad["weights_inside"]
    share = f"{100 * outside / max(1, outside + inside):.1f} %"
    return {"mode": pad["mode"], "ring": pad["ring"], "assumption": pad["assumption"], "share": share, "rows": rows}


def _clients(result: dict[str, Any]) -> list[dict[str, Any]]:
    truncated = result.get("n_truncated") or {}
    return [
        {"name": name, **counts, "n_truncated": truncated.get(name, 0)}
        for name, counts in sorted((result.get("n_examples") or {}).items())
    ]


def _decisions(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Decisions with equal reasons, but for the time of day, under one heading: usually all clients', said once."""
    groups: dict[tuple[bool, tuple[str, ...]], dict[str, Any]] = {}
    for decision in result.get("evidence") or []:
        accepted, reasons = bool(decision["accepted"]), list(decision.get("reasons") or ())
        key = (accepted, tuple(_TIME.sub("", reason) for reason in reasons))
        group = groups.setdefault(key, {"clients": [], "accepted": accepted, "reasons": reasons})
        if decision["client"] not in group["clients"]:
            group["clients"].append(decision["client"])
    return list(groups.values())


def _claims(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the last accepted evidence states, and the job and policy that it was measured and judged by."""
    accepted = [decision for decision in result.get("evidence") or [] if decision.get("claims")]
    if not accepted:
        return []
    claims = accepted[-1]["claims"]
    found = [(words, _claim(claims[key])) for key, words in _CLAIM_WORDS.items() if claims.get(key) not in (None, "")]
    registers: dict[str, str] = {**(claims.get("measurements") or {}), **(claims.get("details") or {})}
    found += [(_MEASUREMENT_WORDS.get(name, name), str(value)) for name, value in registers.items()]
    hashes = [(f"{name} (SHA-384)", str(result.get(f"{name}_sha384") or "")) for name in ("job", "policy")]
    return [*found, *(pair for pair in hashes if pair[1])]


def _claim(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _byte_bars(result: dict[str, Any]) -> Markup | None:
    found = sorted((result.get("bytes") or {}).items(), key=lambda item: -item[1])
    if not found:
        return None
    rows = [(name, float(n), human_bytes(n)) for name, n in found]
    words = ", ".join(f"{name} {text}" for name, _, text in rows)
    return _charts.bars(rows, label=f"bytes carried: {words}", top=max(rows[0][1], 1.0), highlight=None, width=500)


def _memory_bars(result: dict[str, Any]) -> Markup | None:
    found = sorted((result.get("peak_rss_bytes") or {}).items(), key=lambda item: -item[1])[:12]
    if not found:
        return None
    rows = [(_PROCESS_WORDS.get(str(name), str(name)), float(n), human_bytes(n)) for name, n in found]
    words = ", ".join(f"{name} {text}" for name, _, text in rows)
    return _charts.bars(
        rows, label=f"peak memory by process: {words}", top=max(rows[0][1], 1.0), highlight=None, width=500
    )


def _phases(result: dict[str, Any]) -> dict[str, Any] | None:
    times = result.get("phases_s") or {}
    known = [
        (name, times[name]) for name in (*_PHASE_COLORS, *sorted(set(times) - set(_PHASE_COLORS))) if name in times
    ]
    found = [(name, float(seconds)) for name, seconds in known if seconds > 0]
    if not found:
        return None
    parts = [(name, seconds, f"{seconds:.1f} s", _PHASE_COLORS.get(name, "#98a2b3")) for name, seconds in found]
    words = ", ".join(f"{name} {text}" for name, _, text, _ in parts)
    return {"chart": _charts.strip(parts, label=f"time by phase: {words}"), "parts": parts,
            "total": human_time(result.get("wall_s") or sum(s for _, s in found))}  # fmt: skip


def _early_stopping(result: dict[str, Any]) -> str | None:
    found = result.get("early_stopping")
    if not found:
        return None
    ended = f"stopped after {at}" if (at := found["stopped_at_epoch"]) else f"did not stop in {len(found['losses'])}"
    return f"kept epoch {found['best_epoch']}, {ended} (held-out loss {min(found['losses']):.3f})"


def _criterion(spf: dict[str, Any] | None) -> str | None:
    if not spf:
        return None
    chosen, of = spf["chosen"], spf["of"]
    counts = [
        f"{chosen[key]} of {of[key]} {words}" for key, words in (("head_groups", "head groups"), ("neurons", "neurons"))
    ]
    return f"{spf['criterion']}: {', '.join(counts)}"


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("method", _METHODS.get(str(result.get("method")), result.get("method"))),
        ("task", result.get("task")),
        ("adapter", result.get("adapter")),
        ("rows by", _criterion(result.get("spf"))),
        ("numbers that train", result.get("n_trainable")),
        ("rounds", len(result.get("rounds") or []) or None),
        ("epsilon for each client", result.get("epsilon")),
        ("epsilon for each example", human_epsilons(result.get("epsilon_per_example") or {})),
        ("blocks on the clients", result.get("cut_layer")),
        ("boundary tensors", result.get("boundary")),
        ("far side computed in", result.get("precision")),
        ("early stopping", _early_stopping(result)),
        ("released at the end", {"none": "nothing"}.get(str(result.get("release")), result.get("release"))),
        ("seed", result.get("seed")),
        *(result.get("versions") or {}).items(),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
