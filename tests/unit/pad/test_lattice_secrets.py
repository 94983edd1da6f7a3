"""Parameters and secrets of lattice pads: what ships, what z is, what is zeroed, what is refused."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracle import slow_lattice as slow
from tests.unit.pad._lattice_sources import MakeWeight, open_source, use

from cloister.errors import OffloadError, PadError, PadExhaustedError, PadReuseError, RingOverflowError
from cloister.pad import (
    LATTICE_PARAMETERS,
    CheckKeys,
    Direction,
    LatticeParameters,
    PadKeys,
    PadPool,
)
from cloister.pad import _lattice as lattice
from cloister.ring import FAITHFUL, FAST, FORMATS, quantize_weight

N = 1024


@pytest.fixture
def pool():
    with PadPool(0) as pool:
        yield pool


@pytest.mark.parametrize("bits", [2, 8, 9, 15, 16])
def test_secrets_times_weights_of_any_bits(keys: PadKeys, pool: PadPool, bits: int, monkeypatch: pytest.MonkeyPatch):
    """z is the product over the integers: the largest weights, and more outputs than are made at a time."""
    seen: list[tuple[np.ndarray, int]] = []
    real = lattice._encode

    def recorded(values: np.ndarray, code: int, to: np.ndarray, start: int) -> None:
        seen.append((values.copy(), start))
        real(values, code, to, start)
        assert not values.any()

    monkeypatch.setattr(lattice, "_encode", recorded)
    values = torch.randn(300, 270, generator=torch.Generator().manual_seed(bits)).sign() * 1.5
    weight = quantize_weight(values, FAITHFUL, layer="q", weight_bits=bits)
    assert int(weight.w_q.abs().max()) == 2 ** (bits - 1) - 1
    open_source(keys, weight, pool)
    assert [start for _, start in seen] == [0, 256, 0, 256]
    s, z = (np.concatenate([part for part, _ in seen[i : i + 2]], 1) for i in (0, 2))
    assert s.shape == (2 * N, 270) and set(np.unique(s)) == {-1, 0, 1}
    np.testing.assert_array_equal(z, s @ weight.w_q.numpy().astype(np.int64).T)


def test_each_secret_is_as_frequent(keys: PadKeys):
    digits = lattice._ternary(bytearray(32), 2 * N, 301)
    counts = np.bincount(digits.reshape(-1) + 1, minlength=3)
    expected = digits.size / 3
    assert ((counts - expected) ** 2).sum() / expected < 41  # chi-square with 2 degrees: p = 1e-9


def test_the_sets_that_ship():
    assert sorted(LATTICE_PARAMETERS) == ["faithful", "faithful-high", "fast", "fast-mlwe"]
    for name, made in LATTICE_PARAMETERS.items():
        par = slow.SETS[name]
        assert (made.name, made.degree, made.rank, made.primes) == (name, 1024, par.k, par.primes)
        assert made.modulus == par.q and par.q % par.p == 1
        assert FORMATS[made.ring].modulus == par.p
        assert made.has_noise == par.noise
        assert made.bytes_per_feature == 4096 * par.k * len(par.primes)
    assert LATTICE_PARAMETERS["fast"].bytes_per_feature == 8192
    assert LATTICE_PARAMETERS["faithful"].bytes_per_feature == 16384


@pytest.mark.parametrize("name", ["fast", "faithful", "faithful-high", "other"])
@pytest.mark.parametrize(
    "change",
    [{"degree": 512}, {"rank": 1}, {"degree": 512, "rank": 3}, {"rank": 4}, {"primes": (754974721, 545253377)},
     {"ring": "slow"}, {"has_noise": True}, {"degree": 2048, "rank": 1}],
    ids=["n 1024", "k 1", "n 1536", "k 4", "other primes", "other ring", "noise", "one ring"],
)  # fmt: skip
def test_other_sets_are_refused(name: str, change: dict[str, Any]):
    base = LATTICE_PARAMETERS.get(name) or LATTICE_PARAMETERS["fast"]
    with pytest.raises(PadError, match="not among the sets") as caught:
        replace(base, name=name, **change)
    assert "faithful-high" in caught.value.hint


def test_a_set_cannot_be_changed():
    with pytest.raises(AttributeError):
        LATTICE_PARAMETERS["fast"].rank = 1  # pyright: ignore


def test_parameters_of_another_format(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    with pytest.raises(PadError, match="not of the format fast"):
        open_source(keys, make_weight(FAST, 4, 4), pool, name="faithful")


def test_a_weight_without_room(keys: PadKeys, pool: PadPool):
    """What the one-time pad takes, with less than the rounding of these pads left."""
    weight = quantize_weight(torch.ones(1, 52000), FAST, layer="q")
    assert weight.forward_limit > math.sqrt(52000) + 1
    with pytest.raises(RingOverflowError, match="no room for the rounding"):
        open_source(keys, weight, pool)


def test_check_keys_of_another_layer(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    """The secrets that were made for it are zeroed."""
    seen: list[lattice.LatticeSecrets] = []
    real = lattice.LatticeSecrets.wipe

    def recorded(secrets: lattice.LatticeSecrets) -> None:
        assert secrets.s.any() and secrets.z.any()
        real(secrets)
        seen.append(secrets)

    monkeypatch.setattr(lattice.LatticeSecrets, "wipe", recorded)
    weight = make_weight(FAST, 4, 5)
    with pytest.raises(PadError, match="keys of the check"):
        keys.lattice("q", Direction.BACKWARD, weight, CheckKeys.generate(weight, Direction.FORWARD), pool=pool)
    assert len(seen) == 1 and not seen[0].s.any() and not seen[0].z.any()


@pytest.mark.parametrize("fail_at", ["_multiply", "_ternary"])
def test_secrets_that_could_not_be_made_are_zeroed(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch, fail_at: str
):
    made: list[np.ndarray] = []
    real = lattice._empty_keys

    def recorded(n_features: int, parameters: LatticeParameters) -> np.ndarray:
        made.append(real(n_features, parameters))
        return made[-1]

    def fail(*_: object) -> None:
        raise OffloadError("no")

    monkeypatch.setattr(lattice, "_empty_keys", recorded)
    monkeypatch.setattr(lattice, fail_at, fail)
    with pytest.raises(OffloadError):
        open_source(keys, make_weight(FAST, 4, 5), pool)
    if fail_at == "_multiply":
        assert not any(array.any() for array in made)


def test_secrets_lie_at_cache_lines(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    secrets = open_source(keys, make_weight(FAITHFUL, 17, 5), pool)._secrets
    assert secrets.s.shape == (1, 2, 2, N, 16) and secrets.z.shape == (2, 2, 2, N, 16)
    assert secrets.s.ctypes.data % 64 == 0 and secrets.z.ctypes.data % 64 == 0
    assert not secrets.s[..., 5:].any() and not secrets.z[1, ..., 1:].any()


def test_after_the_keys_were_closed(pool: PadPool, make_weight: MakeWeight):
    keys = PadKeys()
    keys.close()
    with pytest.raises(PadExhaustedError):
        open_source(keys, make_weight(FAST, 4, 5), pool)


def test_secrets_of_a_closed_source_are_not_used_again(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    """Even where the system's generator is stuck: the place in the job's count keeps them apart."""
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    weight, found = make_weight(FAST, 4, 5), []
    for _ in range(2):
        source = open_source(keys, weight, pool)
        found.append((source._secrets.s.tobytes(), use(source, 5).r.tobytes()))
        with pytest.raises(PadReuseError, match="serve one source"):
            open_source(keys, weight, pool)
        source.close()
    assert len({s for s, _ in found}) == len({r for _, r in found}) == 2
