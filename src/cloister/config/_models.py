"""The job file as frozen models: what may be said in it, in which types and ranges.

Cross-checks between sections live in `_rules`, reading and error texts in `_load`, checks against the disk in `_check`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator

if TYPE_CHECKING:
    from cloister.adapters import AdapterSpec, FarAdapterSpec, LoraSpec, SpfSpec
    from cloister.train import Columns, DpSgdSpec, TaskSpec, TrainSpec

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,31}$"
"""A client's name: it becomes a file name, a process name and a field of every record header."""

_MIB = 2**20

# TOML is typed, so a quoted number is a mistake that pydantic's lax mode would hide. A float may be written as an
# integer.
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, hide_input_in_errors=True)


class TaskConfig(_Section):
    """`[task]`: what the model learns to do."""

    name: Literal["sequence-classification", "causal-lm"]
    labels: tuple[Text, ...] = ()
    pooling: Literal["mean", "cls", "last"] | None = None
    max_length: Annotated[Int, Field(ge=2, le=1_000_000)] | None = None
    on_too_long: Literal["error", "truncate"] = "error"


class ModelConfig(_Section):
    """`[model]`: the public backbone and where it is cut."""

    path: Text
    cut_layer: Annotated[Int, Field(ge=0)] | None = None


class MethodConfig(_Section):
    """`[method]`: how the work is divided. `split` is Method 2, `enclave` is Method 1; each has keys of its own."""

    name: Literal["split", "enclave"] = "split"
    # split
    boundary: Literal["int8", "bf16", "fp32"] = "int8"
    near_batch_size: Annotated[Int, Field(ge=1, le=4096)] = 32
    # enclave
    rounds: Annotated[Int, Field(ge=1, le=1_000_000)] = 3
    ring: Literal["faithful", "fast"] = "faithful"
    pad: Literal["otp", "lattice"] = "otp"
    bucket: Annotated[Int, Field(ge=1, le=65_536)] = 16
    pool_bytes: Annotated[Int, Field(ge=0)] = 0


