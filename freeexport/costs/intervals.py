"""Intervals of speeds, by a paired bootstrap over requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from freeexport.task_metrics import draws

RESAMPLES = 1000
CONFIDENCE = 0.95

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
