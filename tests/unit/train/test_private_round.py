"""A client's round by DP-SGD: the mean of clipped gradients, over masked layers too; every step taken; nothing left."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cloister.adapters import AdapterSpec, AdapterUpdate, LoraSpec, PrefixSpec, adapter_state, attach_adapter
from cloister.errors import AdapterError, ConfigError, FederationError, UnsupportedLayerError
from cloister.offload import OffloadSession
from cloister.ring import FAITHFUL
from cloister.slicing import WholeSide, inspect_backbone, load_whole, offload_model
from cloister.testing import FakeAccelerator, write_tiny_model
from cloister.train import (
    DpSgdSpec,
    Feature,
    LocalTraining,
    MemoryFeatures,
    StepInfo,
    TaskSpec,
    TrainSpec,
    gaussian_epsilon,
)
from cloister.train import _dp_sgd as dp_sgd
from cloister.train import _private_round as module
from cloister.train._loss import backward, n_targets

DP = DpSgdSpec(noise_multiplier=1.0, max_grad_norm=0.05, delta=1e-5)
N = 6
LENGTHS = (3, 9, 5, 1, 7, 4)
CASES: dict[str, tuple[str, TaskSpec, AdapterSpec]] = {
    "lora": ("bert", TaskSpec("sequence-classification", ("a", "b", "c")), LoraSpec(r=2)),
    "ffa-lora": ("bert", TaskSpec("sequence-classification", ("a", "b", "c")), LoraSpec(r=2, freeze_a=True)),
    "prefix": ("llama", TaskSpec("sequence-classification", ("a", "b", "c"), pooling="last"), PrefixSpec(3)),
    "causal": ("llama", TaskSpec("causal-lm"), LoraSpec(r=2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: write_tiny_model(root / family, family, n_layers=2) for family in ("bert", "llama")}


def source_of(task: TaskSpec) -> MemoryFeatures:
    generator = torch.Generator().manual_seed(3)
    features = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(5, 261, (length,), generator=generator)
        if task.labels:
            features.append(Feature(i, ids, label=i % 3))
        else:  # the first half is a prompt; the example of one token has nothing to predict
            features.append(Feature(i, ids, labels=torch.where(torch.arange(length) < length // 2, -100, ids)))
    return MemoryFeatures({"north": {"train": features, "test": features[:2]}})


class Party:
    """A side with its adapter, over masked layers or not, and the client's examples."""

    def __init__(self, folders: dict[str, Path], case: str, *, session: OffloadSession | None = None, **more: Any):
        family, self.task, spec = CASES[case]
        spec = LoraSpec(**{**vars(spec), **more}) if more else spec
        info = inspect_backbone(folders[family])
        model = load_whole(info, task=self.task.name, n_labels=len(self.task.labels) or None)
        self.side = WholeSide(attach_adapter(model, spec, seed=1), info, task=self.task.name, pooling=self.task.pooling)
        if session is not None:
            offload_model(self.side, session)
        self.source = source_of(self.task)
        self.start = adapter_state(self.side.peft)  # type: ignore[arg-type]

    def spec(self, **changes: Any) -> TrainSpec:
        given: dict[str, Any] = {"epochs": 1, "batch_size": N, "lr": 1.0, "weight_decay": 0.0, "warmup_ratio": 0.0,
                                 "schedule": "constant"}  # fmt: skip
        return TrainSpec(**{**given, **changes})

    def training(self, dp: DpSgdSpec = DP, **changes: Any) -> LocalTraining:
        options = {key: changes.pop(key) for key in ("proximal_mu", "on_step", "stop") if key in changes}
        return LocalTraining(self.side, self.source, self.spec(**changes), self.task, dp=dp, **options)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.side.named_parameters() if p.requires_grad}


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """And everybody in every batch."""
    monkeypatch.setattr(dp_sgd, "noised", lambda steps, sigma: steps * (sigma / 2**30))
    monkeypatch.setattr(dp_sgd, "poisson_draw", lambda n, rate: np.arange(n))


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_adamw", lambda trained, spec: torch.optim.SGD(trained, lr=spec.lr))


