"""A share of tokens with how far it may be off, where tokens of one sequence depend on each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Standard deviations of a 95 % interval.
Z = 1.96


@dataclass(frozen=True)
class Share:
    """`value`: the share of `count` tokens, with its 95 % interval from `low` to `high`, all in [0, 1]; both None where
    nothing is known of the sequences."""

    value: float
    count: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


def recorded_share(found: Mapping[str, Any]) -> Share | None:
    """From what `asdict` gave; None where it is anything else."""
    count = found.get("count")
    shares = [one for one in map(found.get, ("value", "low", "high")) if isinstance(one, float) and 0 <= one <= 1]
    return Share(shares[0], count, *shares[1:]) if isinstance(count, int) and len(shares) == 3 else None


def share(hits: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray) -> Share | None:
    """The share of `hits` [n] among `counts` [n] tokens of n sequences; None without tokens.

    Wilson's interval of as many independent tokens as would vary as much as these sequences do: a sequence that is easy
    is easy at all its tokens. One sequence says nothing of others, and its tokens count as independent.
    """
    found, sizes = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    total = float(sizes.sum())
    if not total:
        return None
    value = float(found.sum()) / total
    low, high = _wilson(value, total / _design_effect(found, sizes, value))
    return Share(value, int(total), low, high)


def _design_effect(hits: np.ndarray, counts: np.ndarray, value: float) -> float:
    """The variance of the share over sequences as a multiple of that of independent tokens, at least 1."""
    sequences, independent = int((counts > 0).sum()), value * (1 - value) * float(counts.sum())
    if sequences < 2 or independent <= 0:
        return 1.0
    clustered = sequences / (sequences - 1) * float(np.square(hits - value * counts).sum())
    return max(1.0, clustered / independent)


def _wilson(value: float, count: float) -> tuple[float, float]:
    scale = 1 + Z * Z / count
    middle = (value + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    # At 0 and at 1 the formula may miss its own value by the last bit.
    return max(0.0, min(middle - reach, value)), min(1.0, max(middle + reach, value))
