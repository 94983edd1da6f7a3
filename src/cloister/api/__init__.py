"""What `import cloister` offers: run a job, ask the tuned model; and what its operators need around it. Prints nothing.

Names are loaded at first use, so that the enclave and client processes, whose mains are here, never load the launcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.api._collateral import fetch_for_quote, fetch_for_snp_report
    from cloister.api._doctor import examine_machine
    from cloister.api._evidence import Outcome, judge_evidence, read_evidence, read_limited
    from cloister.api._launch import Launch, Programs
    from cloister.api._measure import Measured, measure_job
    from cloister.api._policy_words import policy_allows, policy_warnings
    from cloister.api._predict import predict
    from cloister.api._result import RunResult
    from cloister.api._run import run

_HOME = {
    "Launch": "_launch",
    "Measured": "_measure",
    "Outcome": "_evidence",
    "Programs": "_launch",
    "RunResult": "_result",
    "examine_machine": "_doctor",
    "fetch_for_quote": "_collateral",
    "fetch_for_snp_report": "_collateral",
    "judge_evidence": "_evidence",
    "measure_job": "_measure",
    "policy_allows": "_policy_words",
    "policy_warnings": "_policy_words",
    "predict": "_predict",
    "read_evidence": "_evidence",
    "read_limited": "_evidence",
    "run": "_run",
}

__all__ = [
    "Launch",
    "Measured",
    "Outcome",
    "Programs",
    "RunResult",
    "examine_machine",
    "fetch_for_quote",
    "fetch_for_snp_report",
    "judge_evidence",
    "measure_job",
    "policy_allows",
    "policy_warnings",
    "predict",
    "read_evidence",
    "read_limited",
    "run",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
