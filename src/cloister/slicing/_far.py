"""The far side: late blocks, final norm and head, inside the server enclave."""

from __future__ import annotations

from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cloister.adapters import SpfLinear
from cloister.errors import ModelError
from cloister.slicing._backbone import BackboneInfo, resolve_cut
from cloister.slicing._blocks import BlockRunner, check_batch, take_blocks
from cloister.slicing._families import FAMILIES
from cloister.slicing._weights import Skeleton

Task = Literal["causal-lm", "sequence-classification"]
Pooling = Literal["mean", "cls", "last"]

_HEAD_STD = 0.02  # as transformers initialises classification heads (`initializer_range` of BERT and GPT-2)


class FarSide(nn.Module):
    """Blocks [`cut_layer`, L), final norm and head of a backbone: the boundary tensor goes in, logits come out.

    Input, output and, once tuned, weights are *secret* and stay in the server enclave. Everything but a new
    classification head starts frozen; an adapter decides what trains.

    Attributes:
        blocks: the far-side blocks, numbered from 0.
        norm: the final norm; the identity for BERT.
        head: the language-model head, or the linear classification head.
        is_bf16: whether it computes in bfloat16; see `compute_in_bf16`.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        info: BackboneInfo,
        cut_layer: int,
        *,
        task: Task,
        n_labels: int | None = None,
        pooling: Pooling = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if task == "causal-lm" and info.is_encoder:
            raise ModelError(
                f"{info.path} is an encoder, which cannot do causal-lm",
                path=info.path,
                hint="use a decoder, or the task sequence-classification",
            )
        self.info = info
        self.task: Task = task
        self.pooling: Pooling = pooling
        self.cut_layer = resolve_cut(info, cut_layer)
        self.is_bf16 = False
        skeleton = Skeleton(info, with_head=task == "causal-lm")
        family = FAMILIES[info.family]
        self.blocks, self.rotary = take_blocks(skeleton, self.cut_layer, info.n_layers, dtype=torch.float32)
        self._runner = BlockRunner(skeleton.config, self.cut_layer, info.n_layers)
        self.norm = nn.Identity()
        if family.norm:
            self.norm = skeleton.base.get_submodule(family.norm)
            skeleton.take(self.norm, dtype=torch.float32)
        if task == "causal-lm":
            self.head = _language_head(skeleton, family.head)
        else:
            self.head = _classification_head(info.hidden_size, n_labels, seed)
        self.eval()

    def forward(
        self, hidden: Float[Tensor, "batch tokens features"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens vocab"] | Float[Tensor, "batch labels"]:
        """Logits: one row per token for causal-lm, one per text for classification.

        Args:
            hidden: secret; boundary tensors, padded on the right with anything finite.
            attention_mask: 1 at real tokens, 0 at padding.

        Raises:
            ValueError: padding is not on the right, or shapes differ.
        """
        if self.task == "causal-lm":
            return self.head(self.features(hidden, attention_mask))
        return self.head(self.pooled(hidden, attention_mask))

    def only_blocks(
        self, hidden: Float[Tensor, "batch tokens features"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens features"]:
        """The last block's output, before the final norm. Secret."""
        check_batch(hidden, attention_mask)
        if not self.is_bf16:
            return self._runner.run(self.blocks, self.rotary, hidden, attention_mask)
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
            return self._runner.run(self.blocks, self.rotary, hidden, attention_mask).float()

    def features(
        self, hidden: Float[Tensor, "batch tokens features"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens features"]:
        """What the head reads, for every token: `head(features(...))` is `forward` for causal-lm. Secret.

        A trainer may select the tokens that carry loss before it applies the head, which is most of the cost where
        the vocabulary is large.
        """
        return self.norm(self.only_blocks(hidden, attention_mask))

    def pooled(
        self, hidden: Float[Tensor, "batch tokens features"], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch features"]:
        """One vector per text, which the classification head reads. Secret."""
        return pool(self.features(hidden, attention_mask), attention_mask, self.pooling)

    def compute_in_bf16(self) -> None:
        """From now on the blocks and a language-model head multiply in bfloat16; there is no way back.

        Frozen matrices are rounded to bfloat16 and stored so; an adapter must be attached before. In float32 stay what
        trains, biases, norms, the sum of each residual connection, the inside of a softmax, pooling, a classification
        head, and everything that is returned.
        """
        if self.is_bf16:
            return
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1 and not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        for module in self.blocks.modules():
            if isinstance(module, SpfLinear):
                module.round_frozen(torch.bfloat16)
        for linear in self.head.modules():
            if isinstance(linear, nn.Linear) and not linear.weight.requires_grad:
                _multiply_in_bf16(linear)
        self.is_bf16 = True


def load_far(
    info: BackboneInfo,
    cut_layer: int,
    *,
    task: Task,
    n_labels: int | None = None,
    pooling: Pooling = "mean",
    seed: int = 0,
) -> FarSide:
    """Load the far side of a backbone; the near side's weights are not read (but for a tied head's embedding).

    Args:
        info: from `inspect_backbone`.
        cut_layer: number of near-side blocks, from `resolve_cut`.
        task: what the head does.
        n_labels: classes of the classification head.
        pooling: what the classification head reads: the mean over real tokens, the first or the last of them.
        seed: of the new classification head; the same seed gives the same head on every machine.

    Raises:
        ModelError: the weights do not load, the cut is outside the layers, or the backbone cannot do the task.
    """
    return FarSide(info, cut_layer, task=task, n_labels=n_labels, pooling=pooling, seed=seed)


def pool(
    features: Float[Tensor, "batch tokens features"], attention_mask: Int[Tensor, "batch tokens"], pooling: Pooling
) -> Float[Tensor, "batch features"]:
    """One vector per text out of its tokens' features; padding is left out."""
    if pooling == "cls":
        return features[:, 0]
    lengths = attention_mask.sum(dim=1)
    if pooling == "last":
        return features[torch.arange(len(features), device=features.device), lengths - 1]
    if pooling == "mean":
        weights = attention_mask.to(features.dtype)[..., None]
        return (features * weights).sum(dim=1) / lengths[:, None].to(features.dtype)
    raise ValueError(f"pooling {pooling!r} is not mean, cls or last")


def _multiply_in_bf16(linear: nn.Linear) -> None:
    """Outside of autocast: what goes in is rounded, what comes out is float32."""
    linear.to(torch.bfloat16)
    linear.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16),))
    linear.register_forward_hook(lambda *given: given[-1].float())


