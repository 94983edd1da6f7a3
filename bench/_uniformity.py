"""Whether what an accelerator saw is uniform and independent: chi-square, serial pairs, differences, autocorrelation.

`SeenStatistics` takes one message after another, so that the sample may be larger than memory. Every test is
two-sided: what is too even is as suspicious as what is uneven. The tests of the repository show their power.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from cloister.ring import RingFormat

Counts = npt.NDArray[np.int64]

_MIN_EXPECTED = 5  # in each cell, as usual; below it the statistic is not distributed as chi-square
_CELLS = 256  # of an element: both moduli are multiples of 256, so all cells are equal


class SeenStatistics:
    """The tests of everything that one accelerator saw of one layer and direction.

    Of each plane: its residues (256, 255, 253 or 251 of them), and pairs with the next feature and with the next token.
    Of two planes: pairs at the same place. Of the element of Z_m that all planes stand for: its highest 8 bits; those
    of its difference to the next feature, the next token, and the same place of the next message, where pads that are
    used twice cancel out; and the autocorrelation at these three lags.

    Args:
        fmt: of the planes.
    """

    def __init__(self, fmt: RingFormat) -> None:
        self._fmt = fmt
        self._moduli = fmt.pad_moduli
        self._counts: dict[str, Counts] = {}
        self._products: dict[str, float] = {}
        self._n_products: dict[str, int] = {}
        self._last: npt.NDArray[np.int64] | None = None
        self.n_bytes = 0

    def add(self, planes: npt.NDArray[np.int8]) -> None:
        """One message, int8 [planes, tokens, features]. Nothing of it is kept but its elements, until the next one.

        Raises:
            ValueError: a value that the encoding does not have, which by itself would tell it from a random one.
        """
        for i, (plane, modulus) in enumerate(zip(planes, self._moduli, strict=True)):
            if not -(modulus // 2) <= plane.min() <= plane.max() <= (modulus - 1) // 2:
                raise ValueError(f"plane {i} is not of balanced residues modulo {modulus}")
        residues = [residues_of(plane, modulus) for plane, modulus in zip(planes, self._moduli, strict=True)]
        for i, (residue, modulus) in enumerate(zip(residues, self._moduli, strict=True)):
            self._count(f"plane {i}: residues", residue.reshape(-1), modulus)
            self._count_pairs(f"plane {i}: next feature", residue[:, :-1:2], residue[:, 1::2], (modulus, modulus))
            self._count_pairs(f"plane {i}: next token", residue[:-1:2], residue[1::2], (modulus, modulus))
        for i, j in combinations(range(len(residues)), 2):
            self._count_pairs(f"planes {i} and {j}", residues[i], residues[j], (self._moduli[i], self._moduli[j]))
        elements = self._fmt.decode_product(torch.from_numpy(planes.astype(np.int32))).numpy()
        self._count("element", self._cells(elements), _CELLS)
        self._compare("next feature", elements[:, :-1], elements[:, 1:])
        self._compare("next token", elements[:-1], elements[1:])
        if self._last is not None and self._last.shape == elements.shape:
            self._compare("next message", self._last, elements)
        self._last = elements
        self.n_bytes += planes.size

    def p_values(self) -> dict[str, float]:
        """p of every test that has enough samples, by name; uniform in (0, 1) where the null hypothesis holds."""
        found = {name: p_of_counts(counts) for name, counts in self._counts.items() if _is_enough(counts)}
        for name, total in self._products.items():
            found[name] = p_of_normal(total / math.sqrt(self._n_products[name]))
        return found

    @property
    def too_small(self) -> list[str]:
        """Tests that need a larger sample, and are therefore not in `p_values`."""
        return [name for name, counts in self._counts.items() if not _is_enough(counts)]

    def worst(self) -> tuple[str, float]:
        """The test with the smallest p, and p of all tests together: the chance that any of them is as small."""
        found = self.p_values()
        if not found:
            raise ValueError("the sample is so small that there is no test for it")
        name = min(found, key=lambda each: found[each])
        return name, min(1.0, found[name] * len(found))  # Bonferroni: holds however the tests depend on each other

    def _compare(self, name: str, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Differences, which are independent even where the pairs overlap, and products."""
        if not first.size:
            return
        modulus = self._fmt.modulus
        self._count(f"element: difference to {name}", self._cells((second - first) % modulus), _CELLS)
        a, b = ((side - (modulus - 1) / 2).reshape(-1) / modulus for side in (first, second))
        name = f"element: autocorrelation, {name}"
        self._products[name] = self._products.get(name, 0.0) + 12 * float(a @ b)  # each factor has variance 1/12
        self._n_products[name] = self._n_products.get(name, 0) + first.size

    def _cells(self, elements: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return elements.reshape(-1) // (self._fmt.modulus // _CELLS)

    def _count_pairs(
        self, name: str, first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], moduli: tuple[int, int]
    ) -> None:
        """Pairs that do not overlap; a last feature or token without a partner is left out."""
        if second.size:
            first = first[: len(second), : second.shape[1]]
            cells = first.astype(np.int64) * moduli[1] + second
            self._count(name, cells.reshape(-1), math.prod(moduli))

    def _count(self, name: str, cells: npt.NDArray[np.integer], n_cells: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + np.bincount(cells, minlength=n_cells)


def residues_of(plane: npt.NDArray[np.int8], modulus: int) -> npt.NDArray[np.uint8]:
    """The representatives in [0, modulus) of balanced ones; spec/pad.md section 1.2."""
    unsigned = plane.view(np.uint8)
    return unsigned - np.where(plane < 0, np.uint8(256 - modulus), np.uint8(0))


def p_of_counts(counts: Counts) -> float:
    """Two-sided p of the chi-square of equally likely cells."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    above = chi_square_sf(statistic, counts.size - 1)
    return min(1.0, 2 * min(above, 1 - above))


def p_of_normal(z: float) -> float:
    """Two-sided p of a standard normal variable."""
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square_sf(statistic: float, degrees: int) -> float:
    """How likely a chi-square variable is above `statistic`: the regularised upper incomplete gamma function."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _is_enough(counts: Counts) -> bool:
    return bool(counts.sum() >= _MIN_EXPECTED * counts.size)
