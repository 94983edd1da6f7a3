"""`--machine this`: what is measured is complete, and noise makes no constant impossible."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.api import _machine_probe as probe
from cloister.api import load_machine, measure_machine, save_machine


def test_a_fit_gives_back_the_rate_and_the_cost_of_an_element():
    n_planes, n_tokens, width, rate, each = 3, 512, 1024, 2e11, 0.7e-9
    half, whole = (n_planes * 2 * n_tokens * size**2 / rate + n_tokens * size * each for size in (width, 2 * width))
    found = probe.fit_product(half, whole, width=width, n_tokens=n_tokens, n_planes=n_planes)
    assert found == pytest.approx((rate, each))


@pytest.mark.parametrize(("half", "whole"), [(1.0, 1.0), (1.0, 100.0)], ids=["as fast", "far slower"])
def test_noise_makes_nothing_negative(half: float, whole: float):
    rate, each = probe.fit_product(half, whole, width=8, n_tokens=4, n_planes=3)
    assert rate > 0 and each >= 0


@pytest.mark.slow
def test_this_machine(tmp_path: Path):
    machine = measure_machine(seconds=0.001)
    assert machine.name == "this" and machine.accelerator.shares_cpu
    assert machine.source("enclave.fp32_gflop_s").startswith("measured: here")
    save_machine(machine, tmp_path / "this.toml")  # so every constant is in range, and has a source
    assert load_machine(tmp_path / "this.toml") == machine


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor : 0\n")
    assert probe._processor()
