"""How fast thresholds are: decoding in turn with mode full, on the same prompts, in one session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import numpy as np

from freeexport.progress import progress
from runtime import Session
from runtime.options import Mode
from runtime.result import Stats

# Prompts are decoded so many times each round: enough for a median, few enough to wait for.
PROMPTS = 40


def measured_speedups(
    session: Session, prompts: Sequence[np.ndarray], thresholds: Sequence[float], max_new_tokens: int, rounds: int
) -> dict[float, float]:
    """Tokens per second of decoding (after prompt and first token) as a multiple of mode full's, by threshold.

    Each round decodes every prompt (at most PROMPTS) at every setting, one after the other; the median of the rounds'
    ratios counts. One round before them warms up.
    """
    few = list(prompts)[:PROMPTS]
    ratios: dict[float, list[float]] = defaultdict(list)
    with progress("measuring", (rounds + 1) * len(few)) as advance:
        for turn in range(rounds + 1):
            tokens: dict[float | None, int] = defaultdict(int)
            seconds: dict[float | None, float] = defaultdict(float)
            for prompt in few:
                for threshold in (None, *thresholds):
                    stats = _decode(session, prompt, threshold, max_new_tokens)
                    tokens[threshold] += stats.tokens - 1
                    seconds[threshold] += stats.seconds - stats.encode_seconds - stats.prefill_seconds
                advance()
            if turn and tokens[None]:
                full = tokens[None] / seconds[None]
                for threshold in thresholds:
                    if tokens[threshold]:
                        ratios[threshold].append(tokens[threshold] / seconds[threshold] / full)
    return {threshold: median(values) for threshold, values in ratios.items()}


def _decode(session: Session, prompt: np.ndarray, threshold: float | None, max_new_tokens: int) -> Stats:
    mode: Mode = "full" if threshold is None else "free"
    return session.generate(prompt, mode=mode, threshold=threshold, max_new_tokens=max_new_tokens).stats