class AdapterConfig(_Section):
    """`[adapter]`: the trained parameters: LoRA, in Method 1 the prefix of P-tuning v2, in Method 2 SPF with LoRA."""

    name: Literal["lora", "prefix", "spf"] = "lora"
    r: Annotated[Int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[Float, Field(gt=0)] = 16
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    use_rslora: Bool = False
    freeze_a: Bool = False
    # prefix
    n_tokens: Annotated[Int, Field(ge=1, le=4096)] = 16
    projection: Bool = False
    hidden_size: Annotated[Int, Field(ge=1, le=65_536)] | None = None
    # spf
    heads: Annotated[Float, Field(ge=0, le=1)] = 0.5
    neurons: Annotated[Float, Field(ge=0, le=1)] = 0.5
    criterion: Literal["l1", "gradient", "fisher", "random"] = "l1"
    criterion_examples: Annotated[Int, Field(ge=1)] = 256

    # Unions are checked by hand: pydantic reports one error for each branch, which reads as several problems.
    @field_validator("targets", mode="before")
    @classmethod
    def _targets_are_names(cls, value: object) -> object:
        names = isinstance(value, (list, tuple)) and value and all(isinstance(name, str) and name for name in value)
        if value != "all-linear" and not names:
            raise ValueError('must be "all-linear" or a list of layer names')
        return value


class PrivacyConfig(_Section):
    """`[training.privacy]`: of each training example, by DP-SGD in the client's enclave.

    `[aggregation.privacy]`: of whole clients. Both need the extra `dp`.
    """

    clip_norm: Annotated[Float, Field(gt=0)]
    noise_multiplier: Annotated[Float, Field(ge=0.01)]
    delta: Annotated[Float, Field(gt=0, lt=1)]


class TrainingConfig(_Section):
    """`[training]`: the far side's optimiser and its schedule."""

    epochs: Annotated[Int, Field(ge=1, le=100_000)] = 3
    batch_size: Annotated[Int, Field(ge=1, le=65_536)] = 16
    grad_accumulation: Annotated[Int, Field(ge=1, le=65_536)] = 1
    lr: Annotated[Float, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.01
    warmup_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.06
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every_steps: Annotated[Int, Field(ge=1)] = 50
    max_steps: Annotated[Int, Field(ge=1)] | None = None
    # split
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    patience: Annotated[Int, Field(ge=1, le=100_000)] | None = None
    held_out: Annotated[Float, Field(gt=0, le=0.5)] = 0.1
    # enclave
    privacy: PrivacyConfig | None = None


class AggregationConfig(_Section):
    """`[aggregation]`: how the server enclave makes one adapter of a round's updates (Method 1)."""

    rule: Literal["fedavg", "fedprox", "fedadam", "trimmed-mean"] = "fedavg"
    max_norm: Annotated[Float, Field(gt=0)] = 1000.0
    max_examples: Annotated[Int, Field(ge=1)] = 1_000_000
    weighting: Literal["examples", "uniform"] = "examples"
    exact_lora: Bool = False
    trim: Annotated[Float, Field(gt=0, lt=0.5)] = 0.2
    server_lr: Annotated[Float, Field(gt=0)] = 0.1
    beta_1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[Float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[Float, Field(gt=0)] = 1e-3
    proximal_mu: Annotated[Float, Field(ge=0)] = 0.0
    privacy: PrivacyConfig | None = None


class EvaluationConfig(_Section):
    """`[evaluation]`: what the tuned model is compared with."""

    baselines: tuple[Literal["majority", "linear-head", "alone"], ...] = ("majority",)


class ColumnsConfig(_Section):
    """`[clients.columns]`: which of a client's columns hold what. Local to the client."""

    text: Text = "text"
    text_b: Text | None = None
    label: Text = "label"
    prompt: Text = "prompt"
    completion: Text = "completion"


class DataConfig(_Section):
    """One part of a client's data: a path, or a table of path, split and filter. Local to the client."""

    path: Text
    split: Text | None = None
    where: dict[str, Any] = Field(default_factory=dict)

    @field_validator("where")
    @classmethod
    def _where_compares_with_plain_values(cls, value: dict[str, Any]) -> dict[str, Any]:
        for column, wanted in value.items():
            choices = wanted if isinstance(wanted, (list, tuple)) and wanted else [wanted]
            if not all(isinstance(choice, (bool, int, float, str)) for choice in choices):
                raise ValueError(f"compares the column {column!r} with something that is no text, number or boolean")
        return value


class ClientConfig(_Section):
    """`[[clients]]`: one institution. Only its name and weight are shared; the rest stays on its machine."""

    name: Name
    train: DataConfig
    test: DataConfig | None = None
    columns: ColumnsConfig = ColumnsConfig()
    node_key: Text | None = None
    weight: Annotated[Float, Field(gt=0)] = 1.0
    accelerator: Text | None = None

    @field_validator("train", "test", mode="before")
    @classmethod
    def _a_path_alone_is_enough(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @property
    def datasets(self) -> dict[str, DataConfig]:
        """The parts of this client's data by split; without "test" where it has none held out."""
        return {"train": self.train} | ({"test": self.test} if self.test else {})

    def column_map(self) -> Columns:
        """This client's columns as the data readers take them."""
        from cloister.train import Columns

        return Columns(**self.columns.model_dump())


class PolicyConfig(_Section):
    """`[policy]`: the allow-list that decides which enclave a client talks to."""

    file: Text | None = None


class StoreConfig(_Section):
    """`[store]`: the untrusted place that carries sealed shards. `options` may hold credentials and is never shown."""

    url: Text | None = None
    shard_max_bytes: Annotated[Int, Field(ge=64 * 1024, le=1024 * _MIB)] = 64 * _MIB
    options: dict[str, Any] = Field(default_factory=dict, repr=False)


class FederationConfig(_Section):
    """`[federation]`: the untrusted relay, and how long to wait for whom."""

    min_clients: Annotated[Int, Field(ge=1)] | None = None
    timeout_s: Annotated[Float, Field(gt=0)] = 3600.0
    patience_s: Annotated[Float, Field(gt=0)] = 10.0
    tls: Bool = True
    port: Annotated[Int, Field(ge=1, le=65_535)] | None = None


class EnclaveConfig(_Section):
    """`[enclave]`: the trusted process of the server. The backend is agreed by all; the rest is its operator's."""

    backend: Literal["simulated", "azure", "sgx", "snp", "tdx", "vtpm"] = "simulated"
    collateral: Text | None = None
    td_quote: Text | None = None
    tcti: Text = "device:/dev/tpmrm0"
    counter_index: Annotated[Int, Field(ge=0x0180_0000, lt=0x01C0_0000)] | None = None
    gpu: Bool = False
    sealing: Literal["platform", "ephemeral"] = "platform"
    memory_budget_bytes: Annotated[Int, Field(ge=16 * _MIB)] = 2048 * _MIB


class ReleaseConfig(_Section):
    """`[release]`: what leaves the server enclave when training is over, and while it runs."""

    what: Literal["none", "adapter", "weights"] = "none"
    live_metrics: Bool = True


class Job(_Section):
    """One training run, as all its parties agree on it, with this machine's own paths filled in.

    Build it with `load_job` or `parse_job`, which report every problem at once.
    """

    version: Literal[1] = 1
    name: Name
    task: TaskConfig
    model: ModelConfig
    method: MethodConfig = MethodConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    aggregation: AggregationConfig = AggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    clients: Annotated[tuple[ClientConfig, ...], Field(min_length=1, max_length=1000)]
    policy: PolicyConfig = PolicyConfig()
    store: StoreConfig = StoreConfig()
    federation: FederationConfig = FederationConfig()
    enclave: EnclaveConfig = EnclaveConfig()
    release: ReleaseConfig = ReleaseConfig()

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_an_integer(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("must be the integer 1")
        return value

    @property
    def client_names(self) -> tuple[str, ...]:
        """The clients' names in the order of the file."""
        return tuple(client.name for client in self.clients)

    @property
    def min_clients(self) -> int:
        """How many clients must stay for the run to go on; all of them unless the job says otherwise."""
        return self.federation.min_clients or len(self.clients)

    def client(self, name: str) -> ClientConfig:
        """The client of that name; KeyError if the job has none."""
        for client in self.clients:
            if client.name == name:
                return client
        raise KeyError(name)

    def canonical_bytes(self) -> bytes:
        """The part of the job that all parties agree on, as canonical JSON (public).

        Left out are what one party alone decides and what differs from machine to machine: each client's paths,
        columns, filters, key and accelerators, the store's credentials and local folder, the policy's path (its content
        is agreed by hash in the handshake), the relay's port, what the server's operator gives its backend, and
        the folder above the backbone (its weights are measured).
        """
        shared = self.model_dump(mode="json")
        shared["model"]["path"] = _shared_model_name(self.model.path)
        shared["clients"] = [
            {"name": client.name, "weight": client.weight} for client in sorted(self.clients, key=lambda c: c.name)
        ]
        del shared["policy"]
        del shared["store"]["options"]
        if self.store.url is not None and "://" not in self.store.url:
            shared["store"]["url"] = None
        del shared["federation"]["port"]
        shared["enclave"] = {"backend": self.enclave.backend}
        return json.dumps(shared, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @property
    def sha384(self) -> bytes:
        """SHA-384 of `canonical_bytes`: what a client's operator approves and the enclave's measurement contains."""
        return hashlib.sha384(self.canonical_bytes()).digest()

    def task_spec(self, *, is_encoder: bool | None = None) -> TaskSpec:
        """The task as `train` takes it. Without a pooling in the job, encoders get mean and decoders last.

        Reads the backbone's configuration when neither the job nor the caller says which of the two it is.
        """
        from cloister.train import TaskSpec

        pooling = self.task.pooling
        if pooling is None:
            if is_encoder is None:
                from cloister.slicing import inspect_backbone

                is_encoder = inspect_backbone(self.model.path).is_encoder
            pooling = "mean" if is_encoder else "last"
        return TaskSpec(
            name=self.task.name,
            labels=self.task.labels,
            pooling=pooling,
            max_length=self.task.max_length,
            on_too_long=self.task.on_too_long,
        )

    def train_spec(self) -> TrainSpec:
        """The optimiser's part as `train` takes it; clients' weights only where they differ from 1."""
        from cloister.train import TrainSpec

        weights = tuple((client.name, client.weight) for client in self.clients)
        weighted = any(weight != 1.0 for _, weight in weights)
        given = self.training.model_dump(exclude={"privacy"})
        return TrainSpec(**given, client_weights=weights if weighted else None)

    def dp_sgd_spec(self) -> DpSgdSpec | None:
        """DP-SGD as `train` takes it; None without."""
        from cloister.train import DpSgdSpec

        given = self.training.privacy
        return given and DpSgdSpec(given.noise_multiplier, given.clip_norm, given.delta)

    def lora_spec(self) -> LoraSpec:
        """LoRA as `adapters` takes it."""
        from cloister.adapters import LoraSpec

        return LoraSpec(**self._adapter_keys(LoraSpec))

    def far_adapter_spec(self) -> FarAdapterSpec:
        """Method 2's adapter as `adapters` takes it."""
        from cloister.adapters import SpfSpec

        return SpfSpec(**self._adapter_keys(SpfSpec)) if self.adapter.name == "spf" else self.lora_spec()

    def _adapter_keys(self, spec: type[LoraSpec | SpfSpec]) -> dict[str, Any]:
        """The keys of `[adapter]` that a spec has; they have its names."""
        return self.adapter.model_dump(include={field.name for field in fields(spec)})

    def adapter_spec(self) -> AdapterSpec:
        """Method 1's adapter as `adapters` takes it."""
        from cloister.adapters import PrefixSpec

        if self.adapter.name == "lora":
            return self.lora_spec()
        return PrefixSpec(self.adapter.n_tokens, self.adapter.projection, self.adapter.hidden_size)


def _shared_model_name(path: str) -> str:
    """A hub name as it is; of a local folder only its own name, because the rest differs between machines."""
    return Path(path).name if Path(path).is_absolute() else path
