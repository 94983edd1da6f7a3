"""What a run ends with: result.json (docs/result.md), and what the caller of `run` holds in hand."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloister

from ._events import Event

if TYPE_CHECKING:
    from cloister.config import Job

    from ._launch import Launch

RESULT_VERSION = 1
_VERSIONS = ("cloister", "torch", "transformers", "peft", "flwr", "cryptography", "dcap-qvl")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        run_id: name of its folder.
        run_dir: the folder; `report.html` and `result.json` are in it.
        result: the content of `result.json`.
    """

    run_id: str
    run_dir: Path
    result: dict[str, Any]

    @property
    def metric(self) -> float:
        """The metric over all clients' held-out examples; NaN where no client that stayed has any."""
        found = self.result["metric"]
        return float(found["value"]) if found else math.nan

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


def build_result(
    job: Job, launch: Launch, report: dict[str, Any], events: list[Event], *, wall_s: float
) -> dict[str, Any]:
    """result.json from the enclave's signed report and from what this machine saw of the run."""
    evidence = [event for event in events if event["event"] == "evidence" and event.get("accepted")]
    return {
        "version": RESULT_VERSION,
        "run_id": report["run_id"],
        "job": job.name,
        "job_sha384": report["job_sha384"],
        "method": report["method"],
        "task": report["task"],
        "simulated": any(event["claims"].get("simulated", True) for event in evidence),
        "metric": report["metric"],
        "before": report.get("before"),
        "baselines": report.get("baselines", {}),
        "losses": report.get("losses", []),
        "precision": report.get("precision"),
        "early_stopping": report.get("early_stopping"),
        "unseen_labels": report.get("unseen_labels", []),
        "n_examples": report["n_examples"],
        "n_truncated": report.get("n_truncated", {}),
        "left_out": report["left_out"],
        "wall_s": round(wall_s, 3),
        "phases_s": phase_times(events),
        "bytes": _bytes(report),
        "peak_rss_bytes": dict(sorted(launch.memory.peak_rss_bytes.items())),
        "policy_sha384": report["policy_sha384"],
        "evidence": [
            {"client": e["client"], "accepted": True, "reasons": e["reasons"], "claims": e["claims"]} for e in evidence
        ],
        "client_enclaves": report.get("client_enclaves", {}),
        "restarts": sum(1 for event in events if event["event"] == "restart"),
        "pad": _pad(report),
        "rounds": report.get("rounds", []),
        "adapter": report.get("adapter", "lora"),
        "spf": report.get("spf"),
        "n_trainable": report.get("n_trainable"),
        "epsilon": report.get("epsilon"),
        "epsilon_per_example": _epsilon_per_example(report),
        "boundary": report.get("boundary"),
        "cut_layer": report.get("cut_layer"),
        "release": report["release"],
        "seed": report["seed"],
        "visibility": visibility(job, report),
        "versions": versions(),
    }


def _epsilon_per_example(report: dict[str, Any]) -> dict[str, float]:
    """What DP-SGD has spent at each client, as it said last."""
    told = [(name, facts) for found in report.get("rounds", []) for name, facts in found["per_client"].items()]
    return {name: facts["epsilon"] for name, facts in told if "epsilon" in facts}


def phase_times(events: list[Event]) -> dict[str, float]:
    """Seconds per phase, added up over restarts."""
    begun: dict[str, float] = {}
    spent: dict[str, float] = {}
    for event in events:
        if event["event"] != "phase":
            continue
        if event["status"] == "begin":
            begun[event["phase"]] = event["t"]
        elif event["phase"] in begun:
            name = event["phase"]
            spent[name] = round(spent.get(name, 0.0) + event["t"] - begun.pop(name), 3)
    return spent


def visibility(job: Job, report: dict[str, Any]) -> list[dict[str, str]]:
    """Who saw what, in which form: the table of the report, from what this run really did."""
    rows = _seen_by_enclaves(job) if report["method"] == "enclave" else _seen_by_split(job, report)
    rows += [
        ("evidence", "sealed in the handshake", "every party that applies its policy"),
        ("loss and metrics", "in the clear", _metrics_seen_by(job)),
        ("sizes and timing", "in the clear", _sizes_seen_by(job)),
    ]
    return [{"what": what, "form": form, "who": who} for what, form, who in rows]


def _pad(report: dict[str, Any]) -> dict[str, Any] | None:
    """How the clients' frozen layers were masked, with the assumption of the mode, and what was used of pads."""
    told = {name: found for name, found in report.get("offload", {}).items() if found}
    if not told:
        return None
    first = next(iter(told.values()))
    return {
        "mode": first["pad"],
        "assumption": first["assumption"],
        "ring": first["format"],
        "bucket": first["bucket"],
        "elements": {name: found["pad_elements"] for name, found in told.items()},
        "products": {name: found["forward"] + found["backward"] for name, found in told.items()},
        "weights_outside": first["n_weights_outside"],
        "weights_inside": first["n_weights_inside"],
        "devices": {name: found["accelerator"].get("device", "") for name, found in told.items()},
        "retries": {name: found["retries"] for name, found in told.items()},
        "accelerator_bytes": {
            name: {"out": found["accelerator"].get("bytes_out", 0), "back": found["accelerator"].get("bytes_in", 0)}
            for name, found in told.items()
        },
    }


def _bytes(report: dict[str, Any]) -> dict[str, int]:
    """By boundary. A method has no boundary that the other's data cross."""
    found = dict(report["bytes"])
    if pad := _pad(report):
        del found["store"]
        found["accelerator"] = sum(sum(moved.values()) for moved in pad["accelerator_bytes"].values())
    return found


def _seen_by_enclaves(job: Job) -> list[tuple[str, str, str]]:
    released = job.release.what == "adapter"
    everybody = "by the job's release, every client; the server enclave and every client's enclave"
    return [
        ("training text", "in the clear", "the institution that owns it, nobody else"),
        ("activations, gradients", "in the clear", "the client's own enclave"),
        ("inputs of frozen layers", f"masked, pad {job.method.pad}", "the client's accelerator and host"),
        ("adapter", "in the clear", everybody if released else "the server enclave and every client's enclave"),
        ("updates, adapter on their way", "sealed session records", "relay, hosts, network: ciphertext only"),
        ("one client's update", "in the clear", "that client's enclave; the attested server enclave"),
    ]


def _seen_by_split(job: Job, report: dict[str, Any]) -> list[tuple[str, str, str]]:
    boundary, released = report["boundary"], job.release.what
    return [
        ("training text", "in the clear", "the institution that owns it, nobody else"),
        ("boundary tensors and labels", f"{boundary}, AES-256-GCM", "store, relay, network: ciphertext only"),
        ("boundary tensors and labels", f"{boundary}, in the clear", "their client; the attested server enclave"),
        ("shard keys, manifests", "sealed session records", "their client; the attested server enclave"),
        _tuned("adapter", released == "adapter"),
        _tuned("tuned far-side weights", released == "weights"),
    ]


def _tuned(what: str, is_released: bool) -> tuple[str, str, str]:
    if is_released:
        return (what, "in the clear, by the job's release", "server enclave; every client")
    return (what, "in the clear inside, sealed at rest", "server enclave only")


def _sizes_seen_by(job: Job) -> str:
    return "hosts, accelerators, relay, network" if job.method.name == "enclave" else "store, relay, network"


def _metrics_seen_by(job: Job) -> str:
    host = "server host while it runs (live_metrics); " if job.release.live_metrics else ""
    return f"{host}every client at the end"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = cloister.__version__ if name == "cloister" else importlib.metadata.version(name)
    return found
