"""What may leave the enclave: adapter or merged weights, and nothing by default."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from cloister.adapters import LoraSpec, add_lora, trainable_state
from cloister.errors import ConfigError, StateMismatchError
from cloister.train import TrainSpec, export_far_state, export_release, import_far_state
from cloister.train._far import FarTrainer


def tuned(job, lora):
    far = job.far()
    FarTrainer(far, TrainSpec(max_steps=3, lr=5e-3), lora, job.task, job.source()).train()
    return far


def test_none_is_nothing_and_unknown_is_an_error(make_job, lora):
    far = make_job().far()
    assert export_release(far, "none") == b""
    with pytest.raises(ConfigError, match="not none, adapter or weights"):
        export_release(far, "everything")


def test_adapter_comes_back(make_job, lora):
    job = make_job()
    far = tuned(job, lora)
    blob = export_release(far, "adapter")
    assert blob == export_far_state(far)
    assert all("lora_" in name or name.startswith("head.") for name in load(blob))
    fresh = job.far()
    add_lora(fresh, lora, seed=5)
    import_far_state(fresh, blob)
    for name, tensor in trainable_state(far).items():
        assert torch.equal(tensor, trainable_state(fresh)[name])


def test_a_wrong_state_is_refused(make_job, lora):
    job = make_job()
    fresh = job.far()
    add_lora(fresh, LoraSpec(r=2), seed=0)
    with pytest.raises(StateMismatchError):
        import_far_state(fresh, export_far_state(tuned(job, lora)))
    with pytest.raises(StateMismatchError, match="not a safetensors file"):
        import_far_state(fresh, b"junk")


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm"), ("gpt2", "causal-lm")]
)
def test_merged_weights_are_a_far_side_without_adapter(make_job, lora, family, task):
    job = make_job(family, task)
    far = tuned(job, lora)
    merged = load(export_release(far, "weights"))
    assert not [name for name in merged if "lora" in name or "base_layer" in name]
    plain = job.far()
    left = plain.load_state_dict(merged, strict=False)
    assert not left.unexpected_keys
    feature = job.features("east", "test")[0]
    mask = torch.ones(1, len(feature.hidden), dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(feature.hidden[None], mask), far(feature.hidden[None], mask), rtol=1e-4, atol=1e-4
        )
    assert "adapter" not in str(left.missing_keys)
