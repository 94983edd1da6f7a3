"""What each party of a run must know before it starts; derived from the agreed job, never sent over the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister.adapters import AdapterSpec, FarAdapterSpec
    from cloister.attest import Policy
    from cloister.federation._aggregate_spec import AggregationSpec
    from cloister.pad import PadMode
    from cloister.train import Dataset, DpSgdSpec, TaskSpec, TrainSpec
    from cloister.wire import Boundary


@dataclass(frozen=True)
class ModelPlan:
    """The frozen backbone and where it is cut; public, the same for every party.

    Attributes:
        path: folder or hub name of the backbone.
        cut_layer: number of near-side blocks, already resolved.
        boundary: encoding of boundary tensors, "int8", "bf16" or "fp32".
    """

    path: str
    cut_layer: int
    boundary: Boundary


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """What the server enclave works by, in either method.

    Attributes:
        node_keys: client name to its registered node key (DER SubjectPublicKeyInfo): who may take part.
        inbox: folder in which the host lays the sealed shards; untrusted.
        work: folder for sealed state and checkpoints; untrusted at rest.
        store_url: where the host's courier finds the shards.
        live_metrics: whether the host may see loss and metrics while the run goes on (declared in the job).
    """

    run_id: str
    job_sha384: bytes
    policy: Policy
    task: TaskSpec
    train: TrainSpec
    node_keys: dict[str, bytes]
    inbox: Path
    work: Path
    store_url: str
    store_options: dict[str, object] = field(default_factory=dict)
    min_clients: int
    timeout_s: float
    patience_s: float
    release: str = "none"
    live_metrics: bool = True


@dataclass(frozen=True, kw_only=True)
class SplitServerPlan(ServerPlan):
    """What the server enclave needs for Method 2 on top.

    Attributes:
        adapter: what the far side is tuned with.
        baselines: what the tuned model is compared with.
        memory_budget_bytes: for the features that it keeps in memory.
    """

    adapter: FarAdapterSpec
    model: ModelPlan
    baselines: tuple[str, ...]
    memory_budget_bytes: int


@dataclass(frozen=True, kw_only=True)
class ClientPlan:
    """What one institution's client process works by, in either method. All of it is this institution's own.

    Attributes:
        node_key: path of the node's private key (EC P-384 PEM); never leaves this machine.
        policy: what this client demands of the server enclave before it releases anything.
        work: folder for what is kept of the run, in the end its report.
    """

    run_id: str
    name: str
    job_sha384: bytes
    policy: Policy
    server_policy_sha384: bytes
    task: TaskSpec
    datasets: dict[str, Dataset]
    node_key: Path
    work: Path


@dataclass(frozen=True, kw_only=True)
class SplitClientPlan(ClientPlan):
    """What a client needs for Method 2 on top: the cut, and where sealed shards go."""

    model: ModelPlan
    store_url: str
    store_options: dict[str, object] = field(default_factory=dict)
    shard_max_bytes: int
    near_batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class EnclaveServerPlan(ServerPlan):
    """What the server enclave needs for Method 1 on top.

    Attributes:
        adapter: what the clients train.
        model_path: folder of the backbone, whose digests the clients' must equal.
        n_rounds: rounds of training.
        aggregation: how a round's updates become the next global adapter.
        memory_bytes: see `Aggregator`.
    """

    adapter: AdapterSpec
    model_path: str
    n_rounds: int
    aggregation: AggregationSpec
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class MaskPlan:
    """How a client's frozen linears run on its accelerator.

    Attributes:
        ring: name of the ring format.
        pad: where pads come from.
        bucket, pool_bytes: see `OffloadSession`.
    """

    ring: str
    pad: PadMode
    bucket: int
    pool_bytes: int


@dataclass(frozen=True, kw_only=True)
class EnclaveClientPlan(ClientPlan):
    """What a client's enclave needs for Method 1 on top.

    Attributes:
        adapter, model_path: as the server's.
        train: one round's steps, rates and seed.
        proximal_mu: of FedProx; 0 for none.
        mask: how the frozen linears are offloaded.
        dp_sgd: differential privacy of each training example; None for none.
    """

    adapter: AdapterSpec
    model_path: str
    train: TrainSpec
    proximal_mu: float
    mask: MaskPlan
    dp_sgd: DpSgdSpec | None = None
    live_metrics: bool = True
