"""What the server enclave of a job will measure: the values that a policy needs before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.attest import (
    Policy,
    expected_host_data,
    expected_pcr,
    expected_rtmr3,
    measure_folder,
    measure_package,
    measurement_events,
    render_policy,
)
from cloister.slicing import inspect_backbone, local_folder

from ._platform import simulated_platform

if TYPE_CHECKING:
    from cloister.config import Job


@dataclass(frozen=True)
class Measured:
    """Digests of what the enclave loads, and the registers that follow from them. Public, all in hex.

    Attributes:
        job_name: of the job file.
        policy_source: the policy that is measured; empty for the one that a run writes itself (simulated).
        package, job, policy_template, weights: SHA-384 digests, in the order in which they are extended.
        rtmr3: TDX and simulated TDX, 48 bytes.
        host_data: SNP, 32 bytes: what the guest must be launched with.
        pcr15: TPM, SHA-256 bank, 32 bytes.
    """

    job_name: str
    policy_source: str
    package: str
    job: str
    policy_template: str
    weights: str
    rtmr3: str
    host_data: str
    pcr15: str


def measure_job(job: Job, *, policy_file: str | Path | None = None) -> Measured:
    """The expected values for this release of cloister, `job`, its backbone and its policy. Starts nothing.

    Args:
        job: checked.
        policy_file: the policy to measure; by default the job's own, or else the one that a run would write.

    Raises:
        ConfigError: the policy does not parse.
        ModelError: the backbone is not there.
        AttestationError: something cannot be measured.
    """
    named = policy_file or job.policy.file
    policy = Policy.load(named) if named else Policy.parse(render_policy(root_sha256=simulated_platform().root_sha256))
    package = measure_package()
    weights = measure_folder(local_folder(inspect_backbone(job.model.path)).resolve())
    digests = {
        "package": package,
        "job_sha384": job.sha384,
        "policy_template": policy.template_sha384,
        "weights": weights,
    }
    rtmr3 = expected_rtmr3(**digests)
    return Measured(
        job_name=job.name,
        policy_source=str(named or ""),
        package=package.hex(),
        job=job.sha384.hex(),
        policy_template=policy.template_sha384.hex(),
        weights=weights.hex(),
        rtmr3=rtmr3.hex(),
        host_data=expected_host_data(rtmr3).hex(),
        pcr15=expected_pcr(measurement_events(**digests)).hex(),
    )
