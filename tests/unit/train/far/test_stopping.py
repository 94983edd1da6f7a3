"""Early stopping: which state is kept, against a plain loop over epochs, and the same bits through kills."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloister.adapters import add_lora, trainable_state
from cloister.errors import AdapterError, DataError
from cloister.train import (
    Checkpointer,
    ExampleKey,
    FarTrainer,
    Feature,
    MemoryFeatures,
    TrainSpec,
    alone_baseline,
    evaluate,
    trained_features,
)
from cloister.train._stopping import EarlyStopping

KEY = bytes(32)
# 27 training examples of three clients, of which 2 + 2 + 3 are held out: 5 steps an epoch.
SPEC = TrainSpec(epochs=6, batch_size=4, lr=0.05, schedule="constant", seed=5, patience=2, held_out=0.3)


class KilledError(Exception):
    pass


def checkpointer(tmp_path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoint.sealed", KEY, "far-checkpoint")


def run(job, lora, spec=SPEC, *, kill_at: int | None = None, **kwargs):
    def on_step(info):
        if info.step == kill_at:
            raise KilledError

    far = job.far(spec.seed)
    return far, FarTrainer(far, spec, lora, job.task, job.source(), on_step=on_step, **kwargs).train()


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# --- the rule -------------------------------------------------------------------------------------------------------


def stops_after(losses: list[float], patience: int) -> tuple[int, int]:
    """(epochs, best epoch) by the definition."""
    best, best_epoch, bad = math.inf, 0, 0
    for epoch, loss in enumerate(losses, 1):
        if loss < best:
            best, best_epoch, bad = loss, epoch, 0
        else:
            bad += 1
        if bad == patience:
            return epoch, best_epoch
    return len(losses), best_epoch


@given(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=20), st.integers(1, 5))
def test_patience_by_the_definition(losses, patience):
    stopping, kept = EarlyStopping(patience), 0
    for epoch, loss in enumerate(losses, 1):
        if stopping.add(loss):
            kept = epoch
        if stopping.is_over:
            break
    assert (len(stopping.losses), kept) == stops_after(losses, patience)
    assert stopping.best_epoch == kept
    assert str(losses[0]) not in repr(stopping)


def test_without_patience_nothing_stops_and_before_the_first_epoch_nothing_is_known():
    stopping = EarlyStopping(None)
    assert (stopping.best_epoch, stopping.is_over) == (None, False)
    for loss in (1.0, 2.0, 3.0):
        stopping.add(loss)
    assert (stopping.best_epoch, stopping.is_over) == (1, False)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(AdapterError, match=r"held-out loss is \w+ after epoch 1") as caught:
        EarlyStopping(1).add(loss)
    assert "training.lr" in caught.value.hint


# --- what is held out -----------------------------------------------------------------------------------------------


def many(counts: dict[str, int]) -> MemoryFeatures:
    row = torch.zeros(1, 2)
    return MemoryFeatures(
        {c: {"train": [Feature(i, row, label=i % 2) for i in range(n)], "test": [Feature(0, row, label=0)]}
         for c, n in counts.items()}
    )  # fmt: skip


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 25), min_size=1), st.integers(1, 50), st.integers(0, 3))
def test_the_public_rule(counts, percent, seed):
    source, share = many(counts), percent / 100
    held = source.hold_out(share, seed)
    for client, n in counts.items():
        rank = {i: hashlib.sha256(f"cloister-held-out/v1/{seed}/{client}/{i}".encode()).hexdigest() for i in range(n)}
        chosen = sorted(sorted(rank, key=rank.__getitem__)[: n * percent // 100])
        assert [key.index for key in held.split("held-out") if key.client == client] == chosen
        kept = [key.index for key in held.split("train") if key.client == client]
        assert sorted(kept + chosen) == list(range(n))
    assert held.split("test") == source.split("test")
    assert held.n_examples("held-out") == {c: n * percent // 100 for c, n in counts.items()}
    assert held.clients == source.clients
    for key in held.split("held-out"):
        assert held.get(key) is source.get(ExampleKey(key.client, "train", key.index))
        assert held.label(key) == key.index % 2 and held.n_tokens(key) == 1


def test_another_seed_or_share_holds_out_others():
    source = many({"a": 100})
    splits = {tuple(source.hold_out(share, seed).split("held-out")) for share, seed in ((0.1, 0), (0.1, 1), (0.2, 0))}
    assert len(splits) == 3
    prints = {source.hold_out(share, seed).fingerprint for share, seed in ((0.1, 0), (0.1, 1), (0.2, 0))}
    assert len(prints | {source.fingerprint}) == 4
    assert repr(source.hold_out(0.1, 0)) == "Features(1 clients, 90 train, 1 test, 10 held-out)"


def test_a_client_alone_holds_out_what_it_holds_out_with_others():
    source = many({"a": 20, "b": 20})
    alone = source.only("a").hold_out(0.2, 3).split("held-out")
    assert alone == [key for key in source.hold_out(0.2, 3).split("held-out") if key.client == "a"]


def test_small_clients_hold_nothing_out_and_all_of_them_small_is_refused():
    spec = TrainSpec(patience=1, held_out=0.1)
    assert trained_features(many({"a": 9, "b": 10}), spec).n_examples("held-out") == {"a": 0, "b": 1}
    with pytest.raises(DataError, match=r"share of 0\.1 to be held out") as caught:
        trained_features(many({"a": 9, "b": 9}), spec)
    assert "training.held_out" in caught.value.hint and "training.patience" in caught.value.hint
    source = many({"a": 9})
    assert trained_features(source, replace(spec, patience=None)) is source


def test_training_refuses_too_little_data(make_job, lora):
    job = make_job()
    with pytest.raises(DataError, match="held out"):
        FarTrainer(job.far(), replace(SPEC, held_out=0.05), lora, job.task, job.source())


# --- training -------------------------------------------------------------------------------------------------------


def epoch_by_epoch(job, lora, spec) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Held-out losses and states after every epoch of a training without early stopping on what is not held out."""
    divided = trained_features(job.source(), spec)
    kept = MemoryFeatures(
        {c: {"train": [divided.get(key) for key in divided.split("train") if key.client == c]} for c in divided.clients}
    )
    held = MemoryFeatures(
        {
            c: {"test": [divided.get(key) for key in divided.split("held-out") if key.client == c]}
            for c in divided.clients
        }
    )
    far, losses, states = job.far(spec.seed), [], []

    def on_epoch(_: int) -> None:
        losses.append(evaluate(far, held, job.task).loss)
        states.append(trainable_state(far))

    FarTrainer(far, replace(spec, patience=None), lora, job.task, kept, on_epoch=on_epoch).train()
    return losses, states


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm")])
@pytest.mark.parametrize("patience", [1, 2, 50])
def test_keeps_the_best_epoch_and_stops_where_the_definition_says(make_job, lora, family, task, patience):
    job = make_job(family, task)
    spec = replace(SPEC, patience=patience)
    losses, states = epoch_by_epoch(job, lora, spec)
    n_epochs, best = stops_after(losses, patience)
    told = []
    far, result = run(job, lora, spec, on_held_out=lambda epoch, found: told.append((epoch, found)))
    assert list(result.held_out_losses) == losses[:n_epochs]
    assert result.best_epoch == best
    assert result.stopped_at_epoch == (n_epochs if n_epochs < spec.epochs else None)
    assert not result.stopped
    assert result.n_steps == len(result.losses) == 5 * n_epochs
    assert_same_bits(trainable_state(far), states[best - 1])
    assert [epoch for epoch, _ in told] == list(range(1, n_epochs + 1))
    assert [found.loss for _, found in told] == losses[:n_epochs]
    assert told[0][1].n == {"east": 2, "north": 3, "west": 2}


