"""Evidence, its verification and the allow-list policy; one file per TEE type. Normative: spec/attestation.md.

Only this package imports the quote verifier, and only this package knows what "simulated" means.
"""

from __future__ import annotations

from cloister.attest._measure import expected_rtmr3, measure_folder, measure_package
from cloister.attest._policy import EVIDENCE_TYPES, Policy
from cloister.attest._policy_file import render_policy, write_policy
from cloister.attest._simulated.attester import SimulatedAttester
from cloister.attest._simulated.intel_root import SimulatedRoot
from cloister.attest._types import HARDENING_LAYERS, INTEL_ROOT_SHA256, Attester, Claims, Decision
from cloister.attest._verify import Appraisal, appraise_evidence, verify_evidence

__all__ = [
    "EVIDENCE_TYPES",
    "HARDENING_LAYERS",
    "INTEL_ROOT_SHA256",
    "Appraisal",
    "Attester",
    "Claims",
    "Decision",
    "Policy",
    "SimulatedAttester",
    "SimulatedRoot",
    "appraise_evidence",
    "expected_rtmr3",
    "measure_folder",
    "measure_package",
    "render_policy",
    "verify_evidence",
    "write_policy",
]
