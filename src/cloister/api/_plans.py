"""From the agreed job to what each party works by. Both process mains and the launcher build plans here only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.federation import ModelPlan, SplitClientPlan, SplitServerPlan

if TYPE_CHECKING:
    from cloister.attest import Policy
    from cloister.config import Job

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
        lora=job.lora_spec(),
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
    from cloister.train import open_dataset

    client, task = job.client(name), job.task_spec(is_encoder=_is_encoder(folder))
    datasets = {
        split: open_dataset(
            data.path, columns=client.column_map(), task=task, split=data.split, where=data.where or None
        )
        for split, data in client.datasets.items()
        if with_data
    }
    return SplitClientPlan(
        run_id=folder.run_id,
        name=name,
        job_sha384=job.sha384,
        policy=policy,
        server_policy_sha384=policy.sha384,
        task=task,
        model=model_plan(job, folder),
        datasets=datasets,
        node_key=folder.node_key(name),
        work=folder.client(name),
        store_url=store_url(job, folder),
        store_options=dict(job.store.options),
        shard_max_bytes=job.store.shard_max_bytes,
        near_batch_size=job.method.near_batch_size,
    )