def test_this_job_does_stop_before_its_end(make_job, lora):
    """Otherwise the tests here would test less than they seem to."""
    _, result = run(make_job(), lora)
    assert result.stopped_at_epoch is not None and result.best_epoch is not None
    assert result.best_epoch < result.stopped_at_epoch < SPEC.epochs


def test_without_patience_there_is_no_best_epoch(make_job, lora):
    _, result = run(make_job(), lora, replace(SPEC, patience=None, epochs=1))
    assert (result.held_out_losses, result.best_epoch, result.stopped_at_epoch) == ((), None, None)


@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_killed_anywhere_gives_the_bits_of_an_uninterrupted_run(make_job, lora, tmp_path, every):
    job, spec = make_job(), replace(SPEC, checkpoint_every_steps=every)
    far, whole = run(job, lora, spec)
    for kill_at in sorted({4, 5, 6, whole.n_steps - 5, whole.n_steps}):
        with pytest.raises(KilledError):
            run(job, lora, spec, checkpoint=checkpointer(tmp_path), kill_at=kill_at)
    resumed, result = run(job, lora, spec, checkpoint=checkpointer(tmp_path))
    assert_same_bits(trainable_state(far), trainable_state(resumed))
    assert (result.losses, result.held_out_losses) == (whole.losses, whole.held_out_losses)
    assert (result.best_epoch, result.stopped_at_epoch) == (whole.best_epoch, whole.stopped_at_epoch)
    assert not result.stopped