@pytest.fixture
def session() -> Iterator[OffloadSession]:
    with OffloadSession(FakeAccelerator(), FAITHFUL, bucket=4) as made:
        yield made


def clipped_mean(party: Party) -> dict[str, torch.Tensor]:
    """The oracle: example by example."""
    total = {name: torch.zeros_like(p) for name, p in party.trained().items()}
    party.side.eval()
    for key in party.source.split("train"):
        feature = party.source.get(key)
        party.side.zero_grad()
        if not n_targets(feature):
            continue
        backward(party.side, [feature], [1 / n_targets(feature)])  # type: ignore[arg-type]
        grads = {name: p.grad for name, p in party.trained().items()}
        norm = torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm()
        for name, grad in grads.items():
            total[name] += 0 if grad is None else grad * min(1.0, DP.max_grad_norm / (float(norm) + 1e-6))
    party.side.zero_grad(set_to_none=True)
    return {name: tensor / N for name, tensor in total.items()}


@pytest.mark.usefixtures("no_noise", "sgd")
@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_mean_of_clipped_gradients(
    folders: dict[str, Path], case: str, is_masked: bool, session: OffloadSession
) -> None:
    party = Party(folders, case, session=session if is_masked else None)
    expected = clipped_mean(party)
    before = {name: p.detach().clone() for name, p in party.trained().items()}
    done = party.training().train(party.start.to_bytes(), 1)
    assert len(done.losses) == 1 and done.losses[0] > 0 and done.n_examples == N
    for name, p in party.trained().items():
        torch.testing.assert_close(before[name] - p.detach(), expected[name], atol=2e-5, rtol=2e-3)


@pytest.mark.usefixtures("no_noise")
def test_nothing_of_opacus_is_left(folders: dict[str, Path]) -> None:
    party = Party(folders, "lora")
    training = party.training(max_steps=2, epochs=4, lr=0.01)
    first = training.train(party.start.to_bytes(), 1)
    assert not any(module.training for module in party.side.modules())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in party.side.parameters())
    hooked = [m for m in party.side.modules() if m._forward_hooks or m._backward_hooks]
    assert hooked == []
    evaluated = training.evaluate(party.start.to_bytes())
    assert evaluated is not None and evaluated.n == 2
    again = training.train(party.start.to_bytes(), 2)
    assert again.update == first.update and len(again.losses) == 2


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_every_round_is_another_and_no_seed_says_which(folders: dict[str, Path]) -> None:
    party = Party(folders, "lora")
    training = party.training(batch_size=2, lr=0.01)
    state = torch.get_rng_state()
    updates = {training.train(party.start.to_bytes(), 1).update for _ in range(3)}
    assert len(updates) == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize(("dropout", "n_different"), [(0.0, 1), (0.5, 3)], ids=["none", "the adapter's"])
def test_dropout_is_the_adapters_alone_and_nobody_can_know_it(
    folders: dict[str, Path], dropout: float, n_different: int
) -> None:
    """The tiny encoder has dropout of its own, as pretrained ones do."""
    party = Party(folders, "lora", dropout=dropout)
    assert party.side.info.family == "bert"
    training = party.training(max_steps=2, epochs=4, lr=0.01)
    assert len({training.train(party.start.to_bytes(), 1).update for _ in range(3)}) == n_different


def test_a_step_without_anybody_is_a_step(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "poisson_draw", lambda n, rate: np.arange(0))
    told: list[StepInfo] = []
    party = Party(folders, "lora")
    done = party.training(batch_size=2, lr=0.01, on_step=told.append).train(party.start.to_bytes(), 1)
    assert [(info.step, info.n_steps, info.n_tokens, info.loss) for info in told] == [
        (1, 3, 0, 0.0), (2, 3, 0, 0.0), (3, 3, 0, 0.0),
    ]  # fmt: skip
    assert AdapterUpdate.parse(done.update, party.start.spec).norm() > 0, "noise moves it all the same"


