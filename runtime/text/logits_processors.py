"""What changes logits before a token is chosen: pure functions on float32 [V], as transformers' processors of the same
names (version 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

# The logit of a token that a head does not know: its probability is 0.
UNKNOWN = np.finfo(np.float32).min

Scores = np.ndarray  # float32 [V]; minus infinity: the token cannot be chosen


def bias_sequences(scores: Scores, context: np.ndarray, biases: Mapping[tuple[int, ...], float]) -> Scores:
    """Add a bias to the last token of each sequence whose other tokens the context ends with."""
    changed = scores.copy()
    for (*before, last), bias in biases.items():
        if not before or context[-len(before) :].tolist() == before:
            changed[last] += np.float32(bias)
    return changed


def penalise_repetition(scores: Scores, context: np.ndarray, penalty: float) -> Scores:
    """Make every token of the context less likely: positive scores are divided by `penalty`, others multiplied."""
    changed, seen = scores.copy(), np.unique(context)
    old = scores[seen]
    changed[seen] = np.where(old < 0, old * np.float32(penalty), old / np.float32(penalty))
    return changed


def forbid(scores: Scores, tokens: Collection[int]) -> Scores:
    changed = scores.copy()
    changed[list(tokens)] = -np.inf
    return changed


def keep_top_k(scores: Scores, count: int) -> Scores:
    """Keep the `count` best, and what ties with the last of them."""
    count = min(count, len(scores))
    least = np.partition(scores, -count)[-count]
    return _only(scores, scores >= least)


def keep_top_p(scores: Scores, mass: float) -> Scores:
    """Keep the fewest best whose probabilities reach `mass`."""
    order = np.argsort(scores, kind="stable")
    below = np.cumsum(softmax(scores[order]))
    kept = np.empty(len(scores), bool)
    kept[order] = below > 1 - mass
    kept[order[-1]] = True
    return _only(scores, kept)


def keep_min_p(scores: Scores, share: float) -> Scores:
    """Keep what has at least `share` of the best one's probability."""
    probabilities = softmax(scores)
    best = probabilities.max()
    return _only(scores, (probabilities >= share * best) | (probabilities == best))


def softmax(scores: np.ndarray) -> np.ndarray:
    """float64, of the last axis."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    total: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """float64, of the last axis."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _only(scores: Scores, kept: np.ndarray) -> Scores:
    result: Scores = np.where(kept, scores, np.float32(-np.inf))
    return result
