"""What a client's enclave computes with in Method 1: backbone, adapter, masked linears, and this client's examples."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.attest import measure_folder
from cloister.wire import AdmitAnswer, enc

if TYPE_CHECKING:
    import socket

    from cloister.adapters import AdapterState
    from cloister.federation import EnclaveClientPlan, EnclaveServerPlan, MaskPlan
    from cloister.offload import OffloadSession
    from cloister.slicing import BackboneInfo, WholeSide
    from cloister.train import StepInfo


_TOKENIZER_FILES = ("added_tokens", "merges", "sentencepiece", "special_tokens", "spiece", "tokenizer", "vocab")


def starting_adapter(plan: EnclaveServerPlan) -> tuple[AdapterState, dict[str, bytes]]:
    """The adapter before the first round, as every client draws it too, and what the clients must have loaded.

    The backbone is loaded once for its shapes and let go again.
    """
    from cloister.adapters import adapter_state

    side, _ = _whole_side(plan)
    start = adapter_state(side.peft)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return start, _digests(Path(plan.model_path), start.spec.digest)


class MaskedModel:
    """A `LocalModel`: the backbone in this enclave, its frozen linears on the accelerator.

    Args:
        port: where the accelerator connects; this object's from now on.
        emit: tells this institution's own people.
        with_data: False for answering questions only.
    """

    def __init__(
        self, plan: EnclaveClientPlan, port: socket.socket, *, emit: Callable[..., None], with_data: bool = True
    ) -> None:
        from cloister.slicing import load_tokenizer, offload_model
        from cloister.train import LocalTraining, token_features

        self._plan = plan
        self._emit = emit
        self._stop = threading.Event()
        self._progress, self._round = (0, 0), 0
        self._side, self._info = _whole_side(plan)
        self._tokenizer = load_tokenizer(self._info)
        self._session = _open_session(plan.mask, port)
        self._offloaded = offload_model(self._side, self._session)
        self._training: LocalTraining | None = None
        if with_data:
            source, self._n_truncated = token_features(
                plan.name, plan.datasets, self._tokenizer, plan.task, model_max_length=self._max_length
            )
            self._training = LocalTraining(
                self._side, source, plan.train, plan.task,
                proximal_mu=plan.proximal_mu, dp=plan.dp_sgd, on_step=self._tell_step, stop=self._stop,
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"MaskedModel({self._plan.name!r}, n_products={len(self._offloaded.groups)})"

    @property
    def _max_length(self) -> int | None:
        taken = getattr(self._plan.adapter, "n_tokens", 0)  # a prefix takes part like tokens in front
        return self._info.max_length - taken if self._info.max_length else None

    def admission(self) -> AdmitAnswer:
        """See `LocalModel`."""
        training = self._trained()
        digests = _digests(Path(self._plan.model_path), training.spec.digest)
        return AdmitAnswer(**digests, n_train=training.n_examples("train"), n_test=training.n_examples("test"))

    def train(self, adapter: bytes, n_round: int) -> tuple[bytes, int, dict[str, Any]]:
        """See `LocalModel`."""
        self._progress, self._round = (0, 0), n_round
        found = self._trained().train(adapter, n_round)
        facts: dict[str, Any] = {
            "wall_s": round(found.wall_s, 3),
            "cpu_s": round(found.cpu_s, 3),
            "n_steps": len(found.losses),
            "offload": self.offload_facts(),
        }
        if self._tells_losses:
            facts["loss"] = round(sum(found.losses) / max(1, len(found.losses)), 6)
        return found.update, found.n_examples, facts

    def epsilon(self, n_rounds: int) -> float | None:
        """See `LocalModel`."""
        return self._trained().epsilon(n_rounds)

    def evaluate(self, adapter: bytes) -> tuple[int, dict[str, Any]]:
        """See `LocalModel`."""
        self._progress = (0, 0)
        sums = self._trained().evaluate(adapter)
        told = {**asdict(sums), "pairs": [list(pair) for pair in sums.pairs]} if sums else None
        facts = {"sums": told, "n_truncated": self._n_truncated, "offload": self.offload_facts()}
        return (sums.n if sums else 0), facts

    def answer(self, adapter: bytes, texts: list[Any], max_new_tokens: int) -> list[dict[str, Any]]:
        """This client's own questions, answered in its own enclave. *Secret*: for this client's people."""
        from cloister.adapters import AdapterState, adapter_spec, load_adapter_state
        from cloister.train import complete, predict, question_features

        peft: Any = self._side.peft
        load_adapter_state(peft, AdapterState.parse(adapter, adapter_spec(peft)))
        far: Any = self._side
        options = {"model_max_length": self._max_length}
        if self._plan.task.name == "causal-lm":
            return [complete(far, text, self._tokenizer, self._plan.task, max_new_tokens, **options) for text in texts]
        found = predict(far, question_features(texts, self._tokenizer, self._plan.task, **options), self._plan.task)
        return [{"probabilities": [float(p) for p in row]} for row in found]

    def save(self, adapter: bytes, folder: Path) -> None:
        """See `LocalModel`."""
        from cloister.adapters import AdapterState
        from cloister.train import save_peft

        state = AdapterState.parse(adapter, self._trained().spec)
        save_peft(state, folder, base_model=Path(self._plan.model_path).name)

    def progress(self) -> tuple[int, int]:
        """See `LocalModel`."""
        return self._progress

    def stop(self) -> None:
        """See `LocalModel`."""
        self._stop.set()

    def close(self) -> None:
        """Destroys every pad key."""
        self._session.close()

    def offload_facts(self) -> dict[str, Any]:
        """What a report says of the masked layers. *Public*."""
        told = self._session.describe()
        layers = told.pop("layers")
        return {**told, "n_products": len(layers), "n_weights_outside": self._offloaded.n_offloaded,
                "n_weights_inside": self._offloaded.n_inside}  # fmt: skip

    def _trained(self) -> Any:
        if self._training is None:
            raise RuntimeError("this model was opened without data")
        return self._training

    @property
    def _tells_losses(self) -> bool:
        """Epsilon says nothing of the losses of training examples, so with DP-SGD they stay here."""
        return self._plan.live_metrics and self._plan.dp_sgd is None

    def _tell_step(self, info: StepInfo) -> None:
        self._progress = (info.step, info.n_steps)
        fields: dict[str, Any] = {"round": self._round, "step": info.step, "n_steps": info.n_steps, "epoch": info.epoch}
        if self._tells_losses:
            fields |= {"loss": round(info.loss, 5), "lr": info.lr}
        rate = round(info.examples_per_s, 1)
        self._emit("step", **fields, model=f"client/{self._plan.name}", examples_per_s=rate)


def _whole_side(plan: EnclaveServerPlan | EnclaveClientPlan) -> tuple[WholeSide, BackboneInfo]:
    from cloister.adapters import attach_adapter
    from cloister.slicing import WholeSide, inspect_backbone, load_whole

    info, task = inspect_backbone(plan.model_path), plan.task
    model = load_whole(info, task=task.name, n_labels=len(task.labels) or None)
    peft = attach_adapter(model, plan.adapter, seed=plan.train.seed)
    return WholeSide(peft, info, task=task.name, pooling=task.pooling), info


def _digests(folder: Path, adapter: bytes) -> dict[str, bytes]:
    tokenizer = hashlib.sha384()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_TOKENIZER_FILES):
            tokenizer.update(enc(path.name.encode(), path.read_bytes()))
    return {
        "tokenizer_sha384": tokenizer.digest(),
        "backbone_sha384": measure_folder(folder),
        "adapter_sha384": adapter,
    }


def _open_session(mask: MaskPlan, port: socket.socket) -> OffloadSession:
    from cloister.offload import AwaitedAccelerator, OffloadSession
    from cloister.pad import PadPool
    from cloister.ring import FORMATS

    return OffloadSession(
        AwaitedAccelerator(port),
        FORMATS[mask.ring],
        pad=mask.pad,
        pool=PadPool(mask.pool_bytes),
        bucket=mask.bucket,
    )
