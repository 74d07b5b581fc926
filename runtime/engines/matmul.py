"""Matrix products of numpy on one thread."""

from __future__ import annotations

import numpy as np

# OpenBLAS, which numpy uses, computes products of more multiplications on several threads. These
# spin for 0.1 s afterwards, on cores that the engines need.
MAX_MULTIPLICATIONS = 1 << 18


def product(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return float32 rows [n, k] times a matrix [k, m], computed on one thread.

    `rows` must be contiguous, and the matrix have at most half of MAX_MULTIPLICATIONS values.
    """
    # At least 2, because a product with a vector has a lower limit.
    size = max(2, MAX_MULTIPLICATIONS // matrix.size)
    count, inputs = rows.shape
    if count < size:
        return (np.concatenate([rows, rows]) @ matrix)[:1] if count == 1 else rows @ matrix
    whole = count // size * size
    result = np.empty((count, matrix.shape[1]), np.float32)
    parts = result[:whole].reshape(-1, size, matrix.shape[1])
    np.matmul(rows[:whole].reshape(-1, size, inputs), matrix, out=parts)
    if whole < count:
        result[-size:] = rows[-size:] @ matrix
    return result
