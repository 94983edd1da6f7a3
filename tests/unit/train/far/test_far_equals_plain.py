"""The far trainer against the slowest, most obvious trainer of the same model: whole, un-cut, one example at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

from cloister.adapters import LoraSpec, add_lora
from cloister.train import FarTrainer, TrainSpec, evaluate

UPPER = {  # where the un-cut model keeps its blocks
    "bert": "encoder.layer",
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gemma2": "model.layers",
    "mistral": "model.layers",
}
SPEC = TrainSpec(epochs=2, batch_size=4, grad_accumulation=2, lr=3e-3, warmup_ratio=0.2, seed=11)


class Oracle:
    """The whole model in one process. Nothing here is shared with the code under test but the initial A and head."""

    def __init__(self, job, family: str, lora: LoraSpec, cut: int, seed: int) -> None:
        self.job, self.cut = job, cut
        whole = AutoModel if job.task.labels else AutoModelForCausalLM
        self.model = whole.from_pretrained(job.folder).eval().requires_grad_(False)
        path = UPPER[family].removeprefix("model.") if job.task.labels else UPPER[family]
        blocks = self.model.get_submodule(path)
        far = job.far(seed)
        add_lora(far, lora, seed=seed)
        linears = [name.removesuffix(".base_layer") for name, _ in far.blocks.named_modules() if "base_layer" in name]
        upper = nn.ModuleList(blocks[cut:])
        config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=linears, fan_in_fan_out=family == "gpt2")
        inject_adapter_in_model(config, upper)
        self.named = {f"blocks.{n}": p for n, p in upper.named_parameters() if p.requires_grad}
        if job.task.labels:
            self.head = nn.Linear(job.info.hidden_size, len(job.task.labels))
            self.named |= {f"head.{n}": p for n, p in self.head.named_parameters()}
        with torch.no_grad():
            start = {name: p for name, p in far.named_parameters() if p.requires_grad}
            assert start.keys() == self.named.keys()
            for name, mine in self.named.items():
                mine.copy_(start[name])

    def loss_sum(self, ids: list[int], label: int | list[int]) -> tuple[torch.Tensor, int]:
        x = torch.tensor([ids])
        if isinstance(label, int):
            hidden = self.model(input_ids=x).last_hidden_state[0]
            pooled = hidden.mean(dim=0) if self.job.task.pooling == "mean" else hidden[-1]
            return functional.cross_entropy(self.head(pooled), torch.tensor(label)), 1
        logits = self.model(input_ids=x).logits[0]
        pairs = [(logits[t], label[t + 1]) for t in range(len(ids) - 1) if label[t + 1] != -100]
        if not pairs:
            return logits.sum() * 0, 0
        return sum(functional.cross_entropy(row, torch.tensor(target)) for row, target in pairs), len(pairs)

    def train(self, spec: TrainSpec, weight_of: dict[str, float] | None = None) -> list[float]:
        tokens = self.job.tokens
        examples = [(c, *pair) for c in sorted(tokens) for pair in tokens[c]["train"]]
        weights = [(weight_of or {}).get(c, 1.0) for c, _, _ in examples]
        weights = [w * len(weights) / sum(weights) for w in weights]
        size = spec.batch_size * spec.grad_accumulation
        n_steps = spec.epochs * math.ceil(len(examples) / size)
        warmup = math.ceil(n_steps * spec.warmup_ratio)
        matrices = [p for p in self.named.values() if p.dim() > 1]
        vectors = [p for p in self.named.values() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            foreach=False,
        )
        losses: list[float] = []
        for epoch in range(spec.epochs):
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(spec.seed + epoch)).tolist()
            for start in range(0, len(order), size):
                step = len(losses)
                lr = spec.lr * (step + 1) / (warmup + 1)
                if step >= warmup:
                    lr = spec.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup)))
                sums = [(weights[i], *self.loss_sum(*examples[i][1:])) for i in order[start : start + size]]
                loss = sum(w * s for w, s, _ in sums) / max(1, sum(n for _, _, n in sums))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(list(self.named.values()), spec.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                losses.append(loss.item())
        return losses

    @torch.no_grad()
    def metric(self) -> float:
        found = [(p, c) for c in self.job.tokens for p in self.job.tokens[c]["test"]]
        sums = [self.loss_sum(*pair) for pair, _ in found]
        return float(sum(s for s, _ in sums)) / sum(n for _, n in sums)


CASES = [
    ("bert", "sequence-classification"),
    ("llama", "sequence-classification"),
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("gemma2", "causal-lm"),
    ("mistral", "causal-lm"),
]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_same_losses_weights_and_metric_as_the_whole_model(make_job, lora, family, task):
    job = make_job(family, task)
    oracle = Oracle(job, family, lora, cut=2, seed=SPEC.seed)
    far, source = job.far(SPEC.seed), job.source()
    result = FarTrainer(far, SPEC, lora, job.task, source).train()
    expected = oracle.train(SPEC)

    assert result.losses == pytest.approx(expected, abs=2e-5)
    own = {n: p for n, p in far.named_parameters() if p.requires_grad}
    for name, theirs in oracle.named.items():
        # Adam divides a gradient by its size, so where that is nearly 0 it blows rounding up: a twentieth of a step.
        torch.testing.assert_close(own[name], theirs, rtol=0, atol=0.05 * SPEC.lr)
    assert evaluate(far, source, job.task).loss == pytest.approx(oracle.metric(), abs=5e-5)
    moved = max(float(p.detach().abs().max()) for n, p in own.items() if "lora_B" in n)
    assert moved > SPEC.lr, "B starts at 0: nothing was learned, so nothing was compared"


def test_clients_weights_scale_their_examples_losses(make_job, lora):
    job = make_job()
    weights = {"east": 5.0, "west": 0.5}
    spec = replace(SPEC, client_weights=tuple(weights.items()), epochs=1)
    result = FarTrainer(job.far(spec.seed), spec, lora, job.task, job.source()).train()
    expected = Oracle(job, "bert", lora, cut=2, seed=spec.seed).train(spec, weights)
    assert result.losses == pytest.approx(expected, abs=2e-5)
    plain = FarTrainer(job.far(spec.seed), replace(spec, client_weights=None), lora, job.task, job.source()).train()
    assert plain.losses != pytest.approx(expected, abs=1e-3)
