"""A run's folder from a checked job: node keys, the simulated platform, and the policy every client will apply."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cloister._files import write_whole
from cloister.attest import Policy, write_policy
from cloister.errors import StoreError
from cloister.federation import generate_node_key, load_node_key, register_node_key, write_node_key
from cloister.slicing import inspect_backbone, local_folder

from ._folder import RunFolder
from ._measure import measure_job
from ._platform import simulated_platform

if TYPE_CHECKING:
    from cloister.config import Job


def set_up(job: Job, runs_dir: Path) -> RunFolder:
    """Creates `runs/<id>` with everything that the processes of a run need.

    Raises:
        StoreError: the folder cannot be written.
        ConfigError: the job's own policy or a node key is not usable.
    """
    folder = RunFolder.create(runs_dir, job.name)
    try:
        folder.write_job(job)
        (folder.path / "model").symlink_to(local_folder(inspect_backbone(job.model.path)).resolve())
        for name in job.client_names:
            _node_key(job, folder, name)
        if job.policy.file is None:
            _write_policy(job, folder)
        else:
            write_whole(folder.policy, Path(job.policy.file).read_bytes())
            Policy.load(folder.policy)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)  # nothing half-written
        raise
    folder.link_latest()
    return folder


def _node_key(job: Job, folder: RunFolder, name: str) -> None:
    try:
        folder.client(name).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StoreError(f"cannot create {error.filename}: {error.strerror}", path=str(folder.path)) from error
    own = job.client(name).node_key
    if own is None:
        generate_node_key(folder.node_key(name))
    else:
        write_node_key(load_node_key(Path(own)), folder.node_key(name))
    register_node_key(folder.node_key(name), folder.registered_key(name))


def _write_policy(job: Job, folder: RunFolder) -> None:
    """A strict policy for this machine's simulated platform: this release, this job, these weights, nothing else."""
    root = simulated_platform().root_sha256
    has_client_enclaves = job.method.name == "enclave"
    clients: tuple[bytes, ...] | None = () if has_client_enclaves else None
    # Its template, which has no values, is measured too.
    write_policy(folder.policy, root_sha256=root, server_rtmr3=(), client_rtmr3=clients)
    rtmr3 = bytes.fromhex(measure_job(job, policy_file=folder.policy).rtmr3)
    clients = (rtmr3,) if has_client_enclaves else None
    write_policy(folder.policy, root_sha256=root, server_rtmr3=(rtmr3,), client_rtmr3=clients)
