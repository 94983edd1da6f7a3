"""Gaussian noise that is private for the numbers a computer has, and what it costs. Needs the extra `dp`.

Floating-point Gaussian noise gives its input away by its low-order bits (Mironov, 2012). So values are put on a grid of
2^-30 standard deviations, as integers, and OpenDP adds a discrete Gaussian to them (Canonne, Kamath and Steinke, 2020,
arXiv 2004.00010), sampled exactly from OpenSSL's generator. For integers its Renyi privacy is the continuous one's
(their Proposition 5 and Theorem 4), which is what the accountant composes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from cloister.errors import ConfigError, FederationError

GRID = 1 << 30
"""Steps of the grid in one standard deviation of the noise."""

MAX_SUM = 1 << 60
"""The largest magnitude on the grid: beyond it, noise could leave 64 bits."""

Numbers = Float64[np.ndarray, "..."]
Steps = Int64[np.ndarray, "..."]

_PIECE = 1 << 16  # OpenDP takes lists, of which a whole adapter's would be large


def on_grid(values: Numbers, sigma: float) -> Steps:
    """Values as integers in units of `sigma / GRID`, rounded towards zero, so that no norm grows. *Secret*."""
    return np.trunc(values * (GRID / sigma)).astype(np.int64)


def noised(sums: Steps, sigma: float) -> Numbers:
    """Adds a discrete Gaussian of standard deviation `sigma` to every number of the grid, and leaves the grid.

    About 10 to 20 microseconds a number: exactness is paid for. What comes out is differentially private with respect
    to `sums`, for the noise multiplier `sigma` divided by how much one party can move `sums` (L2, off the grid).

    Args:
        sums: *secret*; from `on_grid`, or sums of such, each below `MAX_SUM` in magnitude.
        sigma: standard deviation in the units of the result.

    Raises:
        ConfigError: the extra `dp` is not installed.
        FederationError: a sum is beyond `MAX_SUM`.
    """
    if sums.size and int(np.abs(sums).max()) > MAX_SUM:
        raise FederationError("a sum is too large for its noise", hint="lower the clipping norm's ratio to the noise")
    measure = _measurement()
    flat, out = sums.reshape(-1), np.empty(sums.size)
    for at in range(0, flat.size, _PIECE):
        out[at : at + _PIECE] = measure(flat[at : at + _PIECE].tolist())
    return (out * (sigma / GRID)).reshape(sums.shape)


def gaussian_epsilon(noise_multiplier: float, n_releases: int, *, delta: float, sample_rate: float = 1.0) -> float:
    """Epsilon at `delta` of a number of Gaussian releases, by Opacus's Renyi accountant: an upper bound.

    Args:
        noise_multiplier: standard deviation of the noise over the largest share of one party.
        n_releases: how many.
        delta: probability for which epsilon need not hold.
        sample_rate: of secret Poisson sampling; 1 where everybody takes part, or an observer sees who does.

    Raises:
        ConfigError: the extra `dp` is not installed.
    """
    accountant = rdp_accountant()
    accountant.history.append((noise_multiplier, sample_rate, n_releases))
    return epsilon_of(accountant, delta)


def epsilon_of(accountant: Any, delta: float) -> float:
    """An Opacus Renyi accountant's epsilon, with orders that fit strong noise too; 0 before the first release."""
    if not accountant.history or accountant.history[0][2] == 0:
        return 0.0
    orders = [*accountant.DEFAULT_ALPHAS, 96, 128, 192, 256, 384, 512, 768, 1024]
    return float(accountant.get_epsilon(delta, alphas=orders))


def require_privacy_extra() -> None:
    """Raise unless what differential privacy needs is installed. Imports none of it.

    Raises:
        ConfigError: the extra `dp` is not installed.
    """
    for package in ("opacus", "opendp"):
        if importlib.util.find_spec(package) is None:
            raise _missing(package)


def rdp_accountant() -> Any:
    """A fresh accountant of Opacus.

    Raises:
        ConfigError: the extra `dp` is not installed.
    """
    try:
        from opacus.accountants import RDPAccountant
    except ImportError:
        raise _missing("opacus") from None
    return RDPAccountant()


def _measurement() -> Any:
    try:
        import opendp.prelude as dp
    except ImportError:
        raise _missing("opendp") from None
    dp.enable_features("contrib")  # OpenDP's word for what is proven and not yet vetted by its committee
    domain = dp.vector_domain(dp.atom_domain(T="i64"))
    return dp.m.make_gaussian(domain, dp.l2_distance(T=float), scale=float(GRID))


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"differential privacy needs {package}, which is not installed", hint="pip install 'cloister[dp]'"
    )
