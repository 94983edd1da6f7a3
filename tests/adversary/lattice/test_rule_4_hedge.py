"""Rule 4: a is secret, and hedged: restored counters and keys give another a in every block that is begun later."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from tests.adversary.lattice.conftest import MakeWeight, OpenSource

from cloister.pad import LATTICE_PARAMETERS, CheckKeys, Direction, LatticePads, PadKeys, PadPool
from cloister.pad import _lattice_pads as pads
from cloister.pad._lattice import LatticeSecrets
from cloister.ring import FORMATS

N = 1024


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every a, as bytes."""
    found: list[bytes] = []
    real = pads._uniform

    def recorded(key: bytearray, parameters):
        a = real(key, parameters)
        found.append(a.tobytes())
        return a

    monkeypatch.setattr(pads, "_uniform", recorded)
    return found


def restore(source: LatticePads, key: bytes) -> None:
    """Key, counter and blocks as they were at the start, as in memory that was rolled back; no caller can do that."""
    source._key[:] = key
    source.ledger._cell.n_taken = 0
    source._rests.clear()


def test_a_restored_counter_and_key_give_another_a(open_source: OpenSource, vectors: list[bytes]):
    source = open_source()
    key, found = bytes(source._key), []
    for _ in range(3):
        restore(source, key)
        pad = source.take(N).use((N, 5))
        assert pad.start == 0
        found.append(pad.r.tobytes())
    assert len(set(vectors)) == len(set(found)) == 3


def test_two_machines_of_one_snapshot_have_other_vectors(pool: PadPool, make_weight: MakeWeight, vectors: list[bytes]):
    """Same key, same secrets, same counter; only the system's generator differs."""
    weight, parameters = make_weight("faithful"), LATTICE_PARAMETERS["faithful"]
    twins = []
    for _ in range(2):
        secrets = LatticeSecrets.generate(bytearray(32), weight, Direction.FORWARD, parameters)
        check = CheckKeys.generate(weight, Direction.FORWARD)
        twins.append(LatticePads(bytearray(32), secrets, check, pool))
    twins[1]._secrets.s[:], twins[1]._secrets.z[:] = twins[0]._secrets.s, twins[0]._secrets.z
    for _ in range(2):
        first, second = (twin.take(N).use((N, 5)) for twin in twins)
        assert (first.r == second.r).mean() < 0.02
    assert len(set(vectors)) == 4


def test_secrets_are_hedged_too(make_weight: MakeWeight):
    weight, parameters = make_weight(), LATTICE_PARAMETERS["fast"]
    one, other = (LatticeSecrets.generate(bytearray(32), weight, Direction.FORWARD, parameters).s for _ in range(2))
    assert (one == other).mean() < 0.8  # most lanes of the block are empty


def test_every_block_draws_fresh_bytes(open_source: OpenSource, monkeypatch: pytest.MonkeyPatch):
    source, drawn = open_source(), []
    real = os.urandom

    def recorded(n: int) -> bytes:
        drawn.append(real(n))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", recorded)
    for n_tokens in (1, N, 2 * N + 5, 1000):
        source.take(n_tokens)
    assert [len(fresh) for fresh in drawn] == [32] * 4
    assert len(set(drawn)) == 4


def test_a_stuck_generator_still_has_the_counter(
    open_source: OpenSource, vectors: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    for layer in ("q", "k"):
        for direction in Direction:
            open_source(layer, direction, n_out=5).take(4 * N)
    assert len(vectors) == len(set(vectors)) == 16


@pytest.mark.parametrize("name", list(LATTICE_PARAMETERS))
def test_a_is_uniform_below_each_prime(name: str):
    """32 equal intervals of 2^17 values: chi-square at p = 1e-9, on values that never change."""
    parameters = LATTICE_PARAMETERS[name]
    keys = [bytearray(hashlib.sha256(f"{name} {i}".encode()).digest()) for i in range(64)]
    a = np.stack([pads._uniform(key, parameters) for key in keys]).astype(np.uint64)
    for c, prime in enumerate(parameters.primes):
        values = a[:, c].reshape(-1)
        assert int(values.max()) < prime
        counts = np.bincount((values * 32 // prime).astype(np.int64), minlength=32)
        expected = values.size / 32
        assert 5 < ((counts - expected) ** 2).sum() / expected < 106
        assert len(np.unique(values)) > 0.99 * values.size
    assert FORMATS[parameters.ring].modulus < parameters.modulus
    # No two polynomials, primes or blocks share a stream.
    rows = a.reshape(-1, N)
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_a_is_nowhere_afterwards(keys: PadKeys, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch):
    """a and its noise are zeroed, and so is their key."""
    seen: list[np.ndarray | bytearray] = []
    make, make_noise = pads._uniform, LatticePads._draw_noise

    def uniform(key: bytearray, parameters):
        seen.extend([key, make(key, parameters)])
        return seen[-1]

    def noise(source: LatticePads, key: bytearray):
        seen.append(make_noise(source, key))
        return seen[-1]

    monkeypatch.setattr(pads, "_uniform", uniform)
    monkeypatch.setattr(LatticePads, "_draw_noise", noise)
    open_source(name="fast-mlwe").take(5)
    assert len(seen) == 3
    assert not any(np.frombuffer(each, np.uint8).any() for each in seen)
