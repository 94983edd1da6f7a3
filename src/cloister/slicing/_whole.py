"""A whole backbone with its adapter, as a client's enclave runs it (Method 1): token ids in, logits out.

It looks to training and evaluation like a `FarSide` that is cut before the first block and embeds its own tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cloister.errors import ModelError
from cloister.offload import only_real_rows
from cloister.slicing._backbone import BackboneInfo, first_line, load_config, local_folder
from cloister.slicing._families import FAMILIES
from cloister.slicing._far import Pooling, Task, pool

_HEADS = ("classifier", "score")  # a new head, drawn by the adapter from its own seed
_UNUSED = ("pooler",)  # BERT's, which sentence encoders leave untrained and nothing here reads


def load_whole(info: BackboneInfo, *, task: Task, n_labels: int | None = None) -> PreTrainedModel:
    """Load a backbone with all of its blocks, frozen, in float32, for `attach_adapter`. *Public* weights.

    Raises:
        ModelError: the weights do not load or lack a tensor, or the backbone cannot do the task.
    """
    if task == "causal-lm" and info.is_encoder:
        raise ModelError(
            f"{info.path} is an encoder, which cannot do causal-lm",
            path=info.path,
            hint="use a decoder, or the task sequence-classification",
        )
    folder = local_folder(info)
    config: Any = load_config(folder, info.path)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # the fused kernels cannot cap attention logits
    if n_labels is not None:
        config.num_labels = n_labels
    kind: Any = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # it would warn of the new head
    transformers_logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the weights of {info.path} do not load: {first_line(error)}", path=info.path) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    known = (*_HEADS, *_UNUSED)
    if lacking := [name for name in report["missing_keys"] if not any(part in known for part in name.split("."))]:
        raise ModelError(
            f"the weights of {info.path} have no {sorted(lacking)[0]}",
            path=info.path,
            hint="the checkpoint is of another architecture than its config.json says",
        )
    if getattr(model.base_model, "pooler", None) is not None:
        model.base_model.pooler = None  # it would be computed, masked even, for nobody
    return model.requires_grad_(requires_grad=False).eval()


class WholeSide(nn.Module):
    """A model with an adapter, whose parts training and evaluation ask for by the names of `FarSide`.

    Everything that goes in or out, and what trains, is *secret*: it is for the client's own enclave.

    Args:
        peft: from `attach_adapter` over `load_whole`.
        info: of the backbone.
        pooling: what a classification head reads.

    Attributes:
        blocks: all transformer blocks.
        head: the language-model head, or the linear classification head.
        cut_layer: 0, nothing is left to a near side.
    """

    def __init__(self, peft: nn.Module, info: BackboneInfo, *, task: Task, pooling: Pooling = "mean") -> None:
        super().__init__()
        self.peft = peft
        self.info = info
        self.task: Task = task
        self.pooling: Pooling = pooling
        self.cut_layer = 0
        model = cast("PreTrainedModel", cast("Any", peft).get_base_model())
        self._parts: dict[str, Any] = {  # not registered twice: `peft` owns them
            "transformer": model.base_model if model.base_model is not model else model,
            "model": model,
        }
        self._cap = getattr(model.config, "final_logit_softcapping", None)
        config = cast("Any", peft).peft_config["default"]
        self._n_prefix = int(config.num_virtual_tokens) if config.is_prompt_learning else 0

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks of the backbone."""
        return cast("nn.ModuleList", self._parts["transformer"].get_submodule(FAMILIES[self.info.family].blocks))

    def head(self, features: Float[Tensor, "... features"]) -> Float[Tensor, "... out"]:
        """Logits of what `features` or `pooled` gave."""
        logits = self._head()(features)
        return torch.tanh(logits / self._cap) * self._cap if self._cap and self.task == "causal-lm" else logits

    def _head(self) -> nn.Module:
        """Looked up each time: it may have been replaced by a masked one."""
        model: PreTrainedModel = self._parts["model"]
        if self.task == "causal-lm":
            return model.get_submodule(FAMILIES[self.info.family].head)
        return next(module for name in _HEADS if (module := getattr(model, name, None)) is not None)

    def forward(
        self, ids: Int[Tensor, "batch tokens ..."], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens vocab"] | Float[Tensor, "batch labels"]:
        """Logits: one row per token for causal-lm, one per text for classification.

        Args:
            ids: *secret*; token ids, or ids and token types side by side, padded on the right.
            attention_mask: 1 at real tokens, 0 at padding.
        """
        if self.task == "causal-lm":
            return self.head(self.features(ids, attention_mask))
        return self.head(self.pooled(ids, attention_mask))

    def features(
        self, ids: Int[Tensor, "batch tokens ..."], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens features"]:
        """What the language-model head reads, for every token. *Secret*. Masked layers leave padding out."""
        options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        if ids.dim() == 3:
            ids, options["token_type_ids"] = ids.unbind(dim=-1)
        if self._n_prefix:
            options["past_key_values"] = cast("Any", self.peft).get_prompt(batch_size=len(ids))
            ones = attention_mask.new_ones(len(ids), self._n_prefix)
            options["attention_mask"] = torch.cat((ones, attention_mask), dim=1)
        with only_real_rows(attention_mask):  # what stands at padding is never attended to, nor pooled
            return self._parts["transformer"](input_ids=ids, **options).last_hidden_state

    def pooled(
        self, ids: Int[Tensor, "batch tokens ..."], attention_mask: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch features"]:
        """One vector per text, which the classification head reads. *Secret*."""
        return pool(self.features(ids, attention_mask), attention_mask, self.pooling)
