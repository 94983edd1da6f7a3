"""Whole runs of Method 1 over real processes: adapters that live in enclaves, trained in rounds."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from cloister import predict, run
from cloister.api import Programs
from cloister.cli._summary import summary
from cloister.cli._views import PlainView
from cloister.pad import ASSUMPTIONS, PadMode
from cloister.testing import FakeRelay, write_tiny_job

FAKE = Programs(relay=FakeRelay)
TRAINING = "epochs = 2\nbatch_size = 8\nlr = 0.01"
COMMON = '[method]\nname = "enclave"\nrounds = 2\n{method}\n[federation]\npatience_s = 0.5\n'


def _is_private(path: Path) -> bool:
    return path.stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_lora_faithful_with_its_release(tmp_path: Path):
    sections = COMMON.format(method="") + '[release]\nwhat = "adapter"\n'
    events: list[dict] = []
    job = write_tiny_job(tmp_path, sections=sections, training=TRAINING)
    done = run(job, runs_dir=tmp_path / "runs", programs=FAKE, on_event=events.append)
    result = done.result

    assert result == json.loads((done.run_dir / "result.json").read_text())
    assert result["method"] == "enclave" and result["simulated"] and result["adapter"] == "lora"
    assert set(result["metric"]["per_client"]) == {"alpha", "beta"} and 0.0 <= done.metric <= 1.0
    assert result["n_examples"] == {name: {"train": 24, "test": 9} for name in ("alpha", "beta")}
    assert result["n_truncated"] == {"alpha": 0, "beta": 0} and result["left_out"] == []
    assert [(r["round"], r["clients"], r["rejected"], r["missing"]) for r in result["rounds"]] == [
        (1, ["alpha", "beta"], {}, []),
        (2, ["alpha", "beta"], {}, []),
    ]
    losses = [told["loss"] for r in result["rounds"] for told in r["per_client"].values()]
    assert len(losses) == 4 and max(losses[2:]) < max(losses[:2])

    pad = result["pad"]
    assert (pad["mode"], pad["ring"], pad["assumption"]) == ("otp", "faithful", ASSUMPTIONS[PadMode.OTP])
    for key in ("elements", "products", "accelerator_bytes", "devices", "retries"):
        assert set(pad[key]) == {"alpha", "beta"}
    assert min(pad["products"].values()) > 0 and pad["weights_outside"] > 0
    assert set(result["bytes"]) == {"relay", "accelerator"} and min(result["bytes"].values()) > 0
    assert set(result["client_enclaves"]) == {"alpha", "beta"}
    assert all(claims["simulated"] for claims in result["client_enclaves"].values())
    assert {"client/alpha", "accelerator/alpha", "server"} <= set(result["peak_rss_bytes"])
    _check_views(done.run_dir, result, events)
    _check_release(done.run_dir)

    said = (done.run_dir / "events.jsonl").read_text().splitlines()
    answers = predict(done.run_dir, "beta", ["the old rose", "cold sea"], programs=FAKE)
    after = (done.run_dir / "events.jsonl").read_text().splitlines()
    assert not set(after[len(said) :]) & set(said), "a question repeats what the run has told"
    assert [set(a["probabilities"]) for a in answers] == [{"red", "green", "blue"}] * 2
    assert all(abs(sum(a["probabilities"].values()) - 1) < 1e-5 for a in answers)


def _check_views(run_dir: Path, result: dict, events: list[dict]) -> None:
    """The report, the summary and the lines of the run say the mode and what it rests on, and every round."""
    page = (run_dir / "report.html").read_text()
    for part in ("result", "loss", "per-client", "rounds", "pad", "visibility", "evidence", "phases", "bytes",
                 "memory", "clients", "facts"):  # fmt: skip
        assert f'id="{part}"' in page, part
    assert ASSUMPTIONS[PadMode.OTP] in html.unescape(page) and "Method 1" in page and "SIMULATED" in page
    assert "whatever the number of epochs" not in page and "sealed manifest" not in page
    said = summary(result, run_dir)
    assert f"pad       otp, ring faithful: {ASSUMPTIONS[PadMode.OTP]}" in said
    assert "rounds    2, 4 updates aggregated, 0 refused, 0 missing" in said

    class Lines:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    lines = Lines()
    view = PlainView(lines)  # pyright: ignore[reportArgumentType]
    for event in events:
        view(event)
    assert ASSUMPTIONS[PadMode.OTP] in lines.text
    assert "round 1/2: 2 updates" in lines.text and "round 2/2: 2 updates" in lines.text
    assert "client/alpha: step 6/6" in lines.text and "near side" not in lines.text


def _check_release(run_dir: Path) -> None:
    from peft import PeftModel

    folders = [run_dir / "clients" / name / "adapter" for name in ("alpha", "beta")]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert all(_is_private(path) for folder in folders for path in folder.iterdir())
    base = AutoModelForSequenceClassification.from_pretrained(run_dir / "model", num_labels=3)
    loaded = PeftModel.from_pretrained(base, str(folders[0]))
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained and all(p.abs().sum() > 0 for p in trained)


@pytest.mark.slow
def test_prefix_fast_lattice_causal_lm(tmp_path: Path):
    sections = COMMON.format(method='ring = "fast"\npad = "lattice"')
    sections += '[adapter]\nname = "prefix"\nn_tokens = 4\n'
    job = write_tiny_job(tmp_path, task="causal-lm", family="llama", n_train=12, n_test=4, sections=sections,
                         training="epochs = 1\nbatch_size = 8\nlr = 0.01")  # fmt: skip
    done = run(job, runs_dir=tmp_path / "runs", programs=FAKE)
    assert done.result["metric"]["name"] == "perplexity" and done.metric > 1.0
    assert done.result["adapter"] == "prefix"
    pad = done.result["pad"]
    assert (pad["mode"], pad["ring"], pad["assumption"]) == ("lattice", "fast", ASSUMPTIONS[PadMode.LATTICE])
    assert not (done.run_dir / "clients" / "alpha" / "adapter").exists(), "nothing was to be released"
    answer = predict(done.run_dir, "alpha", ["the old rose 0r1"], max_new_tokens=3, programs=FAKE)
    assert 0 <= answer[0]["n_tokens"] <= 3
