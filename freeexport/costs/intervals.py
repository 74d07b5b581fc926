"""Intervals of speeds, by a paired bootstrap over requests, and of shares of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from freeexport.task_metrics import draws

RESAMPLES = 1000
CONFIDENCE = 0.95
Z = 1.96  # standard deviations of a 95 % interval

Interval = tuple[float | None, float | None]


def speed_interval(ours: np.ndarray, full: np.ndarray) -> Interval:
    """Return the 95 % interval of a setting's speed relative to full, by a paired bootstrap.

    Args:
        ours: Seconds of the setting's lines, [n], to compare requests. Or seconds and tokens,
            [n, 2], to compare seconds per token.
        full: The same for method full.
    """
    if len(ours) < 2:
        return None, None
    drawn = draws(len(ours), RESAMPLES)
    ours = drawn @ ours
    full = drawn @ full
    if ours.ndim == 1:
        return percentiles(full / ours)
    some = ours.all(axis=1) & full.all(axis=1)  # skip resamples without tokens
    ours = ours[some]
    full = full[some]
    return percentiles(full[:, 0] / full[:, 1] * ours[:, 1] / ours[:, 0])


def percentiles(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the 95 % interval of resampled values. Both ends are None without values."""
    if not len(values):
        return None, None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Share:
    """A share of tokens, with a 95 % confidence interval.

    Attributes:
        value: The share, in [0, 1].
        count: Number of tokens.
        low: Lower end of the interval. None if unknown.
        high: Upper end of the interval. None if unknown.
    """

    value: float
    count: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.1%}"
        return f"{self.value:.1%} (95% interval {self.low:.1%} to {self.high:.1%})"


def share(hits: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray) -> Share | None:
    """Return the share of `hits` [n] among `counts` [n] tokens of n sequences. None without tokens.

    The interval is Wilson's, with an effective number of tokens: tokens of one sequence are
    correlated, so the number is reduced by the design effect of the sequences. With a single
    sequence, tokens count as independent.
    """
    found = np.asarray(hits, np.float64)
    sizes = np.asarray(counts, np.float64)
    total = float(sizes.sum())
    sequences = int((sizes > 0).sum())
    if not total:
        return None
    value = float(found.sum()) / total
    independent = value * (1 - value) * total
    effect = 1.0
    if sequences > 1 and independent > 0:
        clustered = sequences / (sequences - 1) * float(np.square(found - value * sizes).sum())
        effect = max(1.0, clustered / independent)
    return Share(value, int(total), *_wilson(value, total / effect))


def recorded_share(found: Mapping[str, Any]) -> Share | None:
    """Read a Share from its `asdict` form. None for anything else."""
    count = found.get("count")
    shares = [
        one
        for one in map(found.get, ("value", "low", "high"))
        if isinstance(one, float) and 0 <= one <= 1
    ]
    return (
        Share(shares[0], count, *shares[1:])
        if isinstance(count, int) and len(shares) == 3
        else None
    )


def _wilson(value: float, count: float) -> tuple[float, float]:
    scale = 1 + Z * Z / count
    middle = (value + Z * Z / (2 * count)) / scale
    reach = Z / scale * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    # At 0 and 1, rounding may put `value` outside of the interval.
    return max(0.0, min(middle - reach, value)), min(1.0, max(middle + reach, value))
