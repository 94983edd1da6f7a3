"""How many tokens an accelerator recovers from masked features: float, low-rank and mixing masks (peer) against ours.

The attacks are those of tests/adversary/masks. The accelerator knows the public model, so it has a table of the
features of 2,000 tokens (all-MiniLM-L6-v2 where it is installed); a token is recovered when the table's likeliest row
is the right one. Ours are the planes that an accelerator saw in offload sessions with one-time and with lattice pads,
both formats, read as real numbers, as integers and plane by plane; what is given is the mean over all of these.
Guessing gets 1 of 2,000, and from a mixed batch of n tokens n of 2,000. Sizes of masks are multiples of the features'
root mean square.

The last rows are the relative error of the layer's result after unmasking, for ours with the format fast: what a mask
costs that is large enough for nobody.

    python bench/mask_attacks.py [--quick] [--pairs 5] [--out bench/results/mask_attacks.csv]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench._common import out_path, row, write_csv
from tests.adversary.masks import _attacks as attacks
from tests.adversary.masks import _chance as chance
from tests.adversary.masks._seen import (
    KINDS,
    N_TOKENS,
    Kind,
    Reading,
    Session,
    limit_of,
    public_table,
    public_weight,
    readings,
)
from torch import Tensor

from cloister.pad import Direction, PadMode
from cloister.ring import FAST

OURS = [kind for kind in KINDS if kind.name in ("otp-fast", "otp-faithful", "lattice-fast", "lattice-faithful")]
ROWS = 64
SIZES = (1.0, 1e3, 1e6, 1e8)
GAUSSIAN = ((10.0, 1), (10.0, 4), (10.0, 16), (30.0, 16), (30.0, 64))  # size, exposures
RANK = 16


class Found(NamedTuple):
    """One measure of one trial."""

    ours: float
    peer: float
    unit: str
    goal: str


class Trial:
    """Tokens drawn at random, what an accelerator saw of them under our pads, and the same attack on both."""

    def __init__(self, seed: int, n_exposures: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.table = public_table()
        self.unit = float(self.table.square().mean().sqrt())
        self.tokens = torch.randint(N_TOKENS, (ROWS,), generator=self.draw)
        self.x = self.table[self.tokens]
        self.ours: list[Reading] = []
        for kind in OURS:
            with Session(kind, Direction.FORWARD, self.x.shape[1]) as session:
                planes = np.stack([session.planes_of(self.x) for _ in range(n_exposures)])
            limit = limit_of(kind.fmt, Direction.FORWARD, self.x.shape[1])
            self.ours += readings(planes, kind.fmt, self.table, limit)

    def on_ours(self, attack: Callable[[Reading], Tensor], *, is_set: bool = False) -> float:
        """Mean share of tokens that the attack recovers from our masks."""
        found = [self.rate(attack(reading), is_set=is_set) for reading in self.ours]
        return sum(found) / len(found)

    def rate(self, scores: Tensor, *, is_set: bool = False) -> float:
        return (chance.of_set if is_set else chance.of_rows)(scores, self.tokens, self.draw).rate

    def run(self) -> dict[str, Found]:
        """Ours, the peer's, unit and goal, by measure."""
        return {**self._uniform(), **self._gaussian(), **self._low_rank(), **self._mixing(), **self._errors()}

    def _uniform(self) -> dict[str, Found]:
        ours = self.on_ours(
            lambda r: attacks.attack_uniform(r.seen[0], r.table, r.size, levels=r.levels, n_features=16)
        )
        found = {}
        for size in SIZES:
            seen = attacks.mask_uniform(self.x, size * self.unit, self.draw)
            peer = self.rate(attacks.attack_uniform(seen, self.table, size * self.unit))
            found[f"tokens recovered, float uniform mask of {size:g} x the features"] = Found(
                ours, peer, "share", "<= 0.01"
            )
        return found

    def _gaussian(self) -> dict[str, Found]:
        found = {}
        for size, n in GAUSSIAN:
            if n <= len(self.ours[0].seen):
                masked = [attacks.mask_gaussian(self.x, size * self.unit, self.draw) for _ in range(n)]
                peer = self.rate(attacks.attack_gaussian(torch.stack(masked), self.table))
                ours = self.on_ours(lambda r, n=n: attacks.attack_gaussian(r.seen[:n], r.table))
                name = f"tokens recovered, float Gaussian mask of {size:g} x the features, exposures: {n}"
                found[name] = Found(ours, peer, "share", "<= 0.01" if peer > 0.5 else "")
        return found

    def _low_rank(self) -> dict[str, Found]:
        ours = self.on_ours(lambda r: attacks.attack_low_rank(r.seen[0], r.table, RANK))
        seen, b = attacks.mask_low_rank(self.x, 1e4 * self.unit, RANK, self.draw)
        name = f"tokens recovered, mask A B of rank {RANK} of {self.x.shape[1]} and 10000 x the features, "
        return {
            name + f"B {kind}": Found(
                ours,
                self.rate(attacks.attack_low_rank(seen, self.table, RANK, public=public)),
                "share",
                "<= 0.01",
            )
            for kind, public in (("public", b), ("secret and fresh", None))
        }

    def _mixing(self) -> dict[str, Found]:
        ours = self.on_ours(lambda r: attacks.attack_mixing(r.seen[0], r.table), is_set=True)
        seen = attacks.mask_mixing(self.x, self.draw)
        peer = self.rate(attacks.attack_mixing(seen, self.table), is_set=True)
        return {
            f"tokens recovered, token-mixing mask of a batch of {ROWS} (guessing: 0.03)": Found(
                ours,
                peer,
                "share",
                "<= 0.1",
            )
        }

    def _errors(self) -> dict[str, Found]:
        weight = public_weight(self.x.shape[1], Direction.FORWARD)
        exact = self.x.double() @ weight.double().T
        with Session(Kind(PadMode.OTP, FAST), Direction.FORWARD, self.x.shape[1]) as session:
            ours = error(session.multiply(self.x), exact)
        found = {}
        for size in SIZES:
            mask = torch.rand(self.x.shape, generator=self.draw) * (size * self.unit)
            peer = error((self.x + mask) @ weight.T - mask @ weight.T, exact)
            found[f"error of the result, float uniform mask of {size:g} x the features"] = Found(
                ours, peer, "relative", ""
            )
        return found


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    """Runs alone; writes the CSV and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs, 16 exposures")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    most = 16 if args.quick else max(n for _, n in GAUSSIAN)
    trials = [Trial(seed, most).run() for seed in range(2 if args.quick else args.pairs)]
    rows: list[dict[str, Any]] = []
    for name, first in trials[0].items():
        ours, peer = [trial[name].ours for trial in trials], [trial[name].peer for trial in trials]
        rows.append(row(name, ours, peer, first.unit, first.goal))
    write_csv(out_path("mask_attacks", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
