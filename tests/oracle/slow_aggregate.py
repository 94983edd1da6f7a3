"""A second implementation of the aggregation rules: slow, obvious, and without a line of cloister's code.

Everything is a list of (weight, {name: array}) held in memory, in float64.
"""

from __future__ import annotations

import numpy as np

Tensors = dict[str, np.ndarray]


def weighted_mean(updates: list[tuple[float, Tensors]]) -> Tensors:
    total = sum(weight for weight, _ in updates)
    return {
        name: sum(weight * tensors[name].astype(np.float64) for weight, tensors in updates) / total
        for name in updates[0][1]
    }


def trimmed_mean(updates: list[Tensors], trim: float) -> Tensors:
    k = int(trim * len(updates))
    found = {}
    for name, first in updates[0].items():
        columns = np.array([tensors[name].reshape(-1) for tensors in updates], dtype=np.float64).T
        means = [sum(sorted(column)[k : len(column) - k]) / (len(column) - 2 * k) for column in columns.tolist()]
        found[name] = np.array(means).reshape(first.shape)
    return found


def mean_product(updates: list[tuple[float, Tensors]], base: Tensors, a: str, b: str) -> np.ndarray:
    """sum_i w_i (B + dB_i)(A + dA_i) / sum_i w_i, as the dense matrix that it is."""
    base64 = {name: tensor.astype(np.float64) for name, tensor in base.items()}
    total = sum(weight for weight, _ in updates)
    return sum(weight / total * (base64[b] + u[b]) @ (base64[a] + u[a]) for weight, u in updates)


def best_of_rank(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The truncated SVD and its error."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    return best, float(np.linalg.norm(matrix - best))


def adam(base: np.ndarray, means: list[np.ndarray], lr: float, beta_1: float, beta_2: float, tau: float) -> np.ndarray:
    """FedAdam over rounds 1, 2, ... with one mean update each."""
    m, v = np.zeros_like(base, dtype=np.float64), np.zeros_like(base, dtype=np.float64)
    now = base.astype(np.float64)
    for number, mean in enumerate(means, start=1):
        m = beta_1 * m + (1 - beta_1) * mean
        v = beta_2 * v + (1 - beta_2) * mean**2
        rate = lr * (1 - beta_2 ** (number + 1)) ** 0.5 / (1 - beta_1 ** (number + 1))
        now = now + rate * m / (v**0.5 + tau)
    return now
