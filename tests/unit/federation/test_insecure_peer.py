"""The unprotected peer: the model that it trains is the whole model of ours, its files and names are read aright."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
import torch

from cloister.adapters import attach_adapter
from cloister.api._compare_data import write_tokens
from cloister.api._compare_jobs import derive_job
from cloister.api._compare_work import _first_adapter, insecure_peer_job, peer_name
from cloister.config import Job, load_job
from cloister.federation import InsecurePeerJob, ask_insecure_model, train_insecure_central
from cloister.federation._insecure_peer import task
from cloister.slicing import WholeSide, inspect_backbone, load_whole
from cloister.testing import TINY_FAMILIES, write_tiny_job

APP = Path(task.__file__).parent / "app"
IDS = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
CASES = [
    (family, name)
    for family in TINY_FAMILIES
    for name in ("sequence-classification", "causal-lm")
    if (family, name) != ("bert", "causal-lm")
]


def derived(folder: Path, family: str, name: str, method: str = "central") -> Job:
    sections = "[adapter]\nr = 2\nalpha = 4\n"
    return derive_job(load_job(write_tiny_job(folder, family=family, task=name, sections=sections)), method, 1)


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda x: x)
def test_the_peers_model_is_ours(tmp_path: Path, family: str, name: str) -> None:
    """With our first adapter, and after it was moved as training would: every logit is that of Method 1's model."""
    job = derived(tmp_path, family, name)
    peer = insecure_peer_job(job, write_tokens(job, tmp_path / "tokens"), initial=None)
    state = torch.load(_first_adapter(job, tmp_path))
    generator = torch.Generator().manual_seed(5)
    state = {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    theirs = task.PlainModel(peer.config(tmp_path)).eval()
    task.set_state(theirs, state)

    info = inspect_backbone(job.model.path)
    whole = load_whole(info, task=job.task.name, n_labels=len(job.task.labels) or None)
    prefix = f"{whole.base_model_prefix}." if job.task.labels else ""
    ours = WholeSide(
        attach_adapter(whole, job.adapter_spec(), seed=1), info, task=job.task.name, pooling=peer.pooling
    ).eval()
    with torch.no_grad():
        for full, parameter in ours.peft.named_parameters():  # pyright: ignore
            own = peer_name(full.replace(".modules_to_save.default.", ".").replace(".default.", "."), prefix)
            if parameter.requires_grad:
                parameter.copy_(state.pop(own))
    bias = state.pop("head.bias", torch.zeros(1))
    assert not state, "something that the peer trains, ours does not"
    with torch.no_grad():
        expected, found = ours(IDS, MASK), theirs(IDS, MASK)
    if name == "causal-lm":
        expected, found = expected[MASK.bool()], found[MASK.bool()]
    assert torch.allclose(found, expected + bias, atol=1e-5)


def test_the_apps_configuration_has_every_key():
    """Flower refuses to override a key that the app does not have."""
    app = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["publisher"] == "cloister-insecure-peer"
    peer = InsecurePeerJob(model=Path("m"), train=(Path("a"),), test=Path("t"), n_labels=2)
    given = peer.config(Path("r"))
    assert {key: type(value) for key, value in app["config"].items()} == {key: type(v) for key, v in given.items()}
    # What every run sets; all else has one default, in the app and in the job.
    set_by_runs = {"num-server-rounds", "num-clients", "model-path", "num-labels", "test-path", "result-dir"}
    assert all(app["config"][key] == given[key] for key in given.keys() - set_by_runs)
    assert 'lora-targets="query,key,value,dense"' in peer.run_config(Path("r"))


def test_epochs_that_do_not_divide_into_rounds_are_refused():
    peer = InsecurePeerJob(model=Path("m"), train=(), test=Path("t"), n_labels=2, epochs=3, rounds=2)
    with pytest.raises(ValueError, match="3 epochs do not divide into 2 rounds"):
        peer.config(Path("r"))


@pytest.mark.parametrize(("name", "family"), [("sequence-classification", "bert"), ("causal-lm", "llama")])
def test_the_centralised_peer_learns_and_answers(tmp_path: Path, name: str, family: str):
    job = derived(tmp_path, family, name)
    files = write_tokens(job, tmp_path / "tokens")
    peer = insecure_peer_job(job, files, initial=_first_adapter(job, tmp_path))
    peer = dataclasses.replace(peer, epochs=6, lr=0.02)
    steps: list[tuple[int, int, float]] = []
    found = train_insecure_central(peer, tmp_path, on_step=lambda *told: steps.append(told))
    assert [step for step, _, _ in steps] == list(range(1, 37)) and {n for _, n, _ in steps} == {36}
    assert sum(loss for *_, loss in steps[-6:]) < sum(loss for *_, loss in steps[:6])
    assert found["n_trained"] > 0 and set(files.n_train.values()) == {24}
    if name == "causal-lm":
        made = ask_insecure_model(peer, tmp_path, prompts=[[5, 6, 7], [9]], end=None, limit=3)
        assert [len(ids) for ids in made] == [3, 3]
        return
    labels = [json.loads(line)["label"] for line in files.every_test.read_text().splitlines()]
    told = ask_insecure_model(peer, tmp_path, test=files.every_test)
    assert len(told) == 18
    assert sum(a == b for a, b in zip(labels, told, strict=True)) / 18 == pytest.approx(found["metric"])


def test_texts_and_their_tokens_are_the_same_examples(tmp_path: Path):
    job = derived(tmp_path, "bert", "sequence-classification")
    files = write_tokens(job, tmp_path / "tokens")
    rows = [json.loads(line) for line in (tmp_path / "alpha-train.jsonl").read_text().splitlines()]
    labels = list(job.task.labels)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({**row, "label": labels.index(row["label"])}) + "\n" for row in rows))
    config = insecure_peer_job(job, files, initial=None).config(tmp_path)
    for one, other in zip(*(task.load_data(path, config) for path in (texts, files.train["alpha"])), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    shuffled = task.load_data(texts, config, seed=1)
    assert not torch.equal(next(iter(shuffled))["labels"], next(iter(task.load_data(texts, config)))["labels"])


def test_padding_carries_no_loss():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = task.collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    pair = task.collate([{"input_ids": [5], "token_type_ids": [1], "label": 2}])
    assert pair["token_type_ids"].tolist() == [[1]] and pair["labels"].tolist() == [2]


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("base_model.model.bert.encoder.layer.0.q.lora_A.weight", "bert.",
         "adapter.base_model.model.encoder.layer.0.q.lora_A.weight"),
        ("base_model.model.model.layers.1.q.lora_B.weight", "model.",
         "adapter.base_model.model.layers.1.q.lora_B.weight"),
        ("base_model.model.model.layers.1.q.lora_B.weight", "",
         "adapter.base_model.model.model.layers.1.q.lora_B.weight"),
        ("base_model.model.classifier.bias", "bert.", "head.bias"),
        ("base_model.model.score.weight", "model.", "head.weight"),
    ],
    ids=["bert", "llama", "llama-causal-lm", "classifier", "score"],
)  # fmt: skip
def test_names_of_tensors(name: str, prefix: str, expected: str):
    assert peer_name(name, prefix) == expected
