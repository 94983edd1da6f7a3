"""`cloister plan`: tables, words and JSON with the same numbers; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.api.plan_numbers import machine_of

from cloister.api import Machine, load_machine
from cloister.cli import main
from cloister.testing import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a configuration, and nothing else."""
    whole = write_tiny_model(tmp_path_factory.mktemp("whole"), "llama", hidden_size=64)
    folder = tmp_path_factory.mktemp("config-only")
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["plan", *args])
    out, err = capsys.readouterr()
    return code, out, err


def test_tables_words_and_a_recommendation(model: str, capsys):
    code, out, err = planned(capsys, model, "--machine", "sgx-8-cpu")
    assert code == 0 and err == ""
    for title in (
        "Speed of training, forward and backward", "Bytes over each boundary", "Memory of the enclave",
        "Method 1, masked offload", "Method 2, split tuning", "Recommendation", "What the constants rest on",
    ):  # fmt: skip
        assert title in out
    for pad in ("otp", "otp-2", "lattice"):
        assert f"Method 1, {pad}, faithful" in out and f"accelerator, {pad}, fast, a token" in out
    assert "second accelerator, otp-2, a token" in out
    assert "Method 2, far side" in out and "Method 2, SPF, far side" in out
    assert f"model    {model}: llama, " in out and "4 blocks of 64" in out
    assert "take the numbers as orders of magnitude" in out and "vendor: Intel" in out
    assert max(map(len, out.splitlines())) < 220


def test_json_is_the_same_numbers(model: str, capsys):
    args = [model, "--machine", "laptop", "--tokens", "64", "--cut-layer", "3", "--clients", "5"]
    code, out, err = planned(capsys, *args, "--json")
    assert code == 0 and err == ""
    data = json.loads(out)
    assert data["version"] == 1 and data["machine"]["name"] == "laptop" and not data["machine"]["is_measured"]
    assert data["work"] == {
        "n_tokens": 64, "rank": 8, "prefix_tokens": 0, "cut_layer": 3, "n_clients": 5, "feature_bytes": 2**31,
        "spf": {"heads": 0.5, "neurons": 0.5},
    }  # fmt: skip
    code, text, _ = planned(capsys, *args)
    assert data["recommendation"] in " ".join(text.split())
    assert data["verdicts"]["method2"] in " ".join(text.split())


def test_a_prefix_in_place_of_lora(model: str, capsys):
    _, out, _ = planned(capsys, model, "--machine", "laptop", "--prefix-tokens", "16")
    assert "a prefix of 16 tokens (4,096 numbers)" in out  # 16 tokens, key and value of 32, 4 blocks
    _, out, _ = planned(capsys, model, "--machine", "laptop", "--prefix-tokens", "16", "--json")
    assert json.loads(out)["work"]["rank"] == 0


def test_shares_of_spf(model: str, capsys):
    trained = {}
    for share in ("0.25", "1"):
        _, out, _ = planned(capsys, model, "--machine", "laptop", "--heads", share, "--neurons", share, "--json")
        trained[share] = json.loads(out)["method2_spf"]["n_trained"]
    # Two blocks: 2 head groups with 64 rows, 128 neurons with 2 each, of 64 numbers; a quarter of 2 is one, rounded.
    assert trained == {"0.25": 2 * (64 * 64 + 32 * 2 * 64 + 8 * 128), "1": 2 * (128 * 64 + 128 * 2 * 64 + 8 * 128)}
    code, out, err = planned(capsys, model, "--machine", "laptop", "--neurons", "0.001")
    assert code == 13 and out == "" and "neurons = 0.001 selects none of a block's 128 neurons" in err


def test_a_gpu_tee_has_its_row(model: str, capsys):
    _, out, _ = planned(capsys, model, "--machine", "tdx-96-h200")
    assert "GPU confidential computing" in out and "Use GPU confidential computing" in out


def test_what_fits_where(tmp_path: Path, capsys):
    folder = tmp_path / "large"
    folder.mkdir()
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    _, out, _ = planned(capsys, str(folder), "--machine", "snp-64-h100")
    assert "70.6B parameters" in out and "no: accelerator" in out and "NO" in out
    assert "do not hold the integer weights of faithful" in " ".join(out.split())


def test_this_machine_is_measured_and_kept(model: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cloister.api.measure_machine", lambda: machine_of())
    kept = tmp_path / "mine.toml"
    code, out, err = planned(capsys, model, "--save-machine", str(kept))
    assert code == 0 and "measuring this machine" in err and f"wrote {kept}" in err
    assert "orders of magnitude" not in out
    assert load_machine(kept) == machine_of()
    code, _, err = planned(capsys, model, "--machine", str(kept), "--json")
    assert code == 0 and err == ""
    code, _, err = planned(capsys, model, "--json")
    assert code == 0 and err == ""


def test_numbers_out_of_range_are_told_all_at_once(model: str, capsys):
    code, out, err = planned(capsys, model, "--machine", "laptop", "--tokens", "0", "--rank", "2000", "--clients", "-1")
    assert code == 2 and out == ""
    for name in ("--tokens", "--rank", "--clients"):
        assert f"error: {name}: must be a whole number from 1 to " in err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--machine", "nowhere.toml"], 2, "neither a known machine nor a file"),
        (["--machine", "laptop", "--cut-layer", "4"], 4, "cut_layer 4 is outside the 4 layers"),
        (["--machine", "laptop", "--save-machine", "/nowhere/m.toml"], 7, "/nowhere/m.toml cannot be written"),
    ],
    ids=["machine", "cut", "save"],
)
def test_what_it_refuses(args: list[str], code: int, says: str, model: str, capsys):
    found, out, err = planned(capsys, model, *args)
    assert found == code and out == "" and says in err


@pytest.mark.parametrize(
    ("config", "says", "hint"),
    [
        ({"model_type": "mamba"}, "is of family 'mamba'", "supported: bert"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantised", "use a plain model"),
        (None, "has no config.json", "save_pretrained"),
    ],
    ids=["family", "variant", "empty"],
)
def test_models_that_cannot_be_used(config: dict[str, object] | None, says: str, hint: str, tmp_path: Path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = planned(capsys, str(tmp_path), "--machine", "laptop")
    assert code == 4 and says in err and hint in err


def test_lora_or_a_prefix_and_not_both(model: str, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", model, "--rank", "4", "--prefix-tokens", "4"])
    assert caught.value.code == 2
    capsys.readouterr()


def test_the_name_of_the_machine_is_taken_for_a_file_only_if_it_is_no_preset(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("laptop").write_text("= no TOML")
    assert isinstance(load_machine("laptop"), Machine)
