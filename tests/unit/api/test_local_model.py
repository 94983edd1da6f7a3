"""What a client's enclave computes with: admission, rounds, measurements, questions, and what may be told of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cloister.offload
from cloister.adapters import AdapterState, AdapterUpdate, LoraSpec, PrefixSpec
from cloister.api._local_model import MaskedModel, starting_adapter
from cloister.config import Job, load_job
from cloister.errors import AcceleratorLostError, ConfigError, DataError, FederationError, OffloadError
from cloister.federation import EnclaveClientPlan, MaskPlan
from cloister.pad import PadMode
from cloister.testing import FakeAccelerator, write_tiny_job
from cloister.train import DpSgdSpec, TrainSpec, open_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SPEC = TrainSpec(epochs=1, batch_size=4, lr=0.01, seed=3)
DP = DpSgdSpec(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("jobs")
    texts = write_tiny_job(folder / "texts", n_train=6, n_test=3)
    prompts = write_tiny_job(folder / "prompts", n_train=4, n_test=2, task="causal-lm", family="llama")
    return {"sequence-classification": load_job(texts), "causal-lm": load_job(prompts)}


@pytest.fixture(autouse=True)
def accelerators(monkeypatch: pytest.MonkeyPatch) -> list[FakeAccelerator]:
    """Those that connected, by the port that the model was given."""
    made: list[FakeAccelerator] = []

    def connect(port: object) -> FakeAccelerator:
        assert port == "port"
        made.append(FakeAccelerator())
        return made[-1]

    monkeypatch.setattr(cloister.offload, "AwaitedAccelerator", connect)
    return made


class Told:
    """What the model said to its institution's people."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})


def plan_of(job: Job, folder: Path, **changes: Any) -> EnclaveClientPlan:
    client, task = job.clients[0], job.task_spec()
    plan = EnclaveClientPlan(
        run_id="run-1", name=client.name, job_sha384=b"\5" * 48, policy=None, server_policy_sha384=b"", task=task,
        datasets={s: open_dataset(d.path, columns=client.column_map(), task=task) for s, d in client.datasets.items()},
        node_key=folder / "node.pem", work=folder, adapter=LoraSpec(r=2), model_path=job.model.path, train=SPEC,
        proximal_mu=0.0, mask=MaskPlan(ring="faithful", pad=PadMode.OTP, bucket=16, pool_bytes=0),
    )  # type: ignore[arg-type]  # fmt: skip
    return replace(plan, **changes)


Open = Callable[..., tuple[MaskedModel, Told, bytes]]


@pytest.fixture
def opened(jobs: dict[str, Job], tmp_path: Path) -> Iterator[Open]:
    """A model, what it tells, and the adapter before the first round."""
    models: list[MaskedModel] = []

    def open_it(task: str = "sequence-classification", *, with_data: bool = True, **changes: Any):
        plan, told = plan_of(jobs[task], tmp_path, **changes), Told()
        start, _ = starting_adapter(plan)  # type: ignore[arg-type]
        models.append(MaskedModel(plan, "port", emit=told, with_data=with_data))  # type: ignore[arg-type]
        return models[-1], told, start.to_bytes()

    yield open_it
    for model in models:
        model.close()


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_what_a_client_loads_is_what_the_server_expects(opened: Open, jobs: dict[str, Job], tmp_path: Path) -> None:
    model, _, _ = opened()
    start, digests = starting_adapter(plan_of(jobs["sequence-classification"], tmp_path))  # type: ignore[arg-type]
    found = model.admission()
    assert {name: getattr(found, name) for name in digests} == digests
    assert (found.n_train, found.n_test) == (6, 3) and digests["adapter_sha384"] == start.spec.digest
    assert "alpha" in repr(model)


