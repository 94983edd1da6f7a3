"""Adapters on whole Hugging Face models, by PEFT: LoRA, FFA-LoRA and P-tuning v2, for both tasks.

PEFT places and computes them. Ours are the seeds, so that every client starts from the same numbers, the choice of
linears, and the state that comes out and goes in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cloister.adapters._adapter_state import AdapterState
from cloister.adapters._lora import (
    LoraSpec,
    chosen_linears,
    draw_a,
    is_transposed,
    linears_of,
    lora_fields,
)
from cloister.adapters._spec import AdapterSpec, PrefixLayout, PrefixSpec, StateSpec, Task
from cloister.errors import AdapterError, UnsupportedLayerError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

PEFT_TASKS: Mapping[Task, str] = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
HEADS = ("classifier", "score")
"""What transformers calls the classification heads of the supported families; PEFT trains and keeps them whole."""

_SPEC = "cloister_spec"


def attach_adapter(model: PreTrainedModel, spec: AdapterSpec, *, seed: int) -> PeftModel:
    """Attach an adapter to a causal language model or sequence classifier, in place, and choose what trains.

    Trains: LoRA's A and B (FFA-LoRA: B alone) or the prefix (with `projection`: its embedding and MLP), and a
    classification head. Everything else is frozen.

    Args:
        model: a transformers model of a supported family; its weights are *public*.
        spec: the adapter.
        seed: of A, prefix and head: the same seed gives the same numbers on every machine, and torch's global
            generator is left as it was.

    Raises:
        UnsupportedLayerError: a target is not a linear of the blocks (the hint lists those there are), or the model's
            blocks are not found.
        AdapterError: there is an adapter already, or the model has no head for either task.
    """
    import torch

    task = _task_of(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that transformers 5 calls old.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(seed)  # of the prefix, which PEFT draws from the global generator
        peft = _with_prefix(model, spec, task) if isinstance(spec, PrefixSpec) else _with_lora(model, spec, task, seed)
    _init_head(peft, seed)
    setattr(peft, _SPEC, _describe(peft, task, seed))
    return peft


def adapter_spec(model: PeftModel) -> StateSpec:
    """What the states of this model's adapter look like.

    Raises:
        AdapterError: it was not attached by `attach_adapter`.
    """
    spec = getattr(model, _SPEC, None)
    if spec is None:
        raise AdapterError("the model has no adapter of ours", hint="attach one with attach_adapter")
    return spec


def adapter_state(model: PeftModel) -> AdapterState:
    """A float32 copy of everything that trains. *Secret*.

    Raises:
        StateMismatchError: training has made a number that is not finite; names its tensor.
        AdapterError: as `adapter_spec`.
    """
    import torch

    own = _parameters(model)
    found = {name: p.detach().to("cpu", torch.float32, copy=True).numpy() for name, p in own.items()}
    return AdapterState(adapter_spec(model), found)


def load_adapter_state(model: PeftModel, state: AdapterState) -> None:
    """Put a state into the model. Nothing is changed unless everything fits.

    Raises:
        StateMismatchError: the state is of another adapter; names the first tensor that differs.
        AdapterError: as `adapter_spec`.
    """
    import torch

    adapter_spec(model).require(state.spec)
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            parameter.copy_(torch.tensor(state.tensors[name]))


def _with_lora(model: PreTrainedModel, spec: LoraSpec, task: Task, seed: int) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    path, blocks = blocks_of(model)
    linears = linears_of(blocks)
    names = chosen_linears(linears, spec.targets)
    config = LoraConfig(
        **lora_fields(spec),
        task_type=PEFT_TASKS[task],
        target_modules=[f"{path}.{name}" for name in names],
        fan_in_fan_out=is_transposed(linears, names),
    )
    peft = get_peft_model(model, config)
    all_a = [parameter for name, parameter in peft.named_parameters() if ".lora_A." in name]
    draw_a(all_a, seed)
    for a in all_a:
        a.requires_grad_(not spec.freeze_a)
    return cast("PeftModel", peft)


def _with_prefix(model: PreTrainedModel, spec: PrefixSpec, task: Task) -> PeftModel:
    from peft import PrefixTuningConfig, get_peft_model

    linears_of(blocks_of(model)[1])  # refuses an adapter that is there already
    config = PrefixTuningConfig(
        task_type=PEFT_TASKS[task],
        num_virtual_tokens=spec.n_tokens,
        prefix_projection=spec.projection,
        encoder_hidden_size=cast("int", spec.hidden_size),
    )
    return cast("PeftModel", get_peft_model(model, config))


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a transformers model's blocks.

    Raises:
        UnsupportedLayerError: there is no list of as many modules as its configuration says.
    """
    from torch import nn

    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path, module
    raise UnsupportedLayerError(f"the blocks of {type(model).__name__} are not found")


