"""A threshold with a guarantee: Learn then Test with fixed-sequence testing (Angelopoulos et al. 2021; Schuster et al.
2022 for early exit).

The unit is the sequence, whose tokens depend on each other: a loss in [0, 1] for each, drawn independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.stats import binom

from freeexport.traces.trace import Traces

# Fixed before any data is seen, from the top: finest near 1, where the confidences of a good exit crowd.
THRESHOLDS: tuple[float, ...] = (1.0, *(1 - 10**-power for power in np.linspace(6, 0, 601).tolist()))
# For losses that need a decoding run each.
COARSE_THRESHOLDS: tuple[float, ...] = (1.0, 0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3,
                                        0.2, 0.1, 0.0)  # fmt: skip


def hoeffding_bentkus(losses: np.ndarray, risk: float) -> float:
    """The p-value of "the mean loss is above `risk`", for independent losses [n] in [0, 1] (Bates et al. 2021)."""
    count, mean = len(losses), float(np.mean(losses))
    # Rounding must not push a sum of k over to k + 1: that would only be careful, but k errors are k errors.
    bentkus = math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, risk))
    hoeffding = math.exp(-count * _relative_entropy(min(mean, risk), risk))
    return min(1.0, bentkus, hoeffding)


def binomial(losses: np.ndarray, risk: float) -> float:
    """The same for losses that are 0 or 1, exact."""
    return float(binom.cdf(int(np.sum(losses)), len(losses), risk))


def p_value(losses: np.ndarray, risk: float) -> float:
    """Exact where all losses can only be 0 or 1."""
    whole = losses.dtype == np.bool_
    return binomial(losses, risk) if whole else hoeffding_bentkus(losses, risk)


def sequences_needed(risk: float, delta: float) -> int:
    """The fewest sequences with which any threshold below 1 can pass, if none of them has a loss."""
    return math.ceil(math.log(delta) / math.log1p(-risk))


def lowest_passing(
    losses_at: Callable[[float], np.ndarray], thresholds: Sequence[float], risk: float, delta: float
) -> float:
    """The last of `thresholds`, descending from 1.0, before the first that does not pass.

    With probability 1 - `delta` over the calibration sequences, the mean loss there is at most `risk`: the first true
    violation in the sequence is passed with probability `delta` at most, whatever comes after it.
    """
    passing = 1.0
    for threshold in thresholds:
        if threshold >= 1.0:
            continue  # nothing exits: no loss
        if p_value(losses_at(threshold), risk) > delta:
            return passing
        passing = threshold
    return passing


def token_losses(traces: Traces, threshold: float) -> np.ndarray:
    """Of each sequence, the share of its tokens that exit and disagree, float64 [n]."""
    return np.array(list(_shares(traces, threshold)))


def _shares(traces: Traces, threshold: float) -> Iterator[float]:
    for trace in traces.sequences:
        wrong = trace.sure(threshold) & ~trace.agrees
        yield float(wrong.sum()) / max(1, len(trace))


def _relative_entropy(a: float, b: float) -> float:
    """Of a Bernoulli variable with mean a to one with mean b, nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
