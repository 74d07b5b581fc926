"""Beam search as transformers 5 does it: which candidates go on, which are finished, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.decoding.slot_call import Waits, finish

# Continuations of the beams so far, int64 [B, n], and which of the former beams each goes on from, int64 [B]: to the
# scores of what comes next, float64 [B, V], processed and raw.
Scores = tuple[np.ndarray, np.ndarray]
Score = Callable[[np.ndarray, np.ndarray], Scores]
# The same as a coroutine.
Scoring = Callable[[np.ndarray, np.ndarray], Waits[Scores]]

# A beam that is there to fill a row, and must not win.
NEVER = -1e9


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam: `score` is its summed processed log-probability, divided by its length to the length penalty;
    `logprobs` are the raw ones."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class BeamSearch:
    """`limit`: most tokens. `early_stopping`: True stops once `beams` are finished; False once the best unfinished one,
    as it is, would score no better than the worst finished; "never" judges it by what it could become."""

    beams: int
    limit: int
    eos: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def run(self, score: Score, cancelled: Callable[[], bool] = lambda: False) -> list[Hypothesis]:
        """The `beams` best, best first; none where it was cancelled."""

        def at_once(sequences: np.ndarray, sources: np.ndarray) -> Waits[Scores]:
            yield None
            return score(sequences, sources)

        return finish(self.turns(at_once, cancelled))

    def turns(self, score: Scoring, cancelled: Callable[[], bool]) -> Waits[list[Hypothesis]]:
        """The same as a coroutine: others have a turn between tokens, and where `score` lets them."""
        sequences, logprobs = np.zeros((self.beams, 0), np.int64), np.zeros((self.beams, 0))
        # All beams are the same at first: only one may give candidates.
        totals, sources = np.array([0.0] + [NEVER] * (self.beams - 1)), np.arange(self.beams)
        finished: list[Hypothesis] = []
        for length in range(1, self.limit + 1):
            if length > 1:
                yield None
            if cancelled():
                return []
            scores, raw = yield from score(sequences, sources)
            totals, parents, tokens = self._candidates(totals[:, None] + scores)
            sequences = np.concatenate([sequences[parents], tokens[:, None]], axis=1)
            logprobs = np.concatenate([logprobs[parents], raw[parents, tokens][:, None]], axis=1)
            ends = np.isin(tokens, list(self.eos)) | (length == self.limit)
            finished = self._finish(finished, sequences, logprobs, totals, ends)
            going = np.flatnonzero(~ends)[: self.beams]
            if len(going) == 0 or self._settled(finished, totals[going[0]], length):
                return finished
            # Where too few go on, the other rows are filled with what cannot win.
            fill = going[np.arange(self.beams) % len(going)]
            totals = np.where(np.arange(self.beams) < len(going), totals[fill], NEVER)
            sequences, logprobs, sources = sequences[fill], logprobs[fill], parents[fill]
        return finished

    def _candidates(self, totals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best continuations of all beams [B, V]: enough that `beams` go on even if all the others end. Their
        totals, beams and tokens, best first."""
        flat = totals.reshape(-1)
        count = min(len(flat), self.beams * max(2, 1 + len(self.eos)))
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.argsort(-flat[best], kind="stable")]
        return flat[best], best // totals.shape[1], best % totals.shape[1]

    def _finish(
        self,
        finished: list[Hypothesis],
        sequences: np.ndarray,
        logprobs: np.ndarray,
        totals: np.ndarray,
        ends: np.ndarray,
    ) -> list[Hypothesis]:
        """Only the `beams` best candidates may finish: those behind them are there to go on."""
        if self.early_stopping is True and len(finished) == self.beams:
            return finished
        new = [
            Hypothesis(tuple(tokens), tuple(nats), self._scaled(total, len(tokens)))
            for tokens, nats, total, end in zip(
                sequences[: self.beams].tolist(), logprobs[: self.beams].tolist(), totals, ends, strict=False
            )
            if end and total > NEVER / 2
        ]
        return sorted([*finished, *new], key=lambda hypothesis: -hypothesis.score)[: self.beams]

    def _settled(self, finished: list[Hypothesis], best: float, length: int) -> bool:
        if len(finished) < self.beams:
            return False
        optimistic = self.early_stopping == "never" and self.length_penalty > 0
        return (
            self.early_stopping is True
            or self._scaled(best, self.limit if optimistic else length) <= finished[-1].score
        )

    def _scaled(self, total: float, length: int) -> float:
        return float(total / length**self.length_penalty)
