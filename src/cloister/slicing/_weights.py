"""Loading one part of a backbone: only the tensors of that part are read and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cloister.errors import ModelError
from cloister.slicing._backbone import BackboneInfo, first_line, load_config, local_folder

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What checkpoints call a parameter that transformers has renamed since: BERT's norms (before 2019), GPT-NeoX's head.
_OLD_NAMES = {
    "LayerNorm.weight": "LayerNorm.gamma",
    "LayerNorm.bias": "LayerNorm.beta",
    "lm_head.weight": "embed_out.weight",
}


class TensorSource(Protocol):
    """Where the tensors of a checkpoint come from, by name."""

    def get(self, name: str) -> Tensor | None:
        """The tensor of this name in private memory, or None if the checkpoint has none."""
        ...


class SafetensorsSource:
    """Reads single tensors out of a folder's safetensors files.

    A tensor is copied out of the file's mapping: a file that changes later must not change the model.
    """

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        if (folder / _INDEX).is_file():
            weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {name: folder / file for name, file in weight_map.items()}
        elif (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), folder / _SINGLE)

    def get(self, name: str) -> Tensor | None:
        """See `TensorSource`."""
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name).clone()


class LoadedSource:
    """Holds a whole model that transformers loaded, for checkpoints whose tensors have other names or formats."""

    def __init__(self, model: PreTrainedModel, missing: frozenset[str]) -> None:
        self._state = model.state_dict()
        self._missing = missing

    def get(self, name: str) -> Tensor | None:
        """See `TensorSource`."""
        return None if name in self._missing else self._state.get(name)


class Skeleton:
    """A model without weights, out of which parts are taken and filled.

    Args:
        info: the backbone.
        with_head: whether the language-model head is wanted.
    """

    def __init__(self, info: BackboneInfo, *, with_head: bool) -> None:
        self.info = info
        self._folder = local_folder(info)
        self._class = AutoModelForCausalLM if with_head else AutoModel
        self.config = load_config(self._folder, info.path)
        if getattr(self.config, "attn_logit_softcapping", None):
            self.config._attn_implementation = "eager"  # the fused kernels cannot cap attention logits
        try:
            with torch.device("meta"):
                self.model: PreTrainedModel = self._class.from_config(self.config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"config.json of {info.path} is refused: {first_line(error)}", path=info.path) from error
        self.config = self.model.config
        self.base = cast("PreTrainedModel", self.model.base_model)
        self._sources = self._iter_sources()
        self._source: TensorSource | None = next(self._sources, None)

    def take(self, module: nn.Module, *, dtype: torch.dtype) -> None:
        """Fill a module of the skeleton with the backbone's weights, frozen, on the CPU.

        Raises:
            ModelError: the checkpoint lacks a tensor of it, or has it in another shape.
        """
        prefix = next(name for name, found in self.model.named_modules() if found is module)
        for path, owner in module.named_modules():
            for leaf, parameter in list(owner.named_parameters(recurse=False)):
                name = ".".join(part for part in (prefix, path, leaf) if part)
                tensor = self._find(name)
                if tensor.shape != parameter.shape:
                    raise ModelError(
                        f"{name} of {self.info.path} has shape {tuple(tensor.shape)}, "
                        f"its config.json says {tuple(parameter.shape)}",
                        path=self.info.path,
                    )
                setattr(owner, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))

    def _find(self, name: str) -> Tensor:
        while self._source is not None:
            for candidate in self._candidates(name):
                with self._naming_the_backbone():
                    tensor = self._source.get(candidate)
                if tensor is not None:
                    return tensor
            self._source = next(self._sources, None)
        raise ModelError(
            f"the weights of {self.info.path} have no {name}",
            path=self.info.path,
            hint="the checkpoint is of another architecture than its config.json says, or was saved without this part",
        )

    def _candidates(self, name: str) -> Iterator[str]:
        """The names under which checkpoints keep a parameter: its own, an older one, that of the tensor it is tied to,
        each with and without the base model's name."""
        prefix = f"{self.model.base_model_prefix}."
        tied: Mapping[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        names = [name] if name not in tied else [name, tied[name]]
        for found in names:
            older = [found.removesuffix(new) + old for new, old in _OLD_NAMES.items() if found.endswith(new)]
            for candidate in (found, *older):
                yield candidate
                yield candidate.removeprefix(prefix) if candidate.startswith(prefix) else prefix + candidate

    def _iter_sources(self) -> Iterator[TensorSource]:
        with self._naming_the_backbone():
            source = SafetensorsSource(self._folder)
        yield source
        yield self._load_whole()

    @contextmanager
    def _naming_the_backbone(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"the weights of {self.info.path} cannot be read: {first_line(error)}",
                path=self.info.path,
                hint="the download may be incomplete: fetch the folder again",
            ) from error

    def _load_whole(self) -> TensorSource:
        """Let transformers load everything, at the cost of memory: it knows old formats and renamed tensors."""
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            loaded: Any = self._class.from_pretrained(
                self._folder, config=self.config, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"the weights of {self.info.path} do not load: {first_line(error)}", path=self.info.path
            ) from error
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        model, report = loaded
        return LoadedSource(model, frozenset(report["missing_keys"]))
