"""How far predictions move when nothing but the last bits of what an engine reads differ, and what is more than that.

Weights in 8 and 4 bits come with activations in 8: a last bit of attention, which another kernel or another processor
rounds otherwise, now and then tips an activation over to its next step, and after a few layers every row differs. How
far is a property of the model and the precision. So it is measured: the caches and hidden states are changed by less
than one step of what the engines compute in, and the largest difference, which is luck, is not what is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from freeexport.verification.checks import Check, Measure

# A comparison may be so many times as far as noise. Faults (a shifted position, another row's cache) are 15 to 1000
# times as far.
FACTOR = 4.0
# Shares of rows that may be past even that.
BEST, ROWS = 0.01, 0.02
# Nats that the float32 of logits does not resolve.
RESOLUTION = 1e-7
_BLOCK = 64


@dataclass(frozen=True)
class Moved:
    """What became of n predictions: the Kullback-Leibler divergence, the nats that a token lost, the distance of the
    two best logits before, how far these moved against each other, and whether the best one is another."""

    divergence: np.ndarray
    nats: np.ndarray
    gap: np.ndarray
    gap_moved: np.ndarray
    other_best: np.ndarray

    @classmethod
    def between(cls, before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> Moved:
        """Of logits [n, V], and of any n tokens."""
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(before), _BLOCK)]
        return cls.joined([_moved(before[block], after[block], tokens[block]) for block in blocks])

    @classmethod
    def joined(cls, parts: Sequence[Moved]) -> Moved:
        empty = [np.zeros(0)] * 5 if not parts else None
        return cls(*(empty or map(np.concatenate, zip(*(vars(part).values() for part in parts), strict=True))))


def _moved(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> Moved:
    rows = np.arange(len(before))
    second, best = np.argpartition(before, -2, -1)[:, -2:].T
    gap = (before[rows, best] - before[rows, second]).astype(np.float64)
    gap_moved = np.abs(gap - (after[rows, best] - after[rows, second]))
    ours, theirs = log_softmax(after), log_softmax(before)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
    # What is below float64's own rounding is no divergence.
    nats = theirs[rows, tokens] - ours[rows, tokens]
    return Moved(np.maximum(divergence, 0), nats, gap, gap_moved, after.argmax(-1) != before.argmax(-1))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def row_checks(name: str, tensor: str, moved: Moved, noise: Moved) -> Iterator[Check]:
    """Whether rows moved further than noise does."""
    count = len(moved.divergence)

    def check(measure: Measure, error: float, tolerance: float) -> Check:
        return Check(name, tensor, float(error), float(tolerance), measure)

    yield check("divergence", moved.divergence.mean(), _limit(noise.divergence, count))
    yield check("nats", np.abs(moved.nats.mean()), _limit(noise.nats, count))
    clear = moved.gap > FACTOR * noise.gap_moved.max(initial=0.0)
    yield check("best", (moved.other_best & clear).sum() / max(1, clear.sum()), BEST)
    near = moved.divergence <= max(RESOLUTION, FACTOR * noise.divergence.max(initial=0.0))
    yield check("rows", 1 - near.mean(), ROWS)


def _limit(noise: np.ndarray, count: int) -> float:
    """What the mean of `count` rows may be: FACTOR times noise's mean and the standard error of so many rows."""
    # Unlike max, this keeps NaN.
    return float(np.maximum(RESOLUTION, FACTOR * (np.abs(noise.mean()) + noise.std() / np.sqrt(count))))
