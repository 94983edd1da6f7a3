"""Metrics against the definition, one example at a time; predictions in the order of the questions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional

from cloister.errors import DataError
from cloister.train import Feature, MemoryFeatures, TaskSpec, TrainSpec, evaluate, predict
from cloister.train._evaluate import macro_f1
from cloister.train._far import FarTrainer
from cloister.train._loss import backward, n_targets, score


def one_by_one(far, source, split="test"):
    """(client, correct, n, loss) of each example, by the definition."""
    rows = []
    for key in source.split(split):
        f = source.get(key)
        with torch.no_grad():
            logits = far(f.hidden[None], torch.ones(1, len(f.hidden), dtype=torch.long))[0]
        if f.labels is None:
            loss = float(functional.cross_entropy(logits, torch.tensor(f.label)))
            rows.append((key.client, int(logits.argmax()) == f.label, 1, loss))
            continue
        loss, hits, n = 0.0, 0, 0
        for t in range(len(f.hidden) - 1):
            if (target := int(f.labels[t + 1])) != -100:
                loss += float(functional.cross_entropy(logits[t], torch.tensor(target)))
                hits += int(logits[t].argmax()) == target
                n += 1
        rows.append((key.client, hits, n, loss))
    return rows


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_metric_is_the_definitions(make_job, lora, task):
    job = make_job("llama" if task == "causal-lm" else "bert", task)
    far, source = job.far(), job.source()
    FarTrainer(far, TrainSpec(max_steps=4, lr=5e-3), lora, job.task, source).train()
    found = evaluate(far, source, job.task)
    rows = one_by_one(far, source)
    n, loss = sum(r[2] for r in rows), sum(r[3] for r in rows)
    assert found.loss == pytest.approx(loss / n, rel=1e-5)
    assert found.n == dict.fromkeys(source.clients, 4)
    for client in source.clients:
        mine = [r for r in rows if r[0] == client]
        n_mine = sum(r[2] for r in mine)
        if task == "causal-lm":
            assert found.per_client[client] == pytest.approx(math.exp(sum(r[3] for r in mine) / n_mine), rel=1e-5)
        else:
            assert found.per_client[client] == pytest.approx(sum(r[1] for r in mine) / n_mine)
    if task == "causal-lm":
        assert (found.name, found.value) == ("perplexity", pytest.approx(math.exp(loss / n), rel=1e-5))
        assert found.extra["token_accuracy"] == pytest.approx(sum(r[1] for r in rows) / n)
    else:
        assert (found.name, found.value) == ("accuracy", pytest.approx(sum(r[1] for r in rows) / n))
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_other_splits_and_clients_without_examples(make_job):
    job = make_job()
    features = job.features("east", "test")
    source = MemoryFeatures({"east": {"train": features, "test": features}, "west": {"train": features}})
    found = evaluate(job.far(), source, job.task)
    assert found.per_client.keys() == {"east"}
    assert evaluate(job.far(), source, job.task, split="train").n == {"east": 4, "west": 4}
    with pytest.raises(DataError, match="no client has an example in its test split"):
        evaluate(job.far(), MemoryFeatures({"west": {"train": features}}), job.task)


def test_macro_f1_by_hand():
    # class 0: TP 1, FP 1, FN 1 -> 1/2; class 1: TP 1, FP 1, FN 0 -> 2/3; class 2: TP 0, FP 0, FN 1 -> 0
    assert macro_f1([(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 0, 1)]) == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert macro_f1([(1, 1, 2)]) == 1.0


def test_predictions_come_in_the_order_of_the_questions(make_job):
    job = make_job()
    far, features = job.far(), job.features("east", "train")
    found = predict(far, features, job.task)
    assert found.shape == (len(features), 3)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(features)))
    for row, feature in zip(found, features, strict=True):
        torch.testing.assert_close(row, predict(far, [feature], job.task)[0], rtol=1e-5, atol=1e-6)
    assert predict(far, [], job.task).shape == (0, 3)
    assert not found.requires_grad


def test_next_tokens(make_job):
    job = make_job("llama", "causal-lm")
    far, features = job.far(), job.features("east", "train")
    found = predict(far, features, job.task)
    expected = [
        int(far(f.hidden[None], torch.ones(1, len(f.hidden), dtype=torch.long))[0, -1].argmax()) for f in features
    ]
    assert found.tolist() == expected
    assert predict(far, [], job.task).shape == (0,)


def test_an_example_without_a_target_costs_nothing(make_job, lora):
    job = make_job("llama", "causal-lm")
    far = job.far()
    FarTrainer(far, TrainSpec(max_steps=1), lora, job.task, job.source())
    feature = Feature(0, job.features("east", "train")[0].hidden, labels=None)
    silent = Feature(0, feature.hidden, labels=torch.full((len(feature.hidden),), -100))
    assert n_targets(silent) == 0
    assert backward(far, [silent], [1.0]) == 0.0
    assert score(far, [silent]).n_targets.tolist() == [0]


def test_a_large_vocabulary_is_done_in_parts(make_job, lora, monkeypatch):
    """The same loss and gradient as at once."""
    job = make_job("llama", "causal-lm")
    far = job.far()
    FarTrainer(far, TrainSpec(max_steps=1), lora, job.task, job.source())
    features = job.features("east", "train")

    def run():
        far.zero_grad()
        loss = backward(far, features, [0.5 + i for i in range(len(features))])
        return loss, {n: p.grad.clone() for n, p in far.named_parameters() if p.grad is not None}, score(far, features)

    loss, grads, scored = run()
    monkeypatch.setattr("cloister.train._loss._MAX_LOGITS", job.info.vocab_size * 3)
    loss_parts, grads_parts, scored_parts = run()
    assert loss_parts == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == grads_parts.keys()
    for name in grads:
        torch.testing.assert_close(grads_parts[name], grads[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scored_parts.loss_sum, scored.loss_sum)
    assert torch.equal(scored_parts.n_correct, scored.n_correct)


def test_perplexity_of_a_hopeless_model_is_finite(make_job):
    job = make_job("llama", "causal-lm")
    far = job.far()
    with torch.no_grad():
        for parameter in far.head.parameters():
            parameter.mul_(1e5)
    assert math.isfinite(evaluate(far, job.source(), job.task).value)
    assert TaskSpec("causal-lm").labels == ()


def test_batches_change_no_metric(make_job, monkeypatch):
    job = make_job()
    far, source = job.far(), job.source()
    whole = evaluate(far, source, job.task)
    monkeypatch.setattr("cloister.train._evaluate._TOKENS_AT_ONCE", 20)
    parts = evaluate(far, source, job.task)
    assert parts.value == whole.value
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
