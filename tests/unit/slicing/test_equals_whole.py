"""Near then far is the whole model: forwards, for the far side's gradients, with padding, for both tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from cloister.slicing import FAMILIES, BackboneInfo, FarSide, load_far, load_near, pool

CUTS = (0, 1, 2, 3)
# The same kernels on the same numbers in the same order: there is nothing to allow for but a change of kernel.
TOLERANCE = 1e-6


def whole_model(info: BackboneInfo, task: str) -> PreTrainedModel:
    auto = AutoModelForCausalLM if task == "causal-lm" else AutoModel
    return auto.from_pretrained(info.path).eval()


def whole_logits(model: PreTrainedModel, far: FarSide, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    out = model(input_ids=input_ids, attention_mask=attention_mask)
    if far.task == "causal-lm":
        return out.logits
    # The oracle is written out, not shared with the code under test.
    last = out.last_hidden_state
    rows = []
    for features, mask in zip(last, attention_mask.bool(), strict=True):
        real = features[mask]
        rows.append({"mean": real.mean(dim=0), "cls": real[0], "last": real[-1]}[far.pooling])
    return far.head(torch.stack(rows))


def skip_encoder_lm(info: BackboneInfo, task: str) -> None:
    if task == "causal-lm" and info.is_encoder:
        pytest.skip("an encoder has no causal-lm")


@pytest.mark.parametrize("cut", CUTS)
def test_causal_lm_forward(info: BackboneInfo, batch: tuple[Tensor, Tensor], cut: int) -> None:
    skip_encoder_lm(info, "causal-lm")
    near, far = load_near(info, cut), load_far(info, cut, task="causal-lm")
    with torch.no_grad():
        expected = whole_logits(whole_model(info, "causal-lm"), far, *batch)
        found = far(near(*batch), batch[1])
    real = batch[1].bool()
    assert found.shape == (3, 17, info.vocab_size)
    torch.testing.assert_close(found[real], expected[real], atol=TOLERANCE, rtol=0)


def test_classification_forward(info: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    model = whole_model(info, "sequence-classification")
    for cut in CUTS:
        near = load_near(info, cut)
        far = load_far(info, cut, task="sequence-classification", n_labels=5, seed=3)
        for pooling in ("mean", "cls", "last"):
            far.pooling = pooling
            with torch.no_grad():
                expected = whole_logits(model, far, *batch)
                found = far(near(*batch), batch[1])
            assert found.shape == (3, 5)
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("cut", [0, 2])
def test_far_gradients(info: BackboneInfo, batch: tuple[Tensor, Tensor], task: str, cut: int) -> None:
    skip_encoder_lm(info, task)
    input_ids, attention_mask = batch
    near = load_near(info, cut)
    far = load_far(info, cut, task=task, n_labels=5).requires_grad_(True)
    model = whole_model(info, task).requires_grad_(True)
    with torch.no_grad():
        hidden = near(input_ids, attention_mask)

    def loss(logits: Tensor) -> Tensor:
        if task == "causal-lm":
            wanted = attention_mask[:, 1:].bool()
            return cross_entropy(logits[:, :-1][wanted], input_ids[:, 1:][wanted])
        return cross_entropy(logits, torch.tensor([0, 3, 1]))

    loss(far(hidden, attention_mask)).backward()
    if task == "sequence-classification":  # this head is in both
        head_gradients = [p.grad for p in far.head.parameters()]
        far.head.zero_grad(set_to_none=True)
    loss(whole_logits(model, far, input_ids, attention_mask)).backward()
    if task == "sequence-classification":
        expected = [p.grad for p in far.head.parameters()]
        torch.testing.assert_close(head_gradients, expected, atol=TOLERANCE, rtol=1e-5)

    n_compared = 0
    for mine, theirs in upper_parts(info, far, model, cut):
        for name, parameter in mine.named_parameters():
            other = theirs.get_parameter(name)
            assert parameter.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(parameter.grad, other.grad, atol=TOLERANCE, rtol=1e-5)
            n_compared += 1
    assert n_compared >= 6 * (info.n_layers - cut)


def upper_parts(
    info: BackboneInfo, far: FarSide, model: PreTrainedModel, cut: int
) -> list[tuple[nn.Module, nn.Module]]:
    family = FAMILIES[info.family]
    parts: list[tuple[nn.Module, nn.Module]] = []
    parts += zip(far.blocks, model.base_model.get_submodule(family.blocks)[cut:], strict=True)
    if family.norm:
        parts.append((far.norm, model.base_model.get_submodule(family.norm)))
    # A tied head's weight also collects the embedding's gradient in the whole model: there is nothing to compare with.
    if far.task == "causal-lm" and not model.config.tie_word_embeddings:
        parts.append((far.head, model.get_submodule(family.head)))
    return parts


def test_padding_is_never_read(info: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    """Padding is dropped before it crosses, so the far side sees other numbers there than the whole model did."""
    input_ids, attention_mask = batch
    near = load_near(info, 2)
    far = load_far(info, 2, task="sequence-classification", n_labels=2, pooling="mean")
    with torch.no_grad():
        hidden = near(input_ids, attention_mask)
        expected = far(hidden, attention_mask)
        for filler in (0.0, 1e3):
            other = torch.where(attention_mask.bool()[..., None], hidden, torch.tensor(filler))
            torch.testing.assert_close(far(other, attention_mask), expected, atol=TOLERANCE, rtol=0)


def test_a_text_alone_equals_the_text_in_a_batch(info: BackboneInfo, batch: tuple[Tensor, Tensor]) -> None:
    """Other padding means other kernels, so this one has float noise."""
    input_ids, attention_mask = batch
    near, far = load_near(info, 2), load_far(info, 2, task="sequence-classification", n_labels=2)
    with torch.no_grad():
        together = far(near(input_ids, attention_mask), attention_mask)
        for i, n in enumerate(attention_mask.sum(dim=1).tolist()):
            mask = attention_mask[i : i + 1, :n]
            alone = far(near(input_ids[i : i + 1, :n], mask), mask)
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


def test_pair_of_texts_on_bert(tiny_folders: dict, batch: tuple[Tensor, Tensor]) -> None:
    from cloister.slicing import inspect_backbone

    info = inspect_backbone(tiny_folders["bert-encoder"])
    input_ids, attention_mask = batch
    token_type_ids = torch.zeros_like(input_ids)
    token_type_ids[:, 2:] = 1
    model = whole_model(info, "sequence-classification")
    near, far = load_near(info, 1), load_far(info, 1, task="sequence-classification", n_labels=2)
    with torch.no_grad():
        whole = model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        found = far.features(near(input_ids, attention_mask, token_type_ids), attention_mask)
        other = far.features(near(input_ids, attention_mask), attention_mask)
    real = attention_mask.bool()
    torch.testing.assert_close(found[real], whole.last_hidden_state[real], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(other[real], found[real], atol=1e-3)


def test_pool_leaves_padding_out() -> None:
    features = torch.tensor([[[1.0], [3.0], [99.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(features, mask, "mean").tolist() == [[2.0], [4.0]]
    assert pool(features, mask, "cls").tolist() == [[1.0], [2.0]]
    assert pool(features, mask, "last").tolist() == [[3.0], [6.0]]
    with pytest.raises(ValueError, match="max"):
        pool(features, mask, "max")  # type: ignore[arg-type]
