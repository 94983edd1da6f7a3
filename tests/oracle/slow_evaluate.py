"""A second implementation of the figures and tests: by enumeration and by the textbook, without cloister's code."""

from __future__ import annotations

import itertools
import math
import re
from fractions import Fraction


def rouge_l(reference: str, completion: str) -> float:
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, completion))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def sign_flip_p(differences: list[Fraction]) -> Fraction:
    """Every way to flip signs: how often the sum is as far out, in either direction, as the one that was seen."""
    seen = abs(sum(differences))
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    far = [sum(s * d for s, d in zip(flips, differences, strict=True)) for flips in signs]
    return Fraction(sum(abs(total) >= seen for total in far), len(signs))


def mcnemar_p(better: int, worse: int, *, mid: bool = False) -> Fraction:
    """Fagerland, Lydersen and Laake, 2013, equations 1 and 2 of their supplement."""
    n, least = better + worse, min(better, worse)
    point = Fraction(math.comb(n, least), 2**n)
    exact = min(Fraction(1), 2 * sum(Fraction(math.comb(n, k), 2**n) for k in range(least + 1)))
    if not mid:
        return exact
    return 1 - point / 2 if better == worse else exact - point


def holm(p_values: list[float]) -> list[float]:
    """Holm, 1979: the k-th smallest of m times m - k + 1, never below the one before, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        found[i] = highest
    return found


def benjamini_hochberg(p_values: list[float]) -> list[float]:
    """The k-th smallest of m times m / k, never above the one after, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, lowest = [0.0] * len(p_values), 1.0
    for place in reversed(range(len(order))):
        lowest = min(lowest, p_values[order[place]] * len(order) / (place + 1))
        found[order[place]] = lowest
    return found