def test_a_tokenizer_of_other_bytes_has_another_digest(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["sequence-classification"]
    copy = tmp_path / "model"
    shutil.copytree(job.model.path, copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    plan = plan_of(job, tmp_path)
    _, ours = starting_adapter(plan)  # type: ignore[arg-type]
    _, theirs = starting_adapter(replace(plan, model_path=str(copy)))  # type: ignore[arg-type]
    assert ours["tokenizer_sha384"] != theirs["tokenizer_sha384"]
    assert ours["adapter_sha384"] == theirs["adapter_sha384"]


def test_a_round_and_what_is_told_of_it(opened: Open, accelerators: list[FakeAccelerator]) -> None:
    model, told, start = opened()
    update, n_examples, facts = model.train(start, 2)
    assert n_examples == 6 and update != start and model.progress() == (2, 2)
    assert facts["n_steps"] == 2 and facts["loss"] > 0 and facts["offload"]["n_products"] > 0
    assert facts["offload"]["n_weights_outside"] > 0 and accelerators[0].seen
    assert model.epsilon(1) is None
    steps = [event for event in told.events if event["event"] == "step"]
    assert [(e["round"], e["step"], e["n_steps"], e["model"]) for e in steps] == [
        (2, 1, 2, "client/alpha"), (2, 2, 2, "client/alpha"),
    ]  # fmt: skip
    assert all("loss" in event and "lr" in event for event in steps)
    json.dumps(facts)  # as it is sent
    assert model.train(start, 2)[0] == update, "a round that is done again gives the same update"
    assert model.train(start, 3)[0] != update


def test_a_proximal_term_holds_the_adapter_back(opened: Open) -> None:
    norms = []
    for mu in (0.0, 1e4):
        model, _, start = opened(proximal_mu=mu)
        spec = starting_adapter(model._plan)[0].spec  # type: ignore[arg-type]
        norms.append(AdapterUpdate.parse(model.train(start, 1)[0], spec).norm())
    assert 0 < norms[1] < norms[0]


def test_without_live_metrics_no_loss_is_told(opened: Open) -> None:
    model, told, start = opened(live_metrics=False)
    facts = model.train(start, 1)[2]
    assert "loss" not in facts and all("loss" not in event and "lr" not in event for event in told.events)


def test_with_dp_sgd_no_loss_is_told_and_epsilon_grows(opened: Open) -> None:
    model, told, start = opened(dp_sgd=DP)
    facts = model.train(start, 1)[2]
    assert "loss" not in facts and len(told.events) == 2 and all("loss" not in event for event in told.events)
    assert 0 < model.epsilon(1) < model.epsilon(2)  # type: ignore[operator]


def test_dp_sgd_that_cannot_be_had_ends_the_load(opened: Open) -> None:
    with pytest.raises(ConfigError, match=r"training\.privacy\.delta"):
        opened(dp_sgd=replace(DP, delta=0.5))


def test_measuring(opened: Open) -> None:
    model, _, start = opened()
    n, facts = model.evaluate(start)
    assert n == 3 and facts["sums"]["n"] == 3 and facts["n_truncated"] == 0 and model.progress() == (0, 0)
    assert all(len(pair) == 3 for pair in facts["sums"]["pairs"])
    json.dumps(facts)


def test_a_client_without_held_out_examples(opened: Open, jobs: dict[str, Job], tmp_path: Path) -> None:
    datasets = plan_of(jobs["sequence-classification"], tmp_path).datasets
    model, _, start = opened(datasets={"train": datasets["train"]})
    assert model.evaluate(start) == (0, {"sums": None, "n_truncated": 0, "offload": model.offload_facts()})
    assert model.admission().n_test == 0


def test_it_stops_at_the_next_step(opened: Open) -> None:
    model, _, start = opened()
    model.stop()
    with pytest.raises(FederationError, match="stopped"):
        model.train(start, 1)


def test_a_client_without_training_data_is_named(opened: Open) -> None:
    with pytest.raises(DataError, match="client alpha has no training data"):
        opened(datasets={})


def test_a_release_becomes_a_peft_folder(opened: Open, tmp_path: Path) -> None:
    model, _, start = opened()
    model.save(start, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"


# --- questions --------------------------------------------------------------------------------------------------------


def test_questions_need_no_data(opened: Open) -> None:
    model, _, start = opened(with_data=False)
    answers = model.answer(start, ["the old rose", "sea"], 1)
    assert [len(answer["probabilities"]) for answer in answers] == [3, 3]
    assert all(abs(sum(answer["probabilities"]) - 1) < 1e-5 for answer in answers)
    with pytest.raises(RuntimeError, match="without data"):
        model.train(start, 1)


def test_completions(opened: Open) -> None:
    model, _, start = opened("causal-lm", with_data=False, adapter=PrefixSpec(3))
    [answer] = model.answer(start, ["the old rose"], 2)
    assert 0 <= answer["n_tokens"] <= 2 and isinstance(answer["completion"], str)


def test_a_prefix_takes_positions(opened: Open) -> None:
    plain, _, _ = opened(with_data=False)
    prefix, _, start = opened(with_data=False, adapter=PrefixSpec(5))
    assert plain._max_length is not None and prefix._max_length == plain._max_length - 5
    assert AdapterState.parse(start, starting_adapter(prefix._plan)[0].spec).spec.kind == "prefix"  # type: ignore[arg-type]


# --- the session ------------------------------------------------------------------------------------------------------


def test_how_layers_are_masked_is_the_plans(opened: Open) -> None:
    mask = MaskPlan(ring="fast", pad=PadMode.LATTICE, bucket=8, pool_bytes=1 << 20)
    model, _, start = opened(mask=mask)
    model.evaluate(start)
    facts = model.offload_facts()
    assert (facts["pad"], facts["format"], facts["bucket"]) == ("lattice", "fast", 8)


def test_closing_destroys_every_key(opened: Open) -> None:
    model, _, start = opened()
    model.close()
    with pytest.raises(OffloadError, match="closed"):
        model.evaluate(start)
    model.close()


def test_nobody_connects(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_: object) -> None:
        raise AcceleratorLostError("no accelerator has connected within 120 s")

    monkeypatch.setattr(cloister.offload, "AwaitedAccelerator", connect)
    with pytest.raises(AcceleratorLostError, match="connected"):
        opened()
