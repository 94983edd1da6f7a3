"""The attacks have power: each recovers the tokens under the mask that it is made for."""

from __future__ import annotations

import pytest
import torch
from tests.adversary.masks import _attacks as attacks
from tests.adversary.masks import _chance as chance
from tests.adversary.masks._seen import N_TOKENS, public_table

ROWS = 64


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def tokens(draw: torch.Generator) -> torch.Tensor:
    return torch.randint(N_TOKENS, (ROWS,), generator=draw)


def unit() -> float:
    """Root mean square of the features: sizes of masks are multiples of it."""
    return float(public_table().square().mean().sqrt())


@pytest.mark.parametrize("size", [1.0, 2.0**10, 1e6, 1e8], ids="{:g}".format)
def test_a_float_uniform_mask_of_any_size_gives_every_token_from_one_look(size: float, tokens, draw):
    table = public_table()
    seen = attacks.mask_uniform(table[tokens], size * unit(), draw)
    found = chance.of_rows(attacks.attack_uniform(seen, table, size * unit()), tokens, draw)
    assert found.rate >= 0.98


def test_a_float_gaussian_mask_leaks_more_with_every_exposure(tokens, draw):
    table, rates, upper = public_table(), [], []
    seen = torch.stack([attacks.mask_gaussian(table[tokens], 30 * unit(), draw) for _ in range(256)])
    for n_exposures in (1, 4, 16, 64, 256):
        found = chance.of_rows(attacks.attack_gaussian(seen[:n_exposures], table), tokens, draw)
        rates.append(found.rate)
        upper.append(found.upper / found.n)
    assert rates == sorted(rates)
    assert upper[0] > 0.65, "one exposure to a mask of 30 times the features already says which half of the vocabulary"
    assert rates[3] > 0.75
    assert rates[4] >= 0.98


@pytest.mark.parametrize("is_public", [True, False], ids=["public", "secret"])
@pytest.mark.parametrize("size", [1.0, 1e4], ids="{:g}".format)
def test_a_low_rank_mask_of_any_size_gives_every_token(size: float, is_public: bool, tokens, draw):
    table, rank = public_table(), 16
    seen, b = attacks.mask_low_rank(table[tokens], size * unit(), rank, draw)
    scores = attacks.attack_low_rank(seen, table, rank, public=b if is_public else None)
    assert chance.of_rows(scores, tokens, draw).rate >= 0.98


@pytest.mark.parametrize("rows", [ROWS, 256])
def test_a_token_mixing_mask_gives_every_token_of_the_batch(rows: int, draw):
    table = public_table()
    tokens = torch.randint(N_TOKENS, (rows,), generator=draw)
    seen = attacks.mask_mixing(table[tokens], draw)
    found = chance.of_set(attacks.attack_mixing(seen, table), tokens, draw)
    assert found.rate >= 0.98
    assert found.p_hits < 1e-50


def test_the_attacks_need_the_mask_that_they_are_made_for(tokens, draw):
    """A full-precision mask of the size of the modulus leaves nothing: the scores are not made of the table alone."""
    table = public_table()
    seen = torch.rand((ROWS, table.shape[1]), generator=draw) * 1e9
    for scores in (attacks.attack_uniform(seen, table, 1e9), attacks.attack_low_rank(seen, table, 16)):
        assert chance.of_rows(scores, tokens, draw).p_hits > 1e-6
    assert chance.of_set(attacks.attack_mixing(seen, table), tokens, draw).p_hits > 1e-6
