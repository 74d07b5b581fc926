"""Traces for tests, with independent tokens or with tokens that depend on their sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from freeexport.calibrate.traces import Traces


def trace(
    confidence: Sequence[float], agrees: Sequence[bool], line: int = 1, token: Sequence[int] | None = None
) -> Traces:
    """Return the trace of one sequence."""
    nll = np.where(agrees, 0.1, 3.0)
    return Traces.one(
        line, confidence=confidence, agrees=agrees, nll=nll, token=range(len(agrees)) if token is None else token
    )


def mixed(sequences: int, length: int, seed: int = 0, agree: float = 0.9) -> Traces:
    """Return traces of independent tokens.

    Confidences have the distribution Beta(6, 1) if the decoders agree, else Beta(2, 3).
    """
    random = np.random.default_rng(seed)
    made = []
    for line in range(1, sequences + 1):
        agrees = random.random(length) < agree
        confidence = np.where(agrees, random.beta(6, 1, length), random.beta(2, 3, length))
        made.append(trace(confidence.tolist(), agrees.tolist(), line))
    return Traces.joined(made)


def correlated(sequences: int, seed: int) -> Traces:
    """Return traces of sequences that are easy or hard as a whole.

    Agreement depends on this more than confidences show.
    """
    random = np.random.default_rng(seed)
    made = []
    for line in range(1, sequences + 1):
        length = int(random.integers(5, 30))
        hard = random.random() < 0.15
        confidence = random.beta(3 if hard else 6, 1, length)
        agrees = random.random(length) < (0.35 * confidence if hard else 1 - 0.03 * (1 - confidence))
        made.append(trace(confidence.tolist(), agrees.tolist(), line))
    return Traces.joined(made)
