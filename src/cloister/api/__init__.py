"""What `import cloister` offers: run a job, ask the tuned model; and what its operators need around it. Prints nothing.

Names are loaded at first use, so that the enclave and client processes, whose mains are here, never load the launcher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.api._collateral import fetch_for_quote, fetch_for_snp_report
    from cloister.api._compare import Comparison, compare
    from cloister.api._doctor import examine_machine
    from cloister.api._estimate import Estimate, SplitEstimate
    from cloister.api._estimate_json import estimate_to_json
    from cloister.api._estimate_model import plan_model
    from cloister.api._estimate_words import method1_words, method2_words, recommendation
    from cloister.api._evidence import Outcome, judge_evidence, read_evidence, read_limited
    from cloister.api._launch import Launch, Programs
    from cloister.api._machine import Machine, load_machine, machine_names, save_machine
    from cloister.api._machine_probe import measure_machine
    from cloister.api._measure import Measured, measure_job
    from cloister.api._policy_words import policy_allows, policy_warnings
    from cloister.api._predict import predict
    from cloister.api._result import RunResult
    from cloister.api._run import run

_HOME = {
    "Comparison": "_compare",
    "Estimate": "_estimate",
    "Launch": "_launch",
    "Machine": "_machine",
    "Measured": "_measure",
    "Outcome": "_evidence",
    "Programs": "_launch",
    "RunResult": "_result",
    "SplitEstimate": "_estimate",
    "compare": "_compare",
    "estimate_to_json": "_estimate_json",
    "examine_machine": "_doctor",
    "fetch_for_quote": "_collateral",
    "fetch_for_snp_report": "_collateral",
    "judge_evidence": "_evidence",
    "load_machine": "_machine",
    "machine_names": "_machine",
    "measure_job": "_measure",
    "measure_machine": "_machine_probe",
    "method1_words": "_estimate_words",
    "method2_words": "_estimate_words",
    "plan_model": "_estimate_model",
    "policy_allows": "_policy_words",
    "policy_warnings": "_policy_words",
    "predict": "_predict",
    "read_evidence": "_evidence",
    "read_limited": "_evidence",
    "recommendation": "_estimate_words",
    "run": "_run",
    "save_machine": "_machine",
}

__all__ = [
    "Comparison",
    "Estimate",
    "Launch",
    "Machine",
    "Measured",
    "Outcome",
    "Programs",
    "RunResult",
    "SplitEstimate",
    "compare",
    "estimate_to_json",
    "examine_machine",
    "fetch_for_quote",
    "fetch_for_snp_report",
    "judge_evidence",
    "load_machine",
    "machine_names",
    "measure_job",
    "measure_machine",
    "method1_words",
    "method2_words",
    "plan_model",
    "policy_allows",
    "policy_warnings",
    "predict",
    "read_evidence",
    "read_limited",
    "recommendation",
    "run",
    "save_machine",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
