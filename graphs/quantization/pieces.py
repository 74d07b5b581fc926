"""A weight a few rows at a time, and what is lost of it: temporaries of that size are all the memory rounding takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Values rounded at once.
CHUNK = 1 << 20


def pieces(weight: np.ndarray) -> Iterator[slice]:
    """Rows in pieces of about CHUNK values."""
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))


def total(squares: np.ndarray) -> float:
    return float(squares.sum(dtype=np.float64))


def relative(lost: float, weight: np.ndarray) -> float:
    """The relative error of a weight whose squared errors sum to `lost`."""
    whole = sum(total(np.square(weight[rows])) for rows in pieces(weight))
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0
