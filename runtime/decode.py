"""The decode loops: prefill, then one token at a time (Bae et al. 2023, section 3; docs/method.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from runtime.decoder import Decoder


class Step(NamedTuple):
    """One generated token; `confidence` is the shallow decoder's, None where it was not asked."""

    token: int
    exited: bool
    confidence: float | None


def free(decoder: Decoder, prompt: np.ndarray, threshold: float, max_pending: int) -> Iterator[Step]:
    """FREE: tokens surer than `threshold` exit and wait on the stack; the others run the deep decoder over all that
    wait. A full stack of `max_pending` rows forces it. `prompt` int64 [n]; endless: the caller stops."""
    token, confidence = decoder.prefill(prompt, head=True)
    yield Step(token, False, confidence)
    while True:
        guess, confidence = decoder.step(token, head=True)
        sure = confidence is not None and confidence > threshold
        if sure and decoder.stacked < max_pending:
            token = guess
            decoder.stats.exits += 1
            yield Step(token, True, confidence)
        else:
            token = decoder.sync()
            decoder.stats.forced += sure
            yield Step(token, False, confidence)


def full(decoder: Decoder, prompt: np.ndarray) -> Iterator[Step]:
    """Greedy decoding of the whole model: every token runs both engines, the shallow head never."""
    token, _ = decoder.prefill(prompt, head=False)
    yield Step(token, False, None)
    while True:
        decoder.step(token, head=False)
        token = decoder.sync()
        yield Step(token, False, None)


def shallow(decoder: Decoder, prompt: np.ndarray) -> Iterator[Step]:
    """Static exiting: after the first token, which is the deep decoder's, the shallow decoder goes on alone."""
    token, confidence = decoder.prefill(prompt, head=True)
    yield Step(token, False, confidence)
    while True:
        token, confidence = decoder.step(token, head=True)
        decoder.drop_stack()
        decoder.stats.exits += 1
        yield Step(token, True, confidence)
