"""The attacks on what the accelerator really sees: they do as well as guessing, however its planes are read.

Each bound is on the exact chance of guessing, 1e-9, so that keys of the system's generator never fail it. Guessing gets
0.13 of 256 rows right, and 6 would fail; 128 rows have their token in the likelier half, and 177 or 79 would fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.adversary.masks import _attacks as attacks
from tests.adversary.masks import _chance as chance
from tests.adversary.masks._seen import (
    KINDS,
    N_TOKENS,
    Kind,
    Reading,
    Session,
    encode_with,
    limit_of,
    public_table,
    readings,
)

from cloister.pad import Direction
from cloister.ring import FORMATS, RingFormat

P_BOUND = 1e-9
ROWS = 256
EXPOSURES = 16


@dataclass(frozen=True)
class Case:
    tokens: torch.Tensor
    readings: list[Reading]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def case(request: pytest.FixtureRequest) -> Case:
    kind: Kind = request.param
    table, fmt = public_table(), kind.fmt
    tokens = torch.randint(N_TOKENS, (ROWS,), generator=torch.Generator().manual_seed(21))
    with Session(kind, Direction.FORWARD, table.shape[1]) as session:
        planes = np.stack([session.planes_of(table[tokens]) for _ in range(EXPOSURES)])
    return Case(tokens, readings(planes, fmt, table, limit_of(fmt, Direction.FORWARD, table.shape[1])))


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(22)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_the_same_attacks_on_the_same_readings_break_pads_that_are_short(fmt: RingFormat, draw: torch.Generator):
    """Whole numbers below 2^8 in place of uniform elements: what follows is the pads' doing, not the readings'."""
    table, bits = public_table(), 8
    tokens = torch.randint(N_TOKENS, (32,), generator=draw)
    limit = limit_of(fmt, Direction.FORWARD, table.shape[1])
    short = torch.randint(2**bits, (4, 32, table.shape[1]), generator=draw)
    planes = np.stack([encode_with(fmt, table[tokens], limit, pad) for pad in short])
    best = dict.fromkeys(("uniform", "gaussian", "low-rank", "mixing"), 0.0)
    for reading in readings(planes, fmt, table, limit):
        size = reading.size / reading.levels * 2**bits
        scores = attacks.attack_uniform(reading.seen[0], reading.table, size, levels=2**bits, n_features=64)
        found = {
            "uniform": chance.of_rows(scores, tokens, draw),
            "gaussian": chance.of_rows(attacks.attack_gaussian(reading.seen, reading.table), tokens, draw),
            "low-rank": chance.of_rows(attacks.attack_low_rank(reading.seen[0], reading.table, 1), tokens, draw),
            "mixing": chance.of_set(attacks.attack_mixing(reading.seen[0], reading.table), tokens, draw),
        }
        best = {name: max(best[name], found[name].rate) for name in found}
    assert min(best.values()) >= 0.98, best


def is_chance(found: chance.Recovery) -> bool:
    return found.p_hits > P_BOUND and found.p_upper > P_BOUND


def test_the_attack_on_uniform_masks_gets_nothing(case: Case, draw: torch.Generator):
    for reading in case.readings:
        scores = attacks.attack_uniform(
            reading.seen[0][:64], reading.table, reading.size, levels=reading.levels, n_features=16
        )
        assert is_chance(chance.of_rows(scores, case.tokens[:64], draw)), reading.name


def test_the_attack_on_gaussian_masks_gets_nothing_from_any_number_of_exposures(case: Case, draw: torch.Generator):
    for reading in case.readings:
        for n in (1, EXPOSURES):
            scores = attacks.attack_gaussian(reading.seen[:n], reading.table)
            assert is_chance(chance.of_rows(scores, case.tokens, draw)), (reading.name, n)


@pytest.mark.parametrize("rank", [1, 16, 64])
def test_the_attack_on_low_rank_masks_gets_nothing(case: Case, rank: int, draw: torch.Generator):
    for reading in case.readings:
        scores = attacks.attack_low_rank(reading.seen[0], reading.table, rank)
        assert is_chance(chance.of_rows(scores, case.tokens, draw)), reading.name


def test_the_attack_on_mixing_masks_gets_nothing(case: Case, draw: torch.Generator):
    for reading in case.readings:
        scores = attacks.attack_mixing(reading.seen[0], reading.table)
        assert is_chance(chance.of_set(scores, case.tokens, draw)), reading.name