def test_steps_rates_and_draws_are_the_specs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def draw(n: int, rate: float) -> np.ndarray:
        rates.append(rate)
        return np.arange(2)

    monkeypatch.setattr(dp_sgd, "poisson_draw", draw)
    told: list[StepInfo] = []
    party = Party(folders, "lora")
    spec = {"batch_size": 4, "epochs": 2, "lr": 0.01, "schedule": "linear"}
    party.training(**spec, on_step=told.append).train(party.start.to_bytes(), 1)
    assert rates == [4 / N] * 4
    assert [info.lr for info in told] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [info.epoch for info in told] == [1, 1, 2, 2]
    assert all(info.n_tokens == LENGTHS[0] + LENGTHS[1] for info in told)


@pytest.mark.usefixtures("no_noise")
def test_examples_without_any_loss_take_part(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    party = Party(folders, "causal")
    monkeypatch.setattr(dp_sgd, "poisson_draw", lambda n, rate: np.array([3]))  # of one token
    done = party.training(lr=0.01).train(party.start.to_bytes(), 1)
    assert done.losses == (0.0,)


# --- epsilon ----------------------------------------------------------------------------------------------------------


def test_epsilon_is_of_all_rounds_together(folders: dict[str, Path]) -> None:
    training = Party(folders, "lora").training(batch_size=2, epochs=2)
    assert training.epsilon(0) == 0
    for n_rounds in (1, 3):
        expected = gaussian_epsilon(1.0, 6 * n_rounds, delta=1e-5, sample_rate=2 / N)
        assert training.epsilon(n_rounds) == pytest.approx(expected)
    whole = Party(folders, "lora").training(batch_size=100)  # larger than the data: everybody, one step
    assert whole.epsilon(1) == pytest.approx(gaussian_epsilon(1.0, 1, delta=1e-5))


def test_without_dp_sgd_there_is_none(folders: dict[str, Path]) -> None:
    party = Party(folders, "lora")
    assert LocalTraining(party.side, party.source, party.spec(), party.task).epsilon(3) is None


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_delta_that_says_nothing_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"training\.privacy\.delta: 0\.2 is not below 1/6") as caught:
        Party(folders, "lora").training(DpSgdSpec(1.0, 1.0, 0.2))
    assert caught.value.hint


def test_a_proximal_term_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="proximal"):
        Party(folders, "lora").training(proximal_mu=0.1)


@pytest.mark.parametrize("missing", ["opacus", "opendp"])
def test_without_the_extra_it_is_refused(
    folders: dict[str, Path], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = Party(folders, "lora")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=missing) as caught:
        party.training()
    assert "cloister[dp]" in caught.value.hint


def test_a_layer_that_mixes_examples_is_refused_at_the_start(folders: dict[str, Path]) -> None:
    party = Party(folders, "lora")
    party.side.extra = nn.BatchNorm1d(3)
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        party.training()


def test_a_loss_that_is_not_finite_ends_it_before_its_step(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backward", lambda *_: float("nan"))
    party = Party(folders, "lora")
    with pytest.raises(AdapterError, match="the loss is nan at step 1"):
        party.training(lr=0.01).train(party.start.to_bytes(), 1)
    assert adapter_state(party.side.peft).to_bytes() == party.start.to_bytes()  # type: ignore[arg-type]


def test_it_stops_after_a_step(folders: dict[str, Path]) -> None:
    stop, told = threading.Event(), []

    def on_step(info: StepInfo) -> None:
        told.append(info.step)
        stop.set()

    party = Party(folders, "lora")
    with pytest.raises(FederationError, match="stopped"):
        party.training(batch_size=2, lr=0.01, on_step=on_step, stop=stop).train(party.start.to_bytes(), 1)
    assert told == [1]
