"""Rule 5: rounding is exact, and every residue of fast comes from exactly 45 values."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
import pytest
import torch
from tests.adversary.lattice.conftest import OpenSource
from tests.oracle import slow_lattice as slow

from cloister.kernels import _native
from cloister.offload import OffloadSession
from cloister.pad import PadKeys, PadMode
from cloister.pad import _lattice_pads as pads
from cloister.ring import FAST, quantize_weight
from cloister.testing import FakeAccelerator

Q, P, N = 754974721, 2**24, 1024


def test_all_values_of_fast():
    """Each of the 754,974,721 by the kernel's rounding and by the definition: they agree, 45 to each residue."""
    counts = np.zeros(P, np.uint8)
    assert _native.lattice_preimages(counts)
    assert int(counts.min()) == int(counts.max()) == 45
    assert 45 * P + 1 == Q


def test_the_excluded_value_is_one_of_46():
    """The definition in the design: t = (v << 24) - r_0 q, r = r_0 + (2 t > q) - (2 t < -q)."""

    def rounded(v: int) -> int:
        r_0 = v // 45
        t = (v << 24) - r_0 * Q
        return (r_0 + (2 * t > Q) - (2 * t < -Q)) % P

    around = [v for v in range(slow.EXCLUDED - 50, slow.EXCLUDED + 100) if rounded(v) == P // 2]
    assert around == list(range(slow.EXCLUDED, slow.EXCLUDED + 46))
    assert all(rounded(v) == slow.rounded(v, slow.SETS["fast"]) % P for v in around)
    for v in (0, 22, 23, Q - 1, Q - 22, Q - 23, Q // 2, Q // 2 + 1):
        assert rounded(v) == slow.rounded(v, slow.SETS["fast"]) % P


def test_faithful_is_nearly_even():
    """One residue has one value more of 133,909,049: a statistical distance below 2^-58."""
    par = slow.SETS["faithful"]
    assert par.q == 133909048 * par.p + 1
    assert (par.p - 1) / par.p / par.q < 2**-58
    assert (par.p - 1) / par.q**2 < 2**-85  # chi-square divergence of an element


def test_it_is_decided_before_x_is_touched(monkeypatch: pytest.MonkeyPatch):
    """A block is drawn again before the mask is computed, so nothing that an accelerator sees depends on it."""
    events: list[str] = []
    real_block, real_mask = _native.lattice_block, _native.mask

    class Kernels:
        @staticmethod
        def lattice_block(*arguments: Any) -> bool:
            events.append("block")
            return real_block(*arguments) and events.count("block") > 3

        @staticmethod
        def mask(*arguments: Any) -> bool:
            events.append("mask")
            return real_mask(*arguments)

    accelerator = FakeAccelerator()
    with OffloadSession(accelerator, FAST, pad=PadMode.LATTICE) as session:
        weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        session.add("q", quantize_weight(weight, FAST, layer="q"))
        monkeypatch.setattr(pads, "_native", Kernels)
        monkeypatch.setattr(f"{OffloadSession.__module__}._native.mask", Kernels.mask)
        session.forward("q", torch.ones(3, 5))
    assert events == ["block"] * 4 + ["mask"]
    assert len(accelerator.seen) == 1


@pytest.mark.parametrize("name", ["fast", "faithful"])
def test_blocks_are_uniform(open_source: OpenSource, name: str, monkeypatch: pytest.MonkeyPatch):
    """Chi-square of every byte plane of a few blocks, of neighbours and of planes together, at p = 7e-8 each.

    The system's generator is replaced by one that always says the same, so the test always says the same.
    """
    count = iter(range(1 << 20))
    monkeypatch.setattr(os, "urandom", lambda n: hashlib.shake_256(f"{name} {next(count)}".encode()).digest(n))
    keys = PadKeys()
    source = open_source(name=name, n_in=256, n_out=4, of=keys)
    pad = source.take(8 * N).use((8 * N, 256))
    moduli = slow.MODULI if name == "faithful" else (256, 256, 256)
    for modulus, plane in zip(moduli, pad.r, strict=True):
        assert -5.4 < z_of(np.bincount(plane.reshape(-1), minlength=modulus)) < 5.4
        for first, second in ((plane[:-1], plane[1:]), (plane[:, :-1], plane[:, 1:])):
            pairs = first.astype(np.int64) * modulus + second
            assert -5.4 < z_of(np.bincount(pairs.reshape(-1), minlength=modulus * modulus)) < 5.4
    for i in range(len(moduli)):
        for j in range(i):
            pairs = pad.r[i].astype(np.int64) * moduli[j] + pad.r[j]
            assert -5.4 < z_of(np.bincount(pairs.reshape(-1), minlength=moduli[i] * moduli[j])) < 5.4


def z_of(counts: np.ndarray) -> float:
    """Standard deviations of chi-square, by Wilson and Hilferty's cube root (PNAS 17, 1931)."""
    expected = counts.sum() / counts.size
    assert expected >= 5
    spread = 2 / (9 * (counts.size - 1))
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    return ((chi_square / (counts.size - 1)) ** (1 / 3) - (1 - spread)) / spread**0.5
