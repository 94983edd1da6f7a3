"""From the agreed job to what each party works by. Both process mains and the launcher build plans here only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.federation import (
    AggregationSpec,
    ClientPrivacy,
    EnclaveClientPlan,
    EnclaveServerPlan,
    MaskPlan,
    ModelPlan,
    SplitClientPlan,
    SplitServerPlan,
)
from cloister.pad import PadMode

if TYPE_CHECKING:
    from cloister.attest import Policy
    from cloister.config import Job
    from cloister.train import Dataset

    from ._folder import RunFolder


def store_url(job: Job, folder: RunFolder) -> str:
    """Where sealed shards lie: the job's store, or the run's own inbox folder."""
    return job.store.url or str(folder.inbox)


def model_plan(job: Job, folder: RunFolder) -> ModelPlan:
    from cloister.slicing import inspect_backbone, resolve_cut

    info = inspect_backbone(folder.model)
    return ModelPlan(info.path, resolve_cut(info, job.model.cut_layer), job.method.boundary)


def _is_encoder(folder: RunFolder) -> bool:
    from cloister.slicing import inspect_backbone

    return inspect_backbone(folder.model).is_encoder


def server_plan(job: Job, folder: RunFolder, policy: Policy, node_keys: dict[str, bytes]) -> SplitServerPlan:
    """The server enclave's plan."""
    return SplitServerPlan(
        run_id=folder.run_id,
        job_sha384=job.sha384,
        policy=policy,
        task=job.task_spec(is_encoder=_is_encoder(folder)),
        train=job.train_spec(),
        adapter=job.far_adapter_spec(),
        model=model_plan(job, folder),
        node_keys=node_keys,
        baselines=job.evaluation.baselines if job.task.name == "sequence-classification" else (),
        inbox=folder.inbox,
        work=folder.server,
        store_url=store_url(job, folder),
        store_options=dict(job.store.options),
        min_clients=job.min_clients,
        timeout_s=job.federation.timeout_s,
        patience_s=job.federation.patience_s,
        memory_budget_bytes=job.enclave.memory_budget_bytes,
        release=job.release.what,
        live_metrics=job.release.live_metrics,
    )


def client_plan(job: Job, folder: RunFolder, policy: Policy, name: str, *, with_data: bool = True) -> SplitClientPlan:
    """One client's plan; opens its datasets, so a missing file or column shows here (not for a mere question)."""

    return SplitClientPlan(
        run_id=folder.run_id,
        name=name,
        job_sha384=job.sha384,
        policy=policy,
        server_policy_sha384=policy.sha384,
        task=job.task_spec(is_encoder=_is_encoder(folder)),
        model=model_plan(job, folder),
        datasets=_datasets(job, folder, name) if with_data else {},
        node_key=folder.node_key(name),
        work=folder.client(name),
        store_url=store_url(job, folder),
        store_options=dict(job.store.options),
        shard_max_bytes=job.store.shard_max_bytes,
        near_batch_size=job.method.near_batch_size,
    )


def _datasets(job: Job, folder: RunFolder, name: str) -> dict[str, Dataset]:
    from cloister.train import open_dataset

    client, task = job.client(name), job.task_spec(is_encoder=_is_encoder(folder))
    return {
        split: open_dataset(
            data.path, columns=client.column_map(), task=task, split=data.split, where=data.where or None
        )
        for split, data in client.datasets.items()
    }


def enclave_server_plan(job: Job, folder: RunFolder, policy: Policy, node_keys: dict[str, bytes]) -> EnclaveServerPlan:
    """The server enclave's plan for Method 1."""
    given = job.aggregation.model_dump()
    private = given.pop("privacy")
    return EnclaveServerPlan(
        run_id=folder.run_id,
        job_sha384=job.sha384,
        policy=policy,
        task=job.task_spec(is_encoder=_is_encoder(folder)),
        train=job.train_spec(),
        node_keys=node_keys,
        inbox=folder.inbox,
        work=folder.server,
        store_url=store_url(job, folder),
        min_clients=job.min_clients,
        timeout_s=job.federation.timeout_s,
        patience_s=job.federation.patience_s,
        release=job.release.what,
        live_metrics=job.release.live_metrics,
        adapter=job.adapter_spec(),
        model_path=str(folder.model),
        n_rounds=job.method.rounds,
        aggregation=AggregationSpec(**given, privacy=ClientPrivacy(**private) if private else None),
        memory_bytes=job.enclave.memory_budget_bytes,
    )


def enclave_client_plan(
    job: Job, folder: RunFolder, policy: Policy, name: str, *, with_data: bool = True
) -> EnclaveClientPlan:
    """One client enclave's plan for Method 1; opens its datasets, so a missing file or column shows here."""
    return EnclaveClientPlan(
        run_id=folder.run_id,
        name=name,
        job_sha384=job.sha384,
        policy=policy,
        server_policy_sha384=policy.sha384,
        task=job.task_spec(is_encoder=_is_encoder(folder)),
        datasets=_datasets(job, folder, name) if with_data else {},
        node_key=folder.node_key(name),
        work=folder.client(name),
        adapter=job.adapter_spec(),
        model_path=str(folder.model),
        train=job.train_spec(),
        proximal_mu=job.aggregation.proximal_mu if job.aggregation.rule == "fedprox" else 0.0,
        mask=MaskPlan(
            ring=job.method.ring,
            pad=PadMode(job.method.pad),
            bucket=job.method.bucket,
            pool_bytes=job.method.pool_bytes,
        ),
        dp_sgd=job.dp_sgd_spec(),
        live_metrics=job.release.live_metrics,
    )
