"""The kernels of the lattice pad against Python's integers, on every level."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from tests.oracle import slow_lattice as slow
from tests.unit.native import data

from cloister.kernels import _native

N = 1024
RING = {"fast": 1, "fast-mlwe": 1, "faithful": 0, "faithful-high": 0}
SETS = pytest.mark.parametrize("name", RING)
BOTH = pytest.mark.parametrize("name", ["fast", "faithful"])

Blocks = tuple[np.ndarray, np.ndarray, np.ndarray]


def values(seed: int, par: slow.Set) -> np.ndarray:
    """a: uniform enough below each prime."""
    words = data.integers(seed, (len(par.primes), par.k, N), np.uint32)
    return (words % np.array(par.primes, np.uint32)[:, None, None]).astype(np.uint32)


def encode(secrets: np.ndarray, name: str) -> np.ndarray:
    """`secrets` [rank * 1024, features]."""
    par = slow.SETS[name]
    keys = np.empty((-(-secrets.shape[1] // 16), len(par.primes), par.k, N, 16), np.uint32)
    _native.lattice_encode(np.ascontiguousarray(secrets, np.int64), RING[name], keys)
    return keys


def block(
    name: str,
    a: np.ndarray,
    s: np.ndarray,
    z: np.ndarray,
    v: np.ndarray,
    rho: np.ndarray,
    noise: np.ndarray | None = None,
) -> Blocks | None:
    """One block in the middle of something larger, of which the rest must stay as it is."""
    shape = (4 - RING[name], N + 5, len(v))
    r, u, k = np.full(shape, 7, np.uint8), np.full((N + 5, len(rho)), 8, np.uint32), np.full(N + 5, 9, np.uint64)
    usable = _native.lattice_block(RING[name], a, s, z, v, rho, noise, r, u, k, 3)
    for array, filled in ((r.swapaxes(0, 1), 7), (u, 8), (k, 9)):
        assert (array[:3] == filled).all()
        assert (array[3 + N :] == filled).all()
    inside = slice(3, 3 + N)
    return (r[:, inside], u[inside], k[inside]) if usable else None


def bytes_of_noise(seed: int, n_in: int) -> np.ndarray:
    return data.integers(seed, (2, N, n_in), np.uint8) % np.array([252, 255], np.uint8)[:, None, None]


def bytes_for(error: int) -> tuple[int, int]:
    """Bytes that stand for an error."""
    return (error + 22) % 9 + 243, (error + 22) // 9 + 250


def keys(seed: int, n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    return data.integers(seed, (n_in,), np.uint64), data.integers(seed + 1, (n_out,), np.uint64)


class Case:
    """A small layer of a parameter set with what the oracle makes of it."""

    def __init__(self, name: str) -> None:
        par, (n_in, n_out) = slow.SETS[name], (3, 2)
        seed = sorted(RING).index(name)
        self.a = values(seed, par)
        self.s = data.integers(seed, (par.k * N, n_in), np.uint8).astype(np.int64) % 3 - 1
        weight = data.integers(seed, (n_out, n_in), np.int16).astype(np.int64)
        self.z = self.s @ weight.T
        self.rho = data.integers(seed, (n_out,), np.uint64)
        self.v = weight.T.astype(np.uint64) @ self.rho
        self.noise = bytes_of_noise(seed, n_in) if par.noise else None
        added = None
        if self.noise is not None:
            added = (self.noise[0].astype(np.int64) % 9 + 9 * (self.noise[1].astype(np.int64) % 5) - 22).tolist()
        split = [
            [secrets[:, i].reshape(par.k, N).tolist() for i in range(secrets.shape[1])] for secrets in (self.s, self.z)
        ]
        polynomials = slow.polynomials(self.a.tolist(), par)
        found = slow.block(polynomials, *split, self.v.tolist(), self.rho.tolist(), par, added)
        assert found is not None
        self.r = np.array([[slow.planes(x, par) for x in row] for row in found.r], np.uint8).transpose(2, 0, 1)
        self.u = np.array([[x % par.p for x in row] for row in found.u], np.uint32)
        self.correction = np.array(found.correction, np.uint64)


case: Callable[[str], Case] = cache(Case)


@SETS
def test_a_block_is_that_of_python_integers(level: str, name: str) -> None:
    made = case(name)
    found = block(name, made.a, encode(made.s, name), encode(made.z, name), made.v, made.rho, made.noise)
    assert found is not None
    for ours, theirs in zip(found, (made.r, made.u, made.correction), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@SETS
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 16), (17, 1), (66, 81), (64, 128)])
def test_a_feature_does_not_depend_on_the_others(name: str, n_in: int, n_out: int) -> None:
    """So widths around those of vectors and groups give what the small layer gives."""
    made, par = case(name), slow.SETS[name]
    columns_in, columns_out = np.arange(n_in) % 3, np.arange(n_out) % 2
    v, rho = keys(5, n_in, n_out)
    noise = None if made.noise is None else np.ascontiguousarray(made.noise[:, :, columns_in])
    found = block(
        name, made.a, encode(made.s[:, columns_in], name), encode(made.z[:, columns_out], name), v, rho, noise
    )
    assert found is not None
    r, u, correction = found
    np.testing.assert_array_equal(r, made.r[:, :, columns_in])
    np.testing.assert_array_equal(u, made.u[:, columns_out])
    # The correction is linear in the keys, so keys added up for equal features give the same.
    added_v = [sum(v[columns_in == i].tolist()) % 2**64 for i in range(3)]
    added_rho = [sum(rho[columns_out == o].tolist()) % 2**64 for o in range(2)]
    small = block(name, made.a, encode(made.s, name), encode(made.z, name), *_words(added_v, added_rho), made.noise)
    assert small is not None
    np.testing.assert_array_equal(correction, small[2])
    assert par.k in (2, 3)


def _words(*sums: list[int]) -> list[np.ndarray]:
    return [np.array(each, np.uint64) for each in sums]


def chosen(v: list[int], name: str) -> np.ndarray:
    """Keys with which a_0 = 1, a_1 = 0 gives these values of v, one for each token of one feature."""
    par = slow.SETS[name]
    parts = []
    for c, q in enumerate(par.primes):
        secrets = np.zeros((par.k * N, 1), np.int64)
        secrets[:N, 0] = [x % q for x in v]
        parts.append(encode(secrets, name)[:, c : c + 1])
    return np.ascontiguousarray(np.concatenate(parts, 1))


def one(name: str) -> np.ndarray:
    a = np.zeros((len(slow.SETS[name].primes), slow.SETS[name].k, N), np.uint32)
    a[:, 0] = 1
    return a


def edges(par: slow.Set) -> list[int]:
    """Values of v at both sides of where rounding changes, at the ends and in the middle; and random ones."""
    whole = [word % par.q for word in data.integers(1, (N,), np.uint64).tolist()]
    places = [0, 1, 2, par.p // 2 - 1, par.p // 2, par.p - 2, par.p - 1, *(word % par.p for word in whole[:400])]
    found = {0, 1, par.q - 1, par.q // 2, par.q // 2 + 1, par.q // 2 - 1}
    for place in places:
        middle = (2 * place + 1) * par.q // (2 * par.p)
        found |= {x for x in (middle, middle + 1) if 0 <= x < par.q}
    found.discard(slow.EXCLUDED if par.is_fast else -1)
    many = sorted(found)
    assert 700 < len(many) < N
    return many + whole[len(many) :]


@BOTH
def test_rounding_at_its_edges(level: str, name: str) -> None:
    par = slow.SETS[name]
    v = edges(par)
    secrets = chosen(v, name)
    v_key, rho = np.array([3], np.uint64), np.array([0], np.uint64)
    found = block(name, one(name), secrets, secrets, v_key, rho)
    assert found is not None
    expected = [slow.rounded(x, par) for x in v]
    assert found[0][:, :, 0].T.tolist() == [list(slow.planes(x, par)) for x in expected]
    assert found[1][:, 0].tolist() == [x % par.p for x in expected]
    inverse = pow(par.q, -1, 2**64)
    sums = [3 * (par.q * r - par.p * x) * inverse % 2**64 for r, x in zip(expected, v, strict=True)]
    assert found[2].tolist() == sums


@pytest.mark.parametrize("token", [0, 511, 1023])
@pytest.mark.parametrize("feature", [0, 16, 69])
def test_the_excluded_value_is_found(level: str, token: int, feature: int) -> None:
    v = [5] * N
    v[token] = slow.EXCLUDED
    secrets = np.zeros((2 * N, 70), np.int64)
    secrets[:N, feature] = v
    none = np.zeros((2 * N, 1), np.int64)
    wide, narrow = encode(secrets, "fast"), encode(none, "fast")
    v_key, rho = keys(1, 70, 1)
    assert block("fast", one("fast"), wide, narrow, v_key, rho) is None
    secrets[token, feature] += 1
    assert block("fast", one("fast"), encode(secrets, "fast"), narrow, v_key, rho) is not None
    # What takes a pad off may have any value: nobody sees it.
    assert block("fast", one("fast"), narrow, wide, rho, v_key) is not None


@pytest.mark.parametrize("error", [-22, 0, 22])
def test_the_excluded_value_with_noise(level: str, error: int) -> None:
    secrets = np.zeros((2 * N, 1), np.int64)
    secrets[7, 0] = slow.EXCLUDED - error
    noise = np.zeros((2, N, 1), np.uint8)
    noise[:, 7, 0] = bytes_for(error)
    v, rho = keys(1, 1, 1)
    made = encode(secrets, "fast")
    assert block("fast", one("fast"), made, made, v, rho, noise) is None
    noise[:, 7, 0] = bytes_for(-21 if error == 22 else error + 1)
    assert block("fast", one("fast"), made, made, v, rho, noise) is not None


def test_noise_of_every_byte(level: str) -> None:
    """Each byte of either kind, seen in r; together every error comes from as many pairs."""
    par, v = slow.SETS["fast-mlwe"], 45 * 1000
    noise = np.stack([np.arange(N) % 252, np.arange(N) % 255]).astype(np.uint8)[:, :, None]
    made = chosen([v] * N, "fast")
    found = block("fast", one("fast"), made, made, *keys(1, 1, 1), noise)
    assert found is not None
    errors = [x % 9 + 9 * (y % 5) - 22 for x, y in noise[:, :, 0].T.tolist()]
    assert found[0][:, :, 0].T.tolist() == [list(slow.planes(slow.rounded(v + error, par), par)) for error in errors]
    pairs = np.bincount([x % 9 + 9 * (y % 5) for x in range(252) for y in range(255)])
    assert pairs.tolist() == [28 * 51] * 45


def test_digits_of_every_byte(level: str) -> None:
    every = np.arange(243, dtype=np.uint8)
    digits = np.empty(5 * 243 - 2, np.int8)
    _native.lattice_digits(every, digits)
    assert digits.tolist() == [b // 3**f % 3 - 1 for b in range(243) for f in range(5)][:-2]


@BOTH
def test_secrets_of_any_size(level: str, name: str) -> None:
    """Both ends of what the transform takes, seen through a = 1: a large z is reduced before it is rounded."""
    par = slow.SETS[name]
    z = [2**34 - 1, -(2**34 - 1), 2**33, -(2**33), 0, 1, -1, *par.primes, *(-q for q in par.primes), 2**32, -(2**32)]
    secrets = np.zeros((par.k * N, 1), np.int64)
    secrets[: len(z), 0] = z
    narrow = encode(np.zeros((par.k * N, 1), np.int64), name)
    found = block(name, one(name), narrow, encode(secrets, name), *keys(3, 1, 1))
    assert found is not None
    assert found[1][: len(z), 0].tolist() == [slow.rounded(x % par.q, par) % par.p for x in z]


@SETS
def test_levels_agree_on_a_wide_layer(name: str) -> None:
    par, (n_in, n_out) = slow.SETS[name], (200, 300)
    a, (v, rho) = values(1, par), keys(2, n_in, n_out)
    s = data.integers(3, (par.k * N, n_in), np.uint8).astype(np.int64) % 3 - 1
    z = data.integers(4, (par.k * N, n_out), np.int32).astype(np.int64)
    noise = bytes_of_noise(5, n_in) if par.noise else None
    before, results = _native.level(), []
    try:
        for level in _native.levels():
            _native.use_level(level)
            found = block(name, a, encode(s, name), encode(z, name), v, rho, noise)
            assert found is not None
            results.append([array.tobytes() for array in found])
    finally:
        _native.use_level(before)
    assert all(result == results[0] for result in results)


def arguments() -> dict[str, object]:
    zeros = np.zeros((1, 1, 2, N, 16), np.uint32)
    return {
        "ring": 1,
        "a": np.zeros((1, 2, N), np.uint32),
        "s": zeros,
        "z": zeros.copy(),
        "v": np.zeros(3, np.uint64),
        "rho": np.zeros(2, np.uint64),
        "noise": None,
        "r": np.zeros((3, N, 3), np.uint8),
        "u": np.zeros((N, 2), np.uint32),
        "correction": np.zeros(N, np.uint64),
        "first": 0,
    }


def test_arguments_that_fit():
    assert _native.lattice_block(**arguments())


WRONG = {
    "ring": [2, -1, 0],
    "a": [np.full((1, 2, N), 754974721, np.uint32), np.zeros((1, 2, 512), np.uint32), np.zeros((1, 4, N), np.uint32),
          np.zeros((1, 1, N), np.uint32), np.zeros((2, 2, N), np.uint32), np.zeros((1, 2, N), np.int32)],
    "s": [np.zeros((2, 1, 2, N, 16), np.uint32), np.zeros((1, 2, 2, N, 16), np.uint32),
          np.zeros((1, 1, 3, N, 16), np.uint32), np.zeros((1, 1, 2, N, 8), np.uint32)],
    "z": [np.zeros((0, 1, 2, N, 16), np.uint32), np.zeros((1, 1, 2, 2 * N, 16), np.uint32)[:, :, :, ::2]],
    "v": [np.zeros(17, np.uint64), np.zeros(3, np.int64)],
    "rho": [np.zeros(3, np.uint64)],
    "noise": [np.zeros((2, N, 2), np.uint8), np.zeros((2, N - 1, 3), np.uint8), np.zeros((1, N, 3), np.uint8)],
    "r": [np.zeros((4, N, 3), np.uint8), np.zeros((3, N, 4), np.uint8), np.zeros((3, N - 1, 3), np.uint8)],
    "u": [np.zeros((N, 3), np.uint32), np.zeros((N + 1, 2), np.uint32)],
    "correction": [np.zeros(N - 1, np.uint64)],
    "first": [1, N, 2**63],
}  # fmt: skip


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, values in WRONG.items() for i in range(len(values))])
def test_arguments_that_do_not_fit(name: str, which: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        _native.lattice_block(**{**arguments(), name: WRONG[name][which]})


def test_noise_is_for_fast_only():
    faithful = {"ring": 0, "a": np.zeros((2, 2, N), np.uint32), "r": np.zeros((4, N, 3), np.uint8)}
    both = np.zeros((1, 2, 2, N, 16), np.uint32)
    made = {**arguments(), **faithful, "s": both, "z": both}
    assert _native.lattice_block(**made)
    with pytest.raises(ValueError, match="fast only"):
        _native.lattice_block(**{**made, "noise": np.zeros((2, N, 3), np.uint8)})


def test_other_kernels_refuse_other_shapes():
    with pytest.raises(ValueError, match="five digits"):
        _native.lattice_digits(np.zeros(1, np.uint8), np.zeros(6, np.int8))
    good, out = np.zeros((2 * N, 16), np.int64), np.zeros((1, 1, 2, N, 16), np.uint32)
    _native.lattice_encode(good, 1, out)
    for values_, ring, made in (
        (good, 0, out),
        (good[: 2 * N - 1], 1, out),
        (good[:N], 1, out),
        (np.zeros((2 * N, 17), np.int64), 1, out),
        (good, 1, np.zeros((1, 1, 3, N, 16), np.uint32)),
    ):
        with pytest.raises(ValueError):
            _native.lattice_encode(values_, ring, made)
    with pytest.raises(ValueError, match="each element"):
        _native.lattice_preimages(np.zeros(5, np.uint8))
