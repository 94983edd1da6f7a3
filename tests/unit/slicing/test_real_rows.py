"""A whole backbone over masked layers gives the same logits and gradients whether padding is sent or not."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cloister.adapters import AdapterSpec, LoraSpec, PrefixSpec, attach_adapter
from cloister.offload import OffloadSession
from cloister.ring import FAITHFUL
from cloister.slicing import WholeSide, inspect_backbone, load_whole, offload_model
from cloister.slicing import _whole as whole_module
from cloister.testing import FakeAccelerator, write_tiny_model
from cloister.train._lora_kernel import accelerate_lora

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Of every way to attend: both directions, causal, learned positions, a sliding window, capped logits. LoRA as PEFT
# computes it, and as it is added into a masked layer's output.
CASES = [
    ("bert", "sequence-classification", LoraSpec(r=2), "peft"),
    ("bert", "sequence-classification", LoraSpec(r=2), "fused"),
    ("bert", "sequence-classification", PrefixSpec(3), "prefix"),
    ("llama", "causal-lm", LoraSpec(r=2), "peft"),
    ("llama", "causal-lm", LoraSpec(r=2), "fused"),
    ("llama", "sequence-classification", PrefixSpec(3), "prefix"),
    ("gpt2", "causal-lm", LoraSpec(r=2), "peft"),
    ("mistral", "sequence-classification", LoraSpec(r=2), "fused"),
    ("gemma2", "causal-lm", LoraSpec(r=2), "fused"),
]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Three texts of 1 to 11 tokens, the longest of them first, last or in the middle."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (3,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.randint(5, 261, mask.shape, generator=generator) * mask, mask


def step(side: WholeSide, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at real tokens, and the gradient of everything that trains."""
    side.zero_grad()
    logits = side(ids, mask)
    read = logits[mask.bool()] if logits.dim() == 3 else logits
    (read * torch.randn(read.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return read.detach(), {name: p.grad.clone() for name, p in side.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "task", "adapter", "kind"), CASES, ids=[f"{family}-{task}-{kind}" for family, task, _, kind in CASES]
)
def test_padding_changes_nothing(
    tmp_path: Path, family: str, task: str, adapter: AdapterSpec, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = inspect_backbone(write_tiny_model(tmp_path / "model", family, n_layers=2))
    model = load_whole(info, task=task, n_labels=None if task == "causal-lm" else 3)  # type: ignore[arg-type]
    side = WholeSide(attach_adapter(model, adapter, seed=0), info, task=task)  # type: ignore[arg-type]
    if isinstance(adapter, LoraSpec):
        with torch.no_grad():  # or B, which begins as zeros, would hide what A's product reads
            for name, parameter in side.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, FAITHFUL, bucket=4) as session:
        offload_model(side, session)
        if kind == "fused":
            accelerate_lora(side.blocks)
        for seed in range(3):
            ids, mask = batch(seed)
            accelerator.seen.clear()
            found, gradients = step(side, ids, mask)
            rows = {planes.shape[1] for layer, _, planes in accelerator.seen if "head" not in layer}
            assert rows == {-(-int(mask.sum()) // 4) * 4}
            with monkeypatch.context() as patch:
                patch.setattr(whole_module, "only_real_rows", lambda mask: nullcontext())
                expected, whole_gradients = step(side, ids, mask)
            assert torch.equal(found, expected)
            assert gradients.keys() == whole_gradients.keys() and gradients
            for name, gradient in gradients.items():
                assert torch.equal(gradient, whole_gradients[name]), name
