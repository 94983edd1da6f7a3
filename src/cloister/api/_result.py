"""What a run ends with: result.json (docs/result.md), and what the caller of `run` holds in hand."""

from __future__ import annotations

import importlib.metadata
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
        """The metric over all clients' held-out examples."""
        return float(self.result["metric"]["value"])

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
        "n_examples": report["n_examples"],
        "n_truncated": report["n_truncated"],
        "left_out": report["left_out"],
        "wall_s": round(wall_s, 3),
        "phases_s": phase_times(events),
        "bytes": report["bytes"],
        "peak_rss_bytes": dict(sorted(launch.memory.peak_rss_bytes.items())),
        "policy_sha384": report["policy_sha384"],
        "evidence": [
            {"client": e["client"], "accepted": True, "reasons": e["reasons"], "claims": e["claims"]} for e in evidence
        ],
        "restarts": sum(1 for event in events if event["event"] == "restart"),
        "pad": None,
        "boundary": report["boundary"],
        "cut_layer": report["cut_layer"],
        "release": report["release"],
        "seed": report["seed"],
        "visibility": visibility(job, report),
        "versions": versions(),
    }


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
    boundary, released = report["boundary"], job.release.what
    rows = [
        ("training text", "in the clear", "the institution that owns it, nobody else"),
        ("boundary tensors and labels", f"{boundary}, AES-256-GCM", "store, relay, network: ciphertext only"),
        ("boundary tensors and labels", f"{boundary}, in the clear", "their client; the attested server enclave"),
        ("shard keys, manifests", "sealed session records", "their client; the attested server enclave"),
        _tuned("adapter", released == "adapter"),
        _tuned("tuned far-side weights", released == "weights"),
        ("evidence", "sealed in the handshake", "every client, which applies its policy"),
        ("loss and metrics", "in the clear", _metrics_seen_by(job)),
        ("sizes and timing", "in the clear", "store, relay, network"),
    ]
    return [{"what": what, "form": form, "who": who} for what, form, who in rows]


def _tuned(what: str, is_released: bool) -> tuple[str, str, str]:
    if is_released:
        return (what, "in the clear, by the job's release", "server enclave; every client")
    return (what, "in the clear inside, sealed at rest", "server enclave only")


def _metrics_seen_by(job: Job) -> str:
    host = "server host while it runs (live_metrics); " if job.release.live_metrics else ""
    return f"{host}every client at the end"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        found[name] = cloister.__version__ if name == "cloister" else importlib.metadata.version(name)
    return found
