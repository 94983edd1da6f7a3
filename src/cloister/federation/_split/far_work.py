"""The far side inside the server enclave: load, train, evaluate, compare, release, predict."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cloister.errors import FederationError

if TYPE_CHECKING:
    from torch import Tensor

    from cloister.attest import Attester
    from cloister.federation._plan import SplitServerPlan
    from cloister.federation._state import RunState
    from cloister.slicing import BackboneInfo, FarSide
    from cloister.train import Features, FeatureSource, ShardBody, StepInfo, TaskSpec, TrainResult, TrainSpec


class FarWork:
    """Owns the far side of one run. Everything it holds is *secret*: it never leaves the enclave but as the job's
    release says."""

    def __init__(
        self,
        plan: SplitServerPlan,
        state: RunState,
        attester: Attester,
        *,
        emit: Callable[..., None],
        stop: threading.Event,
    ) -> None:
        self._plan = plan
        self._state = state
        self._attester = attester
        self._emit = emit
        self._stop = stop
        self._info: BackboneInfo | None = None
        self._far: FarSide | None = None
        self._source: FeatureSource | None = None
        self._release: bytes | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FarWork(loaded={self._far is not None})"

    # --- loading --------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Loads the frozen far side and places the adapter; with a finished run, its trained state too.

        An adapter that training examples choose is placed when training begins; here it is only looked at whether it
        can be.
        """
        if self._state.phase in ("finish", "done"):
            far = self._frozen_far()
            self._restore(far)
        else:
            far = self._fresh_far()
        self._far = far

    @property
    def is_loaded(self) -> bool:
        return self._far is not None

    def _fresh_far(self) -> FarSide:
        """A far side as training starts from it; the same at every call, for every model that is compared."""
        from cloister.train import prepare_adapter, set_precision

        far = self._frozen_far()
        if prepare_adapter(far, self._plan.adapter, seed=self._plan.train.seed):
            set_precision(far, self._train_spec.precision)
        return far

    def _restore(self, far: FarSide) -> None:
        """Adapter and head as the sealed checkpoint of the finished training has them."""
        from cloister.train import restore_tuned, set_precision

        restore_tuned(far, self._plan.adapter, self._checkpointer(), seed=self._plan.train.seed)
        set_precision(far, self._train_spec.precision)

    @property
    def _train_spec(self) -> TrainSpec:
        """The job's training, in the precision that this run has begun with, whichever machine it is resumed on."""
        from cloister.train import resolve_precision

        begun = self._state.results.get("precision")
        return replace(self._plan.train, precision=begun or resolve_precision(self._plan.train.precision))

    def _frozen_far(self) -> FarSide:
        from cloister.slicing import inspect_backbone, load_far

        plan = self._plan
        self._info = self._info or inspect_backbone(plan.model.path)
        return load_far(
            self._info,
            plan.model.cut_layer,
            task=plan.task.name,
            n_labels=len(plan.task.labels) or None,
            pooling=plan.task.pooling,
            seed=plan.train.seed,
        )

    def open_features(self) -> None:
        """Verifies every shard against its manifest and opens the features for training."""
        from cloister.train import FeatureSource

        self._source = FeatureSource(
            [(manifest, self._plan.inbox) for _, manifest in sorted(self._state.manifests.items())],
            task=self._plan.task,
            memory_budget_bytes=self._plan.memory_budget_bytes,
        )

    # --- phases ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains over the global shuffle of all clients' features; continues from the sealed checkpoint."""
        from cloister.train import FarTrainer, evaluate

        far, source = self._loaded()
        spec = self._train_spec
        if "precision" not in self._state.results:
            self._state.set_result("unseen_labels", self._warn_of_unseen_labels(source, spec))
            self._state.set_result("precision", spec.precision)
        if self._plan.task.name == "causal-lm" and "before" not in self._state.results:
            before = evaluate(far, source, self._plan.task).as_dict()
            self._state.set_result("before", before)
            self._tell_metric("before", before)
        trainer = FarTrainer(
            far,
            spec,
            self._plan.adapter,
            self._plan.task,
            source,
            checkpoint=self._checkpointer(),
            on_step=self._tell_step("federated"),
            on_held_out=lambda epoch, found: self._tell_metric("epoch", found.as_dict(), epoch=epoch),
            stop=self._stop,
        )
        result = trainer.train()
        if self._stop.is_set():
            return
        self._state.set_result("losses", [round(loss, 6) for loss in result.losses])
        if result.best_epoch is not None:
            self._state.set_result("early_stopping", early_stopping_facts(result, spec, source))

    def _warn_of_unseen_labels(self, source: Features, spec: TrainSpec) -> list[str]:
        """Names of the clients, each of which is warned of. Which class it is leaves the enclave in no form."""
        from cloister.train import trained_features

        clients = trained_features(source, spec).clients_with_unseen_labels()
        for client in clients:
            cause = (
                f"client {client} has test examples of a class that no client trains on; no answer to them can be right"
            )
            self._emit("warning", cause=cause)
        return clients

    def evaluate(self) -> None:
        """Metrics on the held-out features of every client, per client and overall."""
        from cloister.train import evaluate

        if "metric" in self._state.results:
            return
        far, source = self._loaded()
        self._restore(far)
        self._state.results |= adapter_facts(far)  # saved with the metric
        metric = evaluate(far, source, self._plan.task).as_dict()
        self._state.set_result("metric", metric)
        self._tell_metric("after", metric)

    def baselines(self) -> None:
        """What the tuned model is compared with; each result is kept as soon as it is there."""
        from cloister.train import alone_baseline, linear_head_baseline, majority_baseline

        plan, (_, source) = self._plan, self._loaded()
        done: dict[str, Any] = dict(self._state.results.get("baselines", {}))
        for name in plan.baselines:
            if self._stop.is_set():
                return
            if name == "majority" and "majority" not in done:
                done["majority"] = majority_baseline(source, plan.task)
                self._tell_metric("majority", done["majority"])
            elif name == "linear-head" and "linear_head" not in done:
                done["linear_head"] = linear_head_baseline(self._frozen_far(), source, plan.task, seed=plan.train.seed)
                self._tell_metric("linear-head", done["linear_head"])
            elif name == "alone":
                alone = dict(done.get("alone", {}))
                for client in source.clients:
                    if client not in alone and not self._stop.is_set():
                        alone[client] = alone_baseline(
                            self._fresh_far(), source, client, self._train_spec, plan.adapter, plan.task,
                            on_step=self._tell_step(f"alone/{client}"), stop=self._stop,
                        )  # fmt: skip
                        if self._stop.is_set():
                            return
                        self._tell_metric(f"alone/{client}", alone[client])
                        done["alone"] = alone
                        self._state.set_result("baselines", done)
            self._state.set_result("baselines", done)

    def release_bytes(self) -> bytes:
        """What the job lets leave the enclave, as safetensors; empty for `release = "none"`."""
        if self._plan.release == "none":
            return b""
        if self._release is None:
            from cloister.train import export_release

            far, _ = self._loaded(features=False)
            self._release = release = export_release(far, self._plan.release)
            return release
        return self._release

    # --- prediction -----------------------------------------------------------------------------------------------

    def predict(self, body: ShardBody) -> list[dict[str, Any]]:
        """One answer per example of the request: label probabilities, or the next token (causal-lm)."""
        from cloister.train import predict

        far, _ = self._loaded(features=False)
        with self._lock:
            answers: Tensor = predict(far, [body.example(i) for i in range(len(body))], self._plan.task)
        if self._plan.task.name == "sequence-classification":
            return [{"probabilities": [float(p) for p in row]} for row in answers]
        return [{"next_token": int(token)} for token in answers]

    @property
    def task(self) -> TaskSpec:
        return self._plan.task

    @property
    def hidden_size(self) -> int:
        if self._info is None:
            raise FederationError("the far side is not loaded yet")
        return self._info.hidden_size

    # --- helpers --------------------------------------------------------------------------------------------------

    def _loaded(self, *, features: bool = True) -> tuple[FarSide, Any]:
        if self._far is None or (features and self._source is None):
            raise FederationError("the far side or its features are not loaded yet")
        return self._far, self._source

    def _checkpointer(self) -> Any:
        from cloister.train import Checkpointer

        plan = self._plan
        label = f"far-checkpoint/{plan.run_id}/{hashlib.sha256(plan.job_sha384).hexdigest()}"
        return Checkpointer(plan.work / "checkpoint.sealed", self._attester.sealing_key("far-checkpoint"), label)

    def _tell_step(self, model: str) -> Callable[[StepInfo], None]:
        def tell(info: StepInfo) -> None:
            fields: dict[str, Any] = {"step": info.step, "n_steps": info.n_steps, "epoch": info.epoch, "model": model}
            if self._plan.live_metrics:
                fields |= {"loss": round(info.loss, 5), "lr": info.lr}
            self._emit("step", **fields, examples_per_s=round(info.examples_per_s, 1))

        return tell

    def _tell_metric(self, when: str, metric: dict[str, Any], **more: Any) -> None:
        if self._plan.live_metrics:
            told = {key: metric[key] for key in ("name", "value", "per_client")}
            self._emit("metric", **told, when=when, **more)


def adapter_facts(far: FarSide) -> dict[str, Any]:
    """What the report says of the adapter (docs/result.md): *public*, counts and never which rows were chosen."""
    from cloister.adapters import n_trainable, spf_facts

    spf = spf_facts(far)
    return {"adapter": "spf" if spf else "lora", "spf": spf, "n_trainable": n_trainable(far)}


def early_stopping_facts(result: TrainResult, spec: TrainSpec, source: Features) -> dict[str, Any]:
    """What the report says of early stopping (docs/result.md)."""
    from cloister.train import trained_features

    return {
        "patience": spec.patience,
        "held_out": trained_features(source, spec).n_examples("held-out"),
        "losses": [round(loss, 6) for loss in result.held_out_losses],
        "best_epoch": result.best_epoch,
        "stopped_at_epoch": result.stopped_at_epoch,
    }