def _task_of(model: PreTrainedModel) -> Task:
    if any(hasattr(model, name) for name in HEADS):
        return "sequence-classification"
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return "causal-lm"
    raise AdapterError(
        f"{type(model).__name__} has neither a language-model head nor a classification head",
        hint="load it with AutoModelForCausalLM or AutoModelForSequenceClassification",
    )


def _init_head(peft: PeftModel, seed: int) -> None:
    """Draw a new classification head as transformers does, from our own generator."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    std = float(getattr(peft.config, "initializer_range", 0.02))
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and ".modules_to_save." in name:
            is_bias = name.endswith(".bias")
            torch.nn.init.normal_(parameter, std=0.0 if is_bias else std, generator=generator)


def _describe(peft: PeftModel, task: Task, seed: int) -> StateSpec:
    config: Any = peft.peft_config["default"]
    shapes = {name: tuple(p.shape) for name, p in _parameters(peft).items()}
    if config.is_prompt_learning:
        hidden_size = config.encoder_hidden_size if config.prefix_projection else None
        adapter = PrefixSpec(config.num_virtual_tokens, config.prefix_projection, hidden_size)
        layout = PrefixLayout(config.num_layers, config.num_attention_heads, config.token_dim)
        return StateSpec(adapter, task, shapes, {}, layout=layout)
    fixed = {
        state_name(name): tuple(p.shape)
        for name, p in peft.named_parameters()
        if ".lora_A." in name and not p.requires_grad
    }
    adapter = lora_spec(config, (*shapes, *fixed), freeze_a=bool(fixed))
    return StateSpec(adapter, task, shapes, fixed, seed if fixed else None, is_transposed=config.fan_in_fan_out)


def lora_spec(config: Any, names: tuple[str, ...], *, freeze_a: bool = False) -> LoraSpec:
    """The spec of PEFT's `LoraConfig`, with targets as paths in the blocks, out of the names of its tensors."""
    paths = [name.partition(".lora_A.")[0].split(".") for name in names if ".lora_A." in name]
    # The first number in a path is the block's.
    targets = {".".join(path[next(i for i, part in enumerate(path) if part.isdigit()) :]) for path in paths}
    return LoraSpec(
        r=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=tuple(sorted(targets)),
        use_rslora=config.use_rslora,
        freeze_a=freeze_a,
    )


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """What trains, by the state's names."""
    return {state_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def state_name(parameter_name: str) -> str:
    """PEFT's name of a parameter without its adapter name, as PEFT's files have it."""
    return parameter_name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def fixed_tensors(spec: StateSpec) -> dict[str, np.ndarray]:
    """FFA-LoRA's A, drawn anew from the seed: the very numbers that every client's model has."""
    import torch

    matrices = {name: torch.empty(shape) for name, shape in spec.fixed.items()}
    draw_a(matrices.values(), spec.seed or 0)
    return {name: matrix.numpy() for name, matrix in matrices.items()}
