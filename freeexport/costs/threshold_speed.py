"""How fast thresholds are: decoding in turn with mode full, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from freeexport.system.progress import progress
from runtime import Session
from runtime.options import Mode

# Prompts are decoded so many times each round: enough for a median, few enough to wait for.
PROMPTS = 40


@dataclass(frozen=True)
class Setting:
    """Mode free at a threshold, or mode full where that is None. `max_pending` None is the bundle's."""

    session: Session
    threshold: float | None = None
    max_pending: int | None = None

    def decode(self, prompt: np.ndarray, max_new_tokens: int) -> tuple[int, float]:
        """Tokens that decoding decided, and the seconds of that."""
        mode: Mode = "full" if self.threshold is None else "free"
        stats = self.session.generate(
            prompt,
            mode=mode,
            threshold=self.threshold,
            max_pending=self.max_pending,
            max_new_tokens=max_new_tokens,
        ).stats
        return stats.candidates, stats.seconds - stats.encode_seconds - stats.prefill_seconds


def speeds_in_turn(
    settings: Sequence[Setting], prompts: Sequence[np.ndarray], max_new_tokens: int, rounds: int
) -> np.ndarray:
    """Tokens per second of decoding (after prompt and first token), float64 [rounds, settings]; NaN where there was
    only a first token.

    Each round decodes every prompt (at most PROMPTS) at every setting, one after the other. One round before them
    warms up.
    """
    few = list(prompts)[:PROMPTS]
    done = np.zeros((rounds + 1, len(settings), 2))
    with progress("measuring", (rounds + 1) * len(few)) as advance:
        for turn in range(rounds + 1):
            for prompt in few:
                for number, setting in enumerate(settings):
                    done[turn, number] += setting.decode(prompt, max_new_tokens)
                advance()
    tokens, seconds = done[1:, :, 0], done[1:, :, 1]
    return np.divide(tokens, seconds, out=np.full_like(tokens, np.nan), where=tokens > 0)


def measured_speedups(
    session: Session, prompts: Sequence[np.ndarray], thresholds: Sequence[float], max_new_tokens: int, rounds: int
) -> dict[float, float]:
    """Speed of decoding as a multiple of mode full's, by threshold: the median of the rounds' ratios."""
    settings = [Setting(session), *(Setting(session, threshold) for threshold in thresholds)]
    speeds = speeds_in_turn(settings, prompts, max_new_tokens, rounds)
    ratios = np.median(speeds[:, 1:] / speeds[:, :1], axis=0)
    return {threshold: float(ratio) for threshold, ratio in zip(thresholds, ratios, strict=True) if np.isfinite(ratio)}
