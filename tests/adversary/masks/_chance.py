"""What an attack recovered, beside what guessing would have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recovery:
    """Of `n` secrets, how many the attack put first, and how many into the likelier half of the table.

    Attributes:
        n: rows, or different tokens of a batch.
        hits: of which the best guess was right.
        upper: of which the token was in the likelier half. Far more sensitive: a weak leak shows here first.
        p_hits: chance that guessing gets as many hits, exactly.
        p_upper: chance that guessing has as many, or as few, in the likelier half, exactly.
    """

    n: int
    hits: int
    upper: int
    p_hits: float
    p_upper: float

    @property
    def rate(self) -> float:
        return self.hits / self.n


def of_rows(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Recovery:
    """Scores [rows, tokens] and the token of each row. Guesses that do not depend on the truth are binomial."""
    rank = _ranks(scores, draw).gather(1, truth.unsqueeze(1))
    n, n_tokens = scores.shape
    hits, upper = int((rank == 0).sum()), int((rank < n_tokens // 2).sum())
    share = (n_tokens // 2) / n_tokens
    p_upper = 2 * min(binomial_tail(n, share, upper), binomial_tail(n, 1 - share, n - upper))
    return Recovery(n, hits, upper, binomial_tail(n, 1 / n_tokens, hits), min(1.0, p_upper))


def of_set(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Recovery:
    """Scores [tokens] and the tokens of the batch, of which the attack knows the number n: hypergeometric.

    The n likeliest tokens are the guess.
    """
    tokens = truth.unique()
    rank = _ranks(scores.unsqueeze(0), draw)[0, tokens]
    n, n_tokens = len(tokens), len(scores)
    hits, half = int((rank < n).sum()), n_tokens // 2
    upper = int((rank < half).sum())
    above = hypergeometric_tail(n_tokens, n, half, upper)
    below = hypergeometric_tail(n_tokens, n, n_tokens - half, n - upper)
    return Recovery(n, hits, upper, hypergeometric_tail(n_tokens, n, n, hits), min(1.0, 2 * min(above, below)))


def _ranks(scores: Tensor, draw: torch.Generator) -> Tensor:
    """Position of each token in the order of falling scores, ties broken at random."""
    mixed = torch.randperm(scores.shape[1], generator=draw)
    order = scores[:, mixed].argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, mixed[order], torch.arange(scores.shape[1]).expand_as(order))


def binomial_tail(n: int, p: float, k: int) -> float:
    """P(X >= k) for X of n trials that succeed with p, 0 < p < 1; exact but for float64."""
    logs = (math.log(math.comb(n, i)) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k, n + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def hypergeometric_tail(population: int, marked: int, drawn: int, k: int) -> float:
    """P(X >= k) for the marked ones among `drawn` of a population, without replacement; exact."""
    ways = sum(
        math.comb(marked, i) * math.comb(population - marked, drawn - i) for i in range(k, min(marked, drawn) + 1)
    )
    return ways / math.comb(population, drawn)
