"""SPF on the far side: against masked dense training, through kills, in bfloat16, and out of the enclave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from cloister.adapters import (
    LoraSpec,
    SpfLinear,
    SpfSpec,
    SpfSupport,
    add_lora,
    add_spf,
    choose_support,
    merged_tensors,
    placed_support,
    trainable_state,
)
from cloister.errors import AdapterError, DataError, StateMismatchError
from cloister.train import (
    Checkpointer,
    FarTrainer,
    MemoryFeatures,
    TrainSpec,
    alone_baseline,
    evaluate,
    export_release,
    import_far_state,
    place_adapter,
    prepare_adapter,
    restore_tuned,
    saved_support,
)
from cloister.train._importance import row_scores
from cloister.train._precision import has_bf16

KEY = bytes(32)
SPEC = TrainSpec(epochs=2, batch_size=4, lr=3e-3, weight_decay=0.0, checkpoint_every_steps=2, seed=5)
SPF = SpfSpec(heads=0.5, neurons=0.3, r=2, alpha=4)
FISHER = replace(SPF, criterion="fisher", criterion_examples=9)
OUT = {"bert": "attention.output.dense", "llama": "self_attn.o_proj", "gpt2": "attn.c_proj"}


class KilledError(Exception):
    pass


def checkpointer(tmp_path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoint.sealed", KEY, "far-checkpoint")


def run(job, adapter, spec=SPEC, *, kill_at=None, source=None, far=None, **kwargs):
    def on_step(info):
        if info.step == kill_at:
            raise KilledError

    far = far or job.far(spec.seed)
    trainer = FarTrainer(far, spec, adapter, job.task, source or job.source(), on_step=on_step, **kwargs)
    return far, trainer.train()


def assert_same_bits(a, b):
    left, right = trainable_state(a), trainable_state(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    assert placed_support(a) == placed_support(b)


def masked_far(job, family, support_of):
    """The slow way: every candidate weight trains whole, and its gradient is multiplied by a mask."""
    far = job.far(SPEC.seed)
    add_lora(far, LoraSpec(r=SPF.r, alpha=SPF.alpha, targets=(OUT[family],)), seed=SPEC.seed)
    for name, spf in support_of.named_modules():
        if not isinstance(spf, SpfLinear):
            continue
        plain = far.get_submodule(name)
        mask = torch.zeros(spf.out_features, 1)
        for start, stop in spf.segments:
            mask[spf.row_order[start:stop]] = 1
        mask = mask.t() if spf.is_transposed else mask
        plain.weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    return far


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm"), ("gpt2", "causal-lm")]
)
def test_equals_dense_training_with_masked_gradients(make_job, family, task):
    job = make_job(family, task)
    spec = replace(SPEC, lr=1e-3)
    far, fast = run(job, SPF, spec)
    slow_far, slow = run(job, None, spec, far=masked_far(job, family, far))
    assert fast.losses == pytest.approx(slow.losses, rel=1e-3)
    mine, expected = merged_tensors(far), merged_tensors(slow_far)
    assert mine.keys() == expected.keys()
    before = merged_tensors(job.far(SPEC.seed))
    for name, tensor in expected.items():
        moved = (tensor - before[name]).abs().max() if name in before else tensor.abs().max()
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=max(1e-6, 0.05 * float(moved)), msg=name)


@pytest.mark.parametrize("adapter", [SPF, FISHER, replace(SPF, dropout=0.2)], ids=["l1", "fisher", "dropout"])
def test_killed_gives_the_bits_of_an_uninterrupted_run(make_job, tmp_path, adapter):
    job = make_job()
    far, whole = run(job, adapter)
    with pytest.raises(KilledError):
        run(job, adapter, checkpoint=checkpointer(tmp_path), kill_at=5)
    resumed, result = run(job, adapter, checkpoint=checkpointer(tmp_path))
    assert_same_bits(far, resumed)
    assert (result.losses, result.resumed_at) == (whole.losses, 4)
    fresh = job.far(SPEC.seed)
    restore_tuned(fresh, adapter, checkpointer(tmp_path), seed=SPEC.seed)
    assert_same_bits(far, fresh)
    restore_tuned(resumed, adapter, checkpointer(tmp_path), seed=SPEC.seed)  # the adapter is there already
    assert evaluate(fresh, job.source(), job.task) == evaluate(resumed, job.source(), job.task)


def test_rows_that_examples_chose_are_not_chosen_anew(make_job, tmp_path, monkeypatch):
    job = make_job()
    with pytest.raises(KilledError):
        run(job, FISHER, checkpoint=checkpointer(tmp_path), kill_at=3)
    monkeypatch.setattr("cloister.train._importance.row_scores", None)
    run(job, FISHER, checkpoint=checkpointer(tmp_path))


def other_support(state):
    """The same counts in other places."""
    support = saved_support(state.tensors)
    moved = tuple(tuple(63 - n for n in reversed(block)) for block in support.neurons)
    return SpfSupport(support.heads, moved)


def test_a_checkpoint_of_another_support_is_refused(make_job, tmp_path):
    job = make_job()
    run(job, SPF, replace(SPEC, max_steps=2), checkpoint=checkpointer(tmp_path))
    state = checkpointer(tmp_path).load()
    other = {f"support/{name}": tensor for name, tensor in other_support(state).tensors().items()}
    checkpointer(tmp_path).save(replace(state, tensors={**state.tensors, **other}))
    with pytest.raises(StateMismatchError, match="another SPF support") as caught:
        run(job, SPF, replace(SPEC, max_steps=2), checkpoint=checkpointer(tmp_path))
    assert caught.value.key == "support"
    far = job.far(SPEC.seed)
    place_adapter(far, SPF, None, seed=SPEC.seed)
    with pytest.raises(StateMismatchError, match="another SPF support"):
        checkpointer(tmp_path).load_final(far)


@pytest.mark.parametrize("change", [{"neurons": 0.4}, {"criterion": "random"}, {"alpha": 9}, {"heads": 1.0}])
def test_a_checkpoint_of_another_spec_is_refused(make_job, tmp_path, change):
    job, spec = make_job(), replace(SPEC, max_steps=2)
    run(job, SPF, spec, checkpoint=checkpointer(tmp_path))
    with pytest.raises(StateMismatchError, match="another job, adapter or data"):
        run(job, replace(SPF, **change), spec, checkpoint=checkpointer(tmp_path))


@pytest.mark.parametrize(("saved", "wanted"), [(SPF, LoraSpec(r=2)), (LoraSpec(r=2), SPF), (FISHER, LoraSpec(r=2))])
def test_a_checkpoint_of_another_kind_of_adapter_is_refused(make_job, tmp_path, saved, wanted):
    job, spec = make_job(), replace(SPEC, max_steps=1)
    run(job, saved, spec, checkpoint=checkpointer(tmp_path))
    with pytest.raises(StateMismatchError):
        run(job, wanted, spec, checkpoint=checkpointer(tmp_path))
    with pytest.raises(StateMismatchError):
        restore_tuned(job.far(SPEC.seed), wanted, checkpointer(tmp_path), seed=SPEC.seed)


def test_early_stopping_keeps_the_best_rows(make_job):
    job = make_job()
    spec = replace(SPEC, epochs=4, patience=1, held_out=0.3, lr=0.05)
    _, result = run(job, SPF, spec)
    assert result.best_epoch is not None
    assert len(result.held_out_losses) >= result.best_epoch


# --- the look at examples ---------------------------------------------------------------------------------------------


def test_scores_look_at_so_many_training_examples_of_the_seed(make_job):
    job = make_job()
    source = job.source()
    read = []
    get = source.get
    source.get = lambda key: read.append(key) or get(key)
    first = row_scores(job.far(), FISHER, source, seed=1)
    assert len(read) == len(set(read)) == 9
    assert {key.split for key in read} == {"train"}
    torch.manual_seed(3)
    again, other = row_scores(job.far(), FISHER, job.source(), seed=1), row_scores(job.far(), FISHER, source, seed=2)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0].neurons, other[0].neurons)
    row_scores(job.far(), replace(FISHER, criterion_examples=10_000), job.source(), seed=1)  # there are fewer


def test_scores_leave_the_far_side_as_it_was(make_job):
    job = make_job("llama", "causal-lm")
    far = job.far()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in far.named_parameters()}
    row_scores(far, replace(FISHER, criterion="gradient"), job.source(), seed=1)
    for name, parameter in far.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_without_examples_there_is_nothing_to_look_at(make_job):
    job = make_job()
    empty = MemoryFeatures({"east": {"test": job.features("east", "test")}})
    for source in (None, empty):
        with pytest.raises(DataError, match="criterion fisher"):
            place_adapter(job.far(), FISHER, source, seed=0)


def test_what_needs_no_examples_is_placed_at_once(make_job):
    far = make_job().far()
    assert prepare_adapter(far, SPF, seed=1)
    assert placed_support(far) == choose_support(make_job().far().blocks, SPF, seed=1)
    assert prepare_adapter(make_job().far(), LoraSpec(), seed=1)
    waiting = make_job().far()
    assert not prepare_adapter(waiting, FISHER, seed=1)
    assert placed_support(waiting) is None


@pytest.mark.parametrize("criterion", ["l1", "fisher"])
def test_a_share_that_selects_nothing_is_refused_before_any_example(make_job, criterion):
    with pytest.raises(AdapterError, match="selects none"):
        prepare_adapter(make_job().far(), replace(SPF, criterion=criterion, heads=0.01), seed=1)


def test_alone_looks_at_its_own_examples(make_job):
    job, adapter = make_job(), replace(FISHER, criterion_examples=256)
    found = alone_baseline(job.far(SPEC.seed), job.source(), "east", SPEC, adapter, job.task)
    own = MemoryFeatures({"east": {"train": job.features("east", "train")}})
    far, _ = run(job, adapter, source=own)
    assert found == evaluate(far, job.source(), job.task).as_dict()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "sequence-classification"), ("llama", "causal-lm"), ("gpt2", "causal-lm")]
)
def test_in_bf16_what_trains_stays_float32(make_job, family, task):
    job = make_job(family, task)
    far, exact = job.far(), job.far()
    for side in (far, exact):
        place_adapter(side, SPF, None, seed=1)
    far.compute_in_bf16()
    for module in far.modules():
        if isinstance(module, SpfLinear):
            assert module.weight.dtype == torch.bfloat16
            assert {row.dtype for row in module.rows} == {torch.float32}
    feature = job.features("east", "test")[0]
    mask = torch.ones(1, len(feature.hidden), dtype=torch.long)
    y, expected = far(feature.hidden[None], mask), exact(feature.hidden[None], mask).detach()
    torch.testing.assert_close(y.detach(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    y.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in far.parameters())
    weights = load(export_release(far, "weights"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.skipif(not has_bf16(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("adapter", [SPF, FISHER], ids=["l1", "fisher"])
def test_in_bf16_a_kill_changes_no_bit(make_job, tmp_path, adapter):
    job, spec = make_job(), replace(SPEC, precision="bf16")
    far, whole = run(job, adapter, spec)
    with pytest.raises(KilledError):
        run(job, adapter, spec, checkpoint=checkpointer(tmp_path), kill_at=5)
    resumed, result = run(job, adapter, spec, checkpoint=checkpointer(tmp_path))
    assert_same_bits(far, resumed)
    assert result.losses == whole.losses
    assert whole.losses == pytest.approx(run(job, adapter)[1].losses, rel=0.05)


# --- release ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(make_job):
    return run(make_job(), FISHER)[0]


def test_a_released_adapter_is_rows_support_lora_and_head(make_job, tuned):
    blob = export_release(tuned, "adapter")
    tensors = load(blob)
    kinds = {name for name in tensors if not name.startswith(("support/", "head."))}
    assert kinds and all("rows_" in name or "lora_" in name for name in kinds)
    support = saved_support(tensors)
    assert support == placed_support(tuned)
    fresh = make_job().far()
    add_spf(fresh, FISHER, support, seed=77)
    import_far_state(fresh, blob)
    assert_same_bits(tuned, fresh)


def test_an_adapter_of_other_rows_is_refused(make_job, tuned):
    blob, fresh = export_release(tuned, "adapter"), make_job().far()
    add_spf(fresh, SPF, choose_support(fresh.blocks, replace(SPF, criterion="random"), seed=9), seed=0)
    with pytest.raises(StateMismatchError, match="another SPF support"):
        import_far_state(fresh, blob)
    plain = make_job().far()
    with pytest.raises(StateMismatchError, match="another SPF support"):
        import_far_state(plain, blob)
    tensors = {name: tensor for name, tensor in load(blob).items() if name != "support/heads.0"}
    with pytest.raises(StateMismatchError, match="not those of an SPF support"):
        import_far_state(fresh, save(tensors))


def test_released_weights_are_a_far_side_without_adapter(make_job, tuned):
    job = make_job()
    merged, plain = load(export_release(tuned, "weights")), make_job().far()
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    feature = job.features("east", "test")[0]
    mask = torch.ones(1, len(feature.hidden), dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(feature.hidden[None], mask), tuned(feature.hidden[None], mask), rtol=1e-4, atol=1e-4
        )
