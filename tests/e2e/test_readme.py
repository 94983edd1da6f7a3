"""The README's Python example runs as it stands, over real Flower; its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cloister.cli import main
from cloister.testing import write_tiny_job, write_tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    code = EXAMPLES[0]
    assert len(code.strip().splitlines()) <= 12
    write_tiny_job(tmp_path, clients=("hospital-a", "hospital-b"), training="epochs = 1\nbatch_size = 8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - the example is the test
    said = capsys.readouterr().out.splitlines()
    assert "evidence" in said and "result" in said
    assert said[-1].split()[0] in {"red", "green", "blue"}
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()


def test_the_example_of_spf_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = EXAMPLES[1]
    write_tiny_model(tmp_path / "gpt2", "gpt2")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").state_dict()
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(5, 13)[None]
    exec(compile(code, "README.md", "exec"), {"loader": [{"input_ids": ids, "labels": ids}] * 2})  # noqa: S102
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn." in name or ".mlp.c_fc." in name for name in changed)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`cloister ((?:policy |collateral )?\w+)[ `]", README))))
def test_every_command_that_it_names_has_help(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert "example" in capsys.readouterr().out
