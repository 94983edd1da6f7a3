"""The weighted mean of LoRA products, M = sum_i w_i B_i A_i, and its best factors of rank r.

Averaging A and B apart gives another matrix than averaging B A; the difference is what clients who drift apart lose.
The best approximation of rank r is the truncated SVD (Eckart and Young, 1936).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Matrix = Float64[np.ndarray, "rows columns"]

Factors = tuple[Matrix, Float64[np.ndarray, " k"], Matrix, float, float]
"""Left and right singular vectors with their values, at most r; the norms of what they leave out and of M."""

_OVERSAMPLING = 8
_DEPTH = 6  # powers of M^T M in one subspace
_MAX_RESTARTS = 10
_SETTLED = 1e-12  # of the captured energy's share, from one restart to the next
_SMALL = 512  # below it, a whole SVD is as quick
_BLOCK_COLUMNS = 256  # of stacked factors that are multiplied at once


@dataclass(frozen=True)
class LoraProducts:
    """One layer of all clients.

    Attributes:
        a, b: the global factors at the round's start, [r, features] and [out, r].
        weights: of the clients; they sum to 1.
        updates: iterates anew over every client's (dA, dB), in the weights' order.
    """

    a: Matrix
    b: Matrix
    weights: Float64[np.ndarray, " clients"]
    updates: Callable[[], Iterator[tuple[Matrix, Matrix]]]

    def __iter__(self) -> Iterator[tuple[Matrix, Matrix]]:
        """(A_i, w_i B_i) of each client."""
        for weight, (da, db) in zip(self.weights, self.updates(), strict=True):
            yield self.a + da, weight * (self.b + db)


def refactor(products: LoraProducts) -> tuple[Matrix, Matrix, float, float]:
    """(A', B', residual, norm): B' A' is the best product of rank r for M, off by `residual`, and `norm` is that of M.

    A' keeps the size of the old A: its rows are orthogonal, each as long as A's rows are on average, so that the next
    round's steps on B are of the size they were. Where M has a lower rank than r, B' has columns of zeros and A' still
    has rows, so that no direction is lost to training.
    """
    (rank, n_in), n_out = products.a.shape, products.b.shape[0]
    width = rank * len(products.weights)
    # Stacked factors where they are small beside the matrix that they make: there an exact SVD is also the quicker one.
    exact = 4 * width <= min(n_in, n_out)
    left, values, right, residual, norm = _of_stack(products, rank) if exact else _of_dense(products, rank)
    kept = len(values)
    size = float(np.sqrt(np.mean(np.sum(products.a**2, axis=1)))) or 1.0
    new_a, new_b = np.zeros((rank, n_in)), np.zeros((n_out, rank))
    new_a[:kept] = size * right
    new_b[:, :kept] = left * (values / size)
    return new_a, new_b, residual, norm


def _of_stack(products: LoraProducts, rank: int) -> Factors:
    """Exact SVD of [w_1 B_1 ...] [A_1; ...] by QR of either stack; no matrix of the layer's size is made."""
    pairs = list(products)
    q_left, r_left = np.linalg.qr(np.concatenate([b for _, b in pairs], axis=1))
    q_right, r_right = np.linalg.qr(np.concatenate([a for a, _ in pairs]).T)
    left, values, right = np.linalg.svd(r_left @ r_right.T)
    residual, norm = float(np.linalg.norm(values[rank:])), float(np.linalg.norm(values))
    return q_left @ left[:, :rank], values[:rank], right[:rank] @ q_right.T, residual, norm


def _of_dense(products: LoraProducts, rank: int) -> Factors:
    """The leading singular triples of M itself, by block Krylov subspaces (Musco and Musco, 2015, arXiv 1504.05477)."""
    matrix = _sum(products)
    norm = float(np.linalg.norm(matrix))
    block = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_SMALL, 2 * block * (_DEPTH + 1)):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = _krylov(matrix, matrix.T @ _signs(matrix.shape[0], block))
        for _ in range(_MAX_RESTARTS):
            captured = np.sum(values[:rank] ** 2)
            left, values, right = _krylov(matrix, right[:block].T)
            if np.sum(values[:rank] ** 2) - captured <= _SETTLED * norm**2:
                break
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    matrix -= (left * values) @ right
    return left, values, right, float(np.linalg.norm(matrix)), norm


def _krylov(matrix: Matrix, start: Matrix) -> tuple[Matrix, Float64[np.ndarray, " k"], Matrix]:
    """The SVD of the matrix within the span of start, M^T M start, ..., (M^T M)^depth start."""
    basis = last = np.linalg.qr(start)[0]
    for _ in range(_DEPTH):
        image = matrix.T @ (matrix @ last)
        last = np.linalg.qr(image - basis @ (basis.T @ image))[0]
        basis = np.concatenate([basis, last], axis=1)
    basis = np.linalg.qr(basis)[0]
    left, values, turn = np.linalg.svd(matrix @ basis, full_matrices=False)
    return left, values, turn @ basis.T


def _sum(products: LoraProducts) -> Matrix:
    (rank, n_in), n_out = products.a.shape, products.b.shape[0]
    matrix = np.zeros((n_out, n_in))
    block: list[tuple[Matrix, Matrix]] = []
    for index, pair in enumerate(products, start=1):
        block.append(pair)
        if len(block) * rank >= _BLOCK_COLUMNS or index == len(products.weights):
            matrix += np.concatenate([b for _, b in block], axis=1) @ np.concatenate([a for a, _ in block])
            block.clear()
    return matrix


def _signs(n_rows: int, n_columns: int) -> Matrix:
    """A fixed matrix of +-1 that knows nothing of the data: where the subspaces start."""
    n_bytes = -(-n_rows * n_columns // 8)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"cloister-subspace").digest(n_bytes), dtype=np.uint8))
    return 2.0 * bits[: n_rows * n_columns].reshape(n_rows, n_columns) - 1.0
