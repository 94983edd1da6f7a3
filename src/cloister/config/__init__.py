"""The job file: frozen models, TOML in, all errors at once."""

from __future__ import annotations

from cloister.config._check import check_job
from cloister.config._load import load_job, parse_job
from cloister.config._models import (
    AdapterConfig,
    ClientConfig,
    ColumnsConfig,
    EnclaveConfig,
    EvaluationConfig,
    FederationConfig,
    Job,
    MethodConfig,
    ModelConfig,
    PolicyConfig,
    ReleaseConfig,
    StoreConfig,
    TaskConfig,
    TrainingConfig,
)
from cloister.config._rewrite import rewrite_job
from cloister.config._template import job_template
from cloister.config._toml import job_to_toml

__all__ = [
    "AdapterConfig",
    "ClientConfig",
    "ColumnsConfig",
    "EnclaveConfig",
    "EvaluationConfig",
    "FederationConfig",
    "Job",
    "MethodConfig",
    "ModelConfig",
    "PolicyConfig",
    "ReleaseConfig",
    "StoreConfig",
    "TaskConfig",
    "TrainingConfig",
    "check_job",
    "job_template",
    "job_to_toml",
    "load_job",
    "parse_job",
    "rewrite_job",
]
