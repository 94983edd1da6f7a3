"""Whole tiny models of every family, for both tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from cloister.testing import TINY_FAMILIES, write_tiny_model

CASES = tuple(
    f"{family}-{task}"
    for family in (*TINY_FAMILIES, "bert_decoder")
    for task in ("causal-lm", "sequence-classification")
    if (family, task) != ("bert", "causal-lm")
)


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def whole_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("whole")
    found = {family: write_tiny_model(root / family, family, n_layers=3) for family in TINY_FAMILIES}
    found["bert_decoder"] = write_tiny_model(root / "bert_decoder", "bert", n_layers=3, decoder=True)
    return found


Load = Callable[[str], Any]


@pytest.fixture
def load(whole_folders: dict[str, Path]) -> Load:
    """A fresh model of a case; the head of a classifier is the same each time."""

    def fresh(case: str) -> Any:
        family, _, task = case.partition("-")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if task == "causal-lm":
                return AutoModelForCausalLM.from_pretrained(whole_folders[family])
            return AutoModelForSequenceClassification.from_pretrained(whole_folders[family], num_labels=3)

    return fresh


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def batch() -> dict[str, torch.Tensor]:
    """Two texts of 9 and 5 tokens."""
    ids = torch.randint(5, 261, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def disturb(model: Any, seed: int = 3) -> None:
    """Moves everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
