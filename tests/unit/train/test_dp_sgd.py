"""DP-SGD: clipped example by example, noised, accounted; refused where a layer mixes examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from cloister.adapters import AdapterSpec, LoraSpec, PrefixSpec, attach_adapter
from cloister.errors import ConfigError, DataError, UnsupportedLayerError
from cloister.testing import write_tiny_model
from cloister.train import DpSgdSpec, make_private
from cloister.train import _dp_sgd as dp_sgd

# torch says so of every first layer with Opacus's hooks; its gradient samples are right, as the first test shows.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

SPEC = DpSgdSpec(noise_multiplier=1.0, max_grad_norm=0.1, delta=1e-5)

Example = dict[str, torch.Tensor]


def examples(n: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 261, (n, 7), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 3)}
        for i, row in enumerate(ids)
    ]


def loader(data: list[Example], batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


@pytest.fixture(scope="module", params=["llama", "bert", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Dropout would give the two ways of computing a gradient different masks.
    off = {"bert": ["hidden_dropout_prob", "attention_probs_dropout_prob"]}
    off["gpt2"] = ["resid_pdrop", "embd_pdrop", "attn_pdrop"]
    names = off.get(request.param, [])
    return write_tiny_model(
        tmp_path_factory.mktemp("tiny") / request.param, request.param, n_layers=2, **dict.fromkeys(names, 0.0)
    )


def attached(folder: Path, spec: AdapterSpec) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    return attach_adapter(model, spec, seed=1)


def loss_of(model: nn.Module, batch: Example) -> torch.Tensor:
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return cross_entropy(out.logits, batch["labels"])


def everyone(n: int, rate: float) -> np.ndarray:
    return np.arange(n)


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "noised", lambda steps, sigma: steps * (sigma / 2**30))


@pytest.mark.parametrize(
    "spec",
    [LoraSpec(r=2), PrefixSpec(3), PrefixSpec(3, projection=True, hidden_size=5)],
    ids=["lora", "prefix", "prefix-mlp"],
)
def test_a_step_is_the_mean_of_clipped_gradients(
    folder: Path, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent(monkeypatch)
    monkeypatch.setattr(dp_sgd, "poisson_draw", everyone)
    model, data = attached(folder, spec).train(), examples()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for example in data:
        model.zero_grad()
        loss_of(model, {name: tensor[None] for name, tensor in example.items()}).backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        for name, p in trained.items():
            total[name] += p.grad * min(1.0, SPEC.max_grad_norm / float(norm))
    model.zero_grad()
    private = make_private(model, sgd(model), loader(data, batch_size=len(data)), SPEC)
    for batch in private:
        private.optimizer.zero_grad()
        loss_of(private.module, batch).backward()
        private.optimizer.step()
    for name, p in trained.items():
        torch.testing.assert_close(before[name] - p.detach(), total[name] / len(data), atol=2e-6, rtol=1e-3)


@pytest.fixture
def linear() -> nn.Module:
    return nn.Linear(7, 3)


def test_noise_has_its_size_and_the_cost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "poisson_draw", lambda n, rate: np.arange(0))
    model = nn.Linear(100, 300)
    private = make_private(model, sgd(model), loader(examples(8), batch_size=4), SPEC)
    assert private.epsilon == 0
    before = model.weight.detach().clone()
    assert list(private) == []  # nobody is drawn: two steps of noise alone
    moved = before - model.weight.detach()
    assert moved.std() == pytest.approx(np.sqrt(2) * SPEC.noise_multiplier * SPEC.max_grad_norm / 4, rel=0.03)
    first = private.epsilon
    assert first > 0
    list(private)
    assert private.epsilon > first
    assert private.sample_rate == 0.5


def test_batches_come_of_the_draw(monkeypatch: pytest.MonkeyPatch, linear: nn.Module) -> None:
    draws = iter([np.array([3, 0]), np.array([5])])
    monkeypatch.setattr(dp_sgd, "poisson_draw", lambda n, rate: next(draws))
    data = examples(6)
    private = make_private(linear, sgd(linear), loader(data, batch_size=3), SPEC)
    batches = list(private)
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    assert torch.equal(batches[0]["input_ids"], torch.stack([data[3]["input_ids"], data[0]["input_ids"]]))


def test_a_draw_takes_each_by_itself() -> None:
    counts = np.array([len(dp_sgd.poisson_draw(1000, 0.25)) for _ in range(200)])
    assert counts.mean() == pytest.approx(250, abs=5)
    assert counts.std() == pytest.approx(np.sqrt(1000 * 0.25 * 0.75), rel=0.2)
    assert dp_sgd.poisson_draw(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert dp_sgd.poisson_draw(5, 0.0).tolist() == []


def test_gradients_that_were_not_cleared_are_refused_by_opacus(linear: nn.Module) -> None:
    private = make_private(linear, sgd(linear), loader(examples(4), batch_size=4), SPEC)
    private.module(torch.ones(4, 7)).sum().backward()
    private.optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        private.optimizer.step()


def test_a_layer_that_mixes_examples_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        make_private(model, sgd(model), loader(examples(4)), SPEC)


def test_statistics_that_a_frozen_layer_keeps_of_examples_are_refused_too() -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3).requires_grad_(False))
    with pytest.raises(UnsupportedLayerError, match="BatchNorm"):
        make_private(model, sgd(model), loader(examples(4)), SPEC)


def test_an_optimiser_that_misses_something_is_refused() -> None:
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="exactly what trains"):
        make_private(model, sgd(model[0]), loader(examples(4)), SPEC)


def test_no_examples_are_refused(linear: nn.Module) -> None:
    with pytest.raises(DataError, match="no examples"):
        make_private(linear, sgd(linear), DataLoader([], batch_sampler=[]), SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [(0, 1, 1e-5), (1, 0, 1e-5), (1, 1, 0), (1, 1, 1), (float("nan"), 1, 1e-5)], ids=str)
def test_a_senseless_spec_is_refused(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        DpSgdSpec(*wrong)