def test_a_finished_training_is_the_best_epoch_for_everybody_who_loads_it(make_job, lora, tmp_path):
    job = make_job()
    far, whole = run(job, lora, checkpoint=checkpointer(tmp_path))
    state = checkpointer(tmp_path).load()
    assert state.is_done and state.step < state.n_steps
    assert not [name for name in state.tensors if name.startswith("best/")]
    again, result = run(job, lora, checkpoint=checkpointer(tmp_path), kill_at=whole.n_steps)
    assert_same_bits(trainable_state(far), trainable_state(again))
    assert (result.n_steps, result.best_epoch, result.stopped_at_epoch) == (
        whole.n_steps, whole.best_epoch, whole.stopped_at_epoch,
    )  # fmt: skip
    assert not result.stopped
    fresh = job.far(SPEC.seed)
    add_lora(fresh, lora, seed=1)
    checkpointer(tmp_path).load_final(fresh)
    assert_same_bits(trainable_state(far), trainable_state(fresh))


def test_the_end_of_a_capped_run_is_judged_too(make_job, lora):
    _, result = run(make_job(), lora, replace(SPEC, max_steps=7))
    assert (result.n_steps, len(result.held_out_losses), result.stopped_at_epoch) == (7, 2, None)


def test_losses_are_in_no_repr(make_job, lora, tmp_path):
    _, result = run(make_job(), lora, replace(SPEC, max_steps=5), checkpoint=checkpointer(tmp_path))
    assert "held_out_losses" not in repr(result)
    assert "held_out_losses" not in repr(checkpointer(tmp_path).load())


def test_held_out_examples_without_a_target_cannot_judge(make_job, lora):
    job = make_job("llama", "causal-lm")
    silent = {
        c: {"train": [replace(f, labels=torch.full_like(f.labels, -100)) for f in job.features(c, "train")]}
        for c in job.tokens
    }
    with pytest.raises(DataError, match="no held-out example has a token that carries loss"):
        FarTrainer(job.far(), SPEC, lora, job.task, MemoryFeatures(silent)).train()


def test_a_client_that_is_too_small_trains_alone_to_the_end(make_job, lora):
    job, spec, steps = make_job(), replace(SPEC, held_out=0.1, epochs=2), []
    found = alone_baseline(job.far(), job.source(), "west", spec, lora, job.task, on_step=steps.append)
    assert len(steps) == 2 * math.ceil(len(job.tokens["west"]["train"]) / spec.batch_size)
    assert found["per_client"].keys() == {"east", "north", "west"}
