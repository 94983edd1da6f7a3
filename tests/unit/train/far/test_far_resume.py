"""The same seed gives the same bits, also through a kill and a resume; a foreign checkpoint is refused."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch

from cloister.adapters import LoraSpec, add_lora, trainable_state
from cloister.errors import AdapterError, DataError, DecryptionError, StateMismatchError, StoreFullError
from cloister.train import Checkpointer, FarTrainer, MemoryFeatures, TrainSpec, evaluate

KEY = bytes(32)
SPEC = TrainSpec(epochs=3, batch_size=4, lr=3e-3, checkpoint_every_steps=2, seed=5)


class KilledError(Exception):
    pass


def checkpointer(tmp_path, label: str = "far-checkpoint") -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoint.sealed", KEY, label)


def run(job, lora, spec=SPEC, *, source=None, kill_at: int | None = None, **kwargs):
    """Trains a fresh far side. `kill_at` raises out of the step callback, as a kill would end the process."""

    def on_step(info):
        if info.step == kill_at:
            raise KilledError

    far = job.far(spec.seed)
    trainer = FarTrainer(far, spec, lora, job.task, source or job.source(), on_step=on_step, **kwargs)
    return far, trainer.train()


def assert_same_bits(a, b):
    left, right = trainable_state(a), trainable_state(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("family", "task", "dropout"),
    [("bert", "sequence-classification", 0.0), ("bert", "sequence-classification", 0.3), ("llama", "causal-lm", 0.1)],
)
def test_killed_twice_gives_the_bits_of_an_uninterrupted_run(make_job, tmp_path, family, task, dropout):
    job, lora = make_job(family, task), LoraSpec(r=4, alpha=8, dropout=dropout)
    torch.manual_seed(1)
    far, whole = run(job, lora)
    torch.manual_seed(2)  # whatever the process drew before must not matter
    with pytest.raises(KilledError):
        run(job, lora, checkpoint=checkpointer(tmp_path), kill_at=5)  # the checkpoint is of step 4
    with pytest.raises(KilledError):
        run(job, lora, checkpoint=checkpointer(tmp_path), kill_at=6)  # killed right after sealing
    resumed, result = run(job, lora, checkpoint=checkpointer(tmp_path))
    assert_same_bits(far, resumed)
    assert result.losses == whole.losses
    assert (result.n_steps, result.resumed_at, result.stopped) == (whole.n_steps, 6, False)
    assert evaluate(far, job.source(), job.task) == evaluate(resumed, job.source(), job.task)


def test_same_seed_same_bits_and_another_seed_others(make_job, lora):
    job = make_job()
    first, one = run(job, lora)
    second, two = run(job, lora)
    assert_same_bits(first, second)
    assert one.losses == two.losses
    _, other = run(job, lora, replace(SPEC, seed=6))
    assert other.losses != one.losses


def test_training_leaves_the_global_generator_alone(make_job):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    run(make_job(), LoraSpec(r=4, dropout=0.5), replace(SPEC, max_steps=2))
    assert torch.equal(torch.rand(3), expected)


def test_stop_seals_and_a_resume_finishes(make_job, lora, tmp_path):
    job, stop = make_job(), threading.Event()
    far, whole = run(job, lora)

    def on_step(info):
        if info.step == 3:
            stop.set()

    trainer = FarTrainer(
        job.far(SPEC.seed),
        SPEC,
        lora,
        job.task,
        job.source(),
        checkpoint=checkpointer(tmp_path),
        on_step=on_step,
        stop=stop,
    )
    stopped = trainer.train()
    assert (stopped.n_steps, stopped.stopped) == (3, True)
    resumed, result = run(job, lora, checkpoint=checkpointer(tmp_path))
    assert_same_bits(far, resumed)
    assert (result.resumed_at, result.losses) == (3, whole.losses)


def test_finished_training_is_not_repeated_and_can_be_loaded(make_job, lora, tmp_path):
    job = make_job()
    far, whole = run(job, lora, checkpoint=checkpointer(tmp_path))
    again, result = run(job, lora, checkpoint=checkpointer(tmp_path), kill_at=1)
    assert (result.losses, result.resumed_at) == (whole.losses, whole.n_steps)
    assert_same_bits(far, again)
    fresh = job.far(SPEC.seed)
    add_lora(fresh, lora, seed=99)
    checkpointer(tmp_path).load_final(fresh)
    assert_same_bits(far, fresh)


def test_load_final_needs_a_finished_training(make_job, lora, tmp_path):
    job = make_job()
    with pytest.raises(StateMismatchError, match="no finished training"):
        checkpointer(tmp_path).load_final(job.far())
    with pytest.raises(KilledError):
        run(job, lora, checkpoint=checkpointer(tmp_path), kill_at=4)
    with pytest.raises(StateMismatchError, match="no finished training"):
        checkpointer(tmp_path).load_final(job.far())


@pytest.mark.parametrize("what", ["spec", "lora", "data", "weights"])
def test_checkpoint_of_another_job_is_refused(make_job, lora, tmp_path, what):
    job = make_job()
    run(job, lora, replace(SPEC, max_steps=2), checkpoint=checkpointer(tmp_path))
    spec, adapter, source = replace(SPEC, max_steps=2), lora, job.source()
    if what == "spec":
        spec = replace(spec, lr=1e-4)
    elif what == "lora":
        adapter = replace(lora, alpha=1)
    elif what == "weights":
        spec = replace(spec, client_weights=(("east", 2.0),))
    else:
        source = MemoryFeatures({"east": {"train": job.features("east", "train")}})
    with pytest.raises(StateMismatchError, match="another job, adapter or data"):
        run(job, adapter, spec, source=source, checkpoint=checkpointer(tmp_path))


def test_checkpoint_may_be_saved_at_another_rhythm(make_job, lora, tmp_path):
    job = make_job()
    run(job, lora, replace(SPEC, max_steps=2), checkpoint=checkpointer(tmp_path))
    _, result = run(job, lora, replace(SPEC, max_steps=2, checkpoint_every_steps=7), checkpoint=checkpointer(tmp_path))
    assert result.resumed_at == 2


def test_altered_checkpoint_does_not_open(make_job, lora, tmp_path):
    job = make_job()
    run(job, lora, replace(SPEC, max_steps=1), checkpoint=checkpointer(tmp_path))
    with pytest.raises(DecryptionError):
        checkpointer(tmp_path, "another label").load()
    path = tmp_path / "checkpoint.sealed"
    sealed = bytearray(path.read_bytes())
    sealed[len(sealed) // 2] ^= 1
    path.write_bytes(sealed)
    with pytest.raises(DecryptionError):
        run(job, lora, replace(SPEC, max_steps=1), checkpoint=checkpointer(tmp_path))


def test_checkpoint_holds_no_plain_weights_and_its_repr_no_key(make_job, lora, tmp_path):
    far, _ = run(make_job(), lora, replace(SPEC, max_steps=1), checkpoint=checkpointer(tmp_path))
    sealed = (tmp_path / "checkpoint.sealed").read_bytes()
    assert b"lora_A" not in sealed
    assert trainable_state(far)["head.weight"].numpy().tobytes()[:64] not in sealed
    state = checkpointer(tmp_path).load()
    assert "tensor" not in repr(state)
    assert "loss" not in repr(state)
    assert KEY.hex() not in repr(checkpointer(tmp_path))


def test_full_disk_keeps_the_state_before(make_job, lora, tmp_path, monkeypatch):
    job = make_job()
    far, whole = run(job, lora)
    real, calls = Checkpointer.save, []

    def save(self, state):
        calls.append(state.step)
        if len(calls) == 2:
            raise StoreFullError("no space left")
        real(self, state)

    monkeypatch.setattr(Checkpointer, "save", save)
    with pytest.raises(StoreFullError):
        run(job, lora, checkpoint=checkpointer(tmp_path))
    assert checkpointer(tmp_path).load().step == 2
    resumed, result = run(job, lora, checkpoint=checkpointer(tmp_path))
    assert (result.resumed_at, result.losses) == (2, whole.losses)
    assert_same_bits(far, resumed)


def test_steps_are_told_with_epochs_rates_and_losses(make_job, lora):
    job, seen, epochs = make_job(), [], []
    trainer = FarTrainer(
        job.far(SPEC.seed), SPEC, lora, job.task, job.source(), on_step=seen.append, on_epoch=epochs.append
    )
    result = trainer.train()
    n_examples = sum(job.source().n_examples().values())
    per_epoch = -(-n_examples // SPEC.batch_size)
    assert [info.step for info in seen] == list(range(1, 3 * per_epoch + 1))
    assert [info.epoch for info in seen] == [e for e in (1, 2, 3) for _ in range(per_epoch)]
    assert [info.loss for info in seen] == list(result.losses)
    assert epochs == [1, 2, 3]
    n_tokens = sum(job.source().n_tokens(key) for key in job.source().split("train"))
    assert sum(info.n_tokens for info in seen) == 3 * n_tokens
    assert all(info.examples_per_s > 0 and info.n_steps == 3 * per_epoch for info in seen)


def test_a_diverged_training_says_so(make_job, lora):
    job = make_job()
    far = job.far()
    with torch.no_grad():
        far.head.weight.fill_(float("nan"))
    with pytest.raises(AdapterError, match="loss is nan at step 1") as caught:
        FarTrainer(far, SPEC, lora, job.task, job.source()).train()
    assert "training.lr" in caught.value.hint


def test_no_training_examples_is_an_error(make_job, lora):
    job = make_job()
    empty = MemoryFeatures({"east": {"test": job.features("east", "test")}})
    with pytest.raises(DataError, match="no client has a training example"):
        FarTrainer(job.far(), SPEC, lora, job.task, empty)


def test_only_adapter_and_head_change(make_job, lora):
    job = make_job()
    far = job.far(SPEC.seed)
    before = {name: tensor.clone() for name, tensor in far.state_dict().items()}
    FarTrainer(far, SPEC, lora, job.task, job.source()).train()
    after = far.state_dict()
    for name, tensor in before.items():
        kept = after.get(
            name, after.get(name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
        )
        assert torch.equal(tensor, kept) != name.startswith("head."), name
    assert all(p.grad is None for p in far.parameters() if not p.requires_grad)


def test_state_of_another_release_is_refused(tmp_path):
    from cloister import wire
    from cloister.channel import write_sealed

    for body in (b"junk", wire.enc(b"{}", b""), wire.enc(json.dumps({"format": 99}).encode(), b"")):
        write_sealed(tmp_path / "checkpoint.sealed", body, key=KEY, label="far-checkpoint", version=0)
        with pytest.raises(StateMismatchError, match="another release"):
            checkpointer(tmp_path).load()


def test_an_adapter_that_is_there_is_trained_on(make_job, lora):
    """The server places the adapter itself, so that an untrained far side can be evaluated the same way."""
    job = make_job()
    far = job.far(SPEC.seed)
    add_lora(far, lora, seed=SPEC.seed)
    FarTrainer(far, SPEC, lora, job.task, job.source()).train()
    assert_same_bits(far, run(job, lora)[0])


def test_a_checkpoint_without_optimiser_state_is_refused(make_job, lora, tmp_path):
    job = make_job()
    run(job, lora, replace(SPEC, max_steps=1), checkpoint=checkpointer(tmp_path))
    state = checkpointer(tmp_path).load()
    kept = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("exp_avg/")}
    checkpointer(tmp_path).save(replace(state, tensors=kept))
    with pytest.raises(StateMismatchError, match="no optimiser state"):
        run(job, lora, replace(SPEC, max_steps=1), checkpoint=checkpointer(tmp_path))
