"""Four attacks of an accelerator on masked features, and the weak masks that they break.

The accelerator sees the masked rows of a batch and knows the public model, so it has a table of the features of every
token (rows of an embedding table, here after the position and the norm that it can compute itself). Each attack gives
a score to every token of the table: the higher, the likelier. They are textbook methods, kept short so that one can see
that nothing about our pads makes them fail but the pads.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_LEVELS = 2**24  # torch.rand gives k * 2^-24, k in 0 .. 2^24 - 1, in float32

# --- float uniform masks ----------------------------------------------------------------------------------------------


def mask_uniform(x: Tensor, size: float, draw: torch.Generator) -> Tensor:
    """x + size * torch.rand, in float32."""
    return x + torch.rand(x.shape, generator=draw) * size


def attack_uniform(
    seen: Tensor, table: Tensor, size: float, *, levels: int = FLOAT_LEVELS, n_features: int = 48
) -> Tensor:
    """Exact likelihood of every token under c = fl(x + fl(size * k / levels)), k uniform in 0 .. levels - 1.

    P(c | x) is 1/levels times the number of k with fl(x + fl(size k / levels)) = c. The masks lie on a grid of step
    g = size / levels, but c is rounded to g / 2^j where |c| < size / 2^j: there j bits of x below the grid come through
    as they are, whatever the size. A feature tells about sum of j 2^-j-1 = 1 bit, hundreds of features tell the token.
    So the features of the smallest |c| are enough. A wrong token needs a k that is not whole; the right one always has
    its k, which is one of the neighbours of (c - x) / g. That c lies in [x, x + size) is used too.

    Args:
        seen: [rows, features], in the type in which it was masked.
        table: [tokens, features], in the same type.

    Returns:
        Log-likelihoods [rows, tokens].
    """
    found = []
    for row in seen:
        small = row.abs().argsort()[:n_features]
        c, x = row[small], table[:, small]
        nearest = torch.round((c.double() - x.double()) * (levels / size))
        matches = torch.zeros_like(nearest)
        for step in (-1, 0, 1):
            k = nearest + step
            mask = (k / levels).to(row.dtype) * size
            matches += (x + mask == c) & (k >= 0) & (k < levels)
        found.append(torch.where(matches > 0, matches.log(), -20.0).sum(dim=1))  # -20: an error in a feature, perhaps
    return torch.stack(found)


# --- float Gaussian masks ---------------------------------------------------------------------------------------------


def mask_gaussian(x: Tensor, size: float, draw: torch.Generator) -> Tensor:
    """x + size * torch.randn, in float32."""
    return x + torch.randn(x.shape, generator=draw) * size


def attack_gaussian(seen: Tensor, table: Tensor) -> Tensor:
    """Log-likelihood ratio of every token to the token of all zeros, over all exposures of the same rows.

    With independent masks of deviation s, log P(c_1 .. c_n | x) - log P(c_1 .. c_n | 0) = (n / s^2) (mean(c) . x -
    ||x||^2 / 2). Two tokens at distance D are mistaken with probability Q(D sqrt(n) / (2 s)): each exposure (an epoch,
    a retry, a layer that takes the same features) adds D^2 / (4 s^2), and no s is large enough for all of them.

    Args:
        seen: [exposures, rows, features].
        table: [tokens, features].

    Returns:
        The ratio but for n / s^2, [rows, tokens].
    """
    return seen.double().mean(dim=0) @ table.double().T - table.double().square().sum(dim=1) / 2


# --- low-rank masks ---------------------------------------------------------------------------------------------------


def mask_low_rank(x: Tensor, size: float, rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """x + A B, A [rows, rank] and B [rank, features] fresh; and B. Cheap to take off: x W = c W - A (B W)."""
    a = torch.randn((len(x), rank), generator=draw)
    b = torch.randn((rank, x.shape[1]), generator=draw)
    return x + size / rank**0.5 * (a @ b), b


def attack_low_rank(seen: Tensor, table: Tensor, rank: int, *, public: Tensor | None = None) -> Tensor:
    """Nearest token in the orthogonal complement of the masks, where c and x are the same: P c = P x + P A B = P x.

    Where B is public P is known. Where it is secret, and even fresh for this batch, the masks of a batch still span a
    space of `rank` dimensions, and being larger than the features they are its first singular vectors.

    Args:
        seen: [rows, features] of one batch.
        table: [tokens, features].
        rank: of the masks.
        public: B [rank, features] if it is.

    Returns:
        Minus squared distances [rows, tokens].
    """
    seen, table = seen.double(), table.double()
    if public is None:
        basis = torch.linalg.svd(seen, full_matrices=False).Vh[:rank].T
    else:
        basis = torch.linalg.qr(public.double().T).Q
    seen, table = seen - seen @ basis @ basis.T, table - table @ basis @ basis.T
    return -torch.cdist(seen, table).square()


# --- token-mixing masks -----------------------------------------------------------------------------------------------


def mask_mixing(x: Tensor, draw: torch.Generator) -> Tensor:
    """M x with a secret M [rows, rows]: x W = M^-1 (M x W)."""
    return torch.randn((len(x), len(x)), generator=draw) @ x


def attack_mixing(seen: Tensor, table: Tensor) -> Tensor:
    """How near each token is to the row space of M x, which is that of x: its own tokens lie in it, others do not.

    A batch of fewer different rows than features spans a proper subspace; a random vector keeps sqrt(1 - rank /
    features) of its length outside of it, a token of the batch nothing but rounding.

    Args:
        seen: [rows, features] of one batch.
        table: [tokens, features].

    Returns:
        Minus the share of each token's length outside of the row space [tokens].
    """
    seen, table = seen.double(), table.double()
    parts = torch.linalg.svd(seen, full_matrices=False)
    is_part = parts.S / parts.S[0] > 1e-5
    basis = parts.Vh[is_part].T
    return -torch.linalg.vector_norm(table - table @ basis @ basis.T, dim=1) / torch.linalg.vector_norm(table, dim=1)
