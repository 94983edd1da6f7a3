"""Rule 7: secrets come from the system's generator through AES-256; nobody else's generator, and nobody's seed."""

from __future__ import annotations

import random  # noqa: TID251  # to make it refuse
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.adversary.lattice.conftest import MakeWeight

import cloister.pad
from cloister.errors import PadError
from cloister.pad import LATTICE_PARAMETERS, CheckKeys, Direction, LatticeParameters, PadKeys, PadPool
from cloister.pad import _lattice_pads as pads
from cloister.pad import _stream as stream_module


def functions(module: object) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_") and isinstance(getattr(module, name), Callable)]


@pytest.mark.parametrize("name", list(LATTICE_PARAMETERS))
def test_other_generators_are_never_asked(make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch, name: str):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a generator that makes no secrets was asked")

    weight = make_weight(name, 40, 30)
    with monkeypatch.context() as patch:
        for module in (random, np.random):  # noqa: TID251
            for function in functions(module):
                patch.setattr(module, function, refuse)
        for function in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli",
                         "manual_seed", "multinomial", "normal", "poisson"):  # fmt: skip
            patch.setattr(torch, function, refuse)
        for function in ("random_", "uniform_", "normal_", "bernoulli_", "exponential_"):
            patch.setattr(torch.Tensor, function, refuse)
        keys = PadKeys()
        with PadPool(1 << 22) as pool:
            for direction in Direction:
                check = CheckKeys.generate(weight, direction)
                source = keys.lattice("q", direction, weight, check, pool=pool, parameters=LATTICE_PARAMETERS[name])
                for n_tokens in (700, 700, 1100):
                    source.take(n_tokens)
            keys.new_job()
            keys.close()
        with pytest.raises(AssertionError):
            np.random.default_rng()  # noqa: TID251


def test_no_caller_supplies_a_secret(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    """Neither the way to lattice pads nor what it gives takes a key, a seed, a vector, secrets or noise."""
    weight = make_weight()
    check = CheckKeys.generate(weight, Direction.FORWARD)
    common: dict[str, Any] = {"pool": pool}
    for extra in ("key", "seed", "a", "s", "S", "secrets", "noise", "counter", "fresh", "generator"):
        with pytest.raises(TypeError):
            keys.lattice("q", Direction.FORWARD, weight, check, **common, **{extra: bytes(32)})
    source = keys.lattice("q", Direction.FORWARD, weight, check, **common)
    for attempt in (
        lambda: source.take(5, bytes(32)),  # pyright: ignore
        lambda: source.take(n_tokens=5, a=np.zeros((1, 2, 1024), np.uint32)),  # pyright: ignore
        lambda: PadKeys(bytes(32)),  # pyright: ignore
    ):
        with pytest.raises(TypeError):
            attempt()
    assert "LatticeSecrets" not in cloister.pad.__all__


def test_no_caller_brings_parameters_of_its_own():
    with pytest.raises(PadError, match="not among the sets"):
        LatticeParameters("fast", "fast", 1024, 1, (754974721,), False)
    with pytest.raises(PadError, match="not among the sets"):
        LatticeParameters("mine", "fast", 1024, 2, (754974721,), False)


def test_every_key_is_of_256_bits_and_of_one_use(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    """No two purposes share an AES key, even where the system's generator is stuck."""
    used: list[bytes] = []
    for module in (pads, cloister.pad._expand):
        real = module.algorithms.AES256

        def recorded(key: bytes, real: Any = real):
            used.append(bytes(key))
            return real(key)

        monkeypatch.setattr(module, "algorithms", type("A", (), {"AES256": staticmethod(recorded)}))
    monkeypatch.setattr(stream_module.os, "urandom", lambda n: bytes(n))
    for name in ("fast-mlwe", "faithful"):
        weight = make_weight(name, 6, 5)
        for direction in Direction:
            check = CheckKeys.generate(weight, direction)
            source = keys.lattice(name, direction, weight, check, pool=pool, parameters=LATTICE_PARAMETERS[name])
            keys.stream(name, direction).draw((5,), (256,)).use((5,))
            for _ in range(3):
                source.take(1024)
    assert {len(key) for key in used} == {32}
    assert len(used) == len(set(used)) == 4 + 4 + 4 * 3 + 2 * 3
