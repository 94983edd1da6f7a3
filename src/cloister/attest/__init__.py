"""Evidence, its verification and the allow-list policy; one file per TEE type. Normative: spec/attestation.md.

Only this package imports the quote verifier, and only this package knows what "simulated" means.
"""

from __future__ import annotations

from cloister.attest._attesters.detect import BackendReport, detect_backends
from cloister.attest._attesters.snp import SnpAttester
from cloister.attest._attesters.tdx import TdxAttester
from cloister.attest._attesters.tpm_port import expected_pcr
from cloister.attest._backends import BACKENDS, BackendSettings, Measured, open_backend
from cloister.attest._collateral import (
    AMD_KDS_URL,
    INTEL_PCS_URL,
    check_url,
    fetch_intel_collateral,
    snp_certificate_paths,
)
from cloister.attest._measure import (
    expected_host_data,
    expected_rtmr3,
    measure_folder,
    measure_package,
    measurement_events,
)
from cloister.attest._policy import EVIDENCE_TYPES, Policy
from cloister.attest._policy_file import render_policy, write_policy
from cloister.attest._policy_init import draft_policy
from cloister.attest._simulated.attester import SimulatedAttester
from cloister.attest._simulated.intel_root import SimulatedRoot
from cloister.attest._types import HARDENING_LAYERS, INTEL_ROOT_SHA256, Attester, Claims, Decision
from cloister.attest._verify import Appraisal, appraise_evidence, verify_evidence

__all__ = [
    "AMD_KDS_URL",
    "BACKENDS",
    "EVIDENCE_TYPES",
    "HARDENING_LAYERS",
    "INTEL_PCS_URL",
    "INTEL_ROOT_SHA256",
    "Appraisal",
    "Attester",
    "BackendReport",
    "BackendSettings",
    "Claims",
    "Decision",
    "Measured",
    "Policy",
    "SimulatedAttester",
    "SimulatedRoot",
    "SnpAttester",
    "TdxAttester",
    "appraise_evidence",
    "check_url",
    "detect_backends",
    "draft_policy",
    "expected_host_data",
    "expected_pcr",
    "expected_rtmr3",
    "fetch_intel_collateral",
    "measure_folder",
    "measure_package",
    "measurement_events",
    "open_backend",
    "render_policy",
    "snp_certificate_paths",
    "verify_evidence",
    "write_policy",
]