class _CappedHead(nn.Module):
    """Gemma's head: logits are squeezed into (-cap, cap) by a hyperbolic tangent."""

    def __init__(self, linear: nn.Module, cap: float) -> None:
        super().__init__()
        self.linear = linear
        self.cap = cap

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.linear(features) / self.cap) * self.cap


def _language_head(skeleton: Skeleton, path: str) -> nn.Module:
    head = skeleton.model.get_submodule(path)
    if skeleton.info.family == "bert":
        # The same tensor as the decoder's bias under its older name; nothing reads it here.
        del cast("nn.Module", head.predictions).bias
    skeleton.take(head, dtype=torch.float32)
    cap = getattr(skeleton.config, "final_logit_softcapping", None)
    return _CappedHead(head, cap) if cap else head


def _classification_head(hidden_size: int, n_labels: int | None, seed: int) -> nn.Linear:
    if n_labels is None or n_labels < 2:
        raise ModelError(f"a classification head needs at least two labels, not {n_labels}")
    generator = torch.Generator().manual_seed(seed)
    head = cast("nn.Linear", nn.utils.skip_init(nn.Linear, hidden_size, n_labels))  # leaves the global generator alone
    nn.init.normal_(head.weight, std=_HEAD_STD, generator=generator)
    nn.init.zeros_(head.bias)
    return head
