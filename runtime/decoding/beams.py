"""Beam search with the results of transformers 5, and its rows at the two engines.

A search uses one row per beam, in KV caches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from runtime.decoding.calls import Waits
from runtime.decoding.decoder import Decoder
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner

# Initial positions of the caches, which grow when needed. The time of an engine call depends on all
# positions of its cache.
FIRST_ROWS = 32

# Sets of columns per row of logits. A set is searched column by column if its maximum is among the
# best of all.
COLUMNS = 64


class Scores(NamedTuple):
    """Log-probabilities of the next tokens: `logits` float32 [B, V] minus `log_sums` float64 [B].

    Beams are ranked by `processed`, float [B, V], if it is not None.
    """

    logits: np.ndarray
    log_sums: np.ndarray
    processed: np.ndarray | None = None

    @classmethod
    def of(cls, logits: np.ndarray) -> Scores:
        """Normalize logits in their own type, as transformers does, to save time at every token."""
        best = logits.max(axis=1, keepdims=True)
        sums = np.exp(logits - best).sum(axis=1)
        return cls(logits, best[:, 0].astype(np.float64) + np.log(sums))


# Coroutine function that scores the next tokens, given the beams so far, int64 [B, n], and the
# index of the previous beam that each one continues, int64 [B].
Scoring = Callable[[np.ndarray, np.ndarray], Waits[Scores]]

# Score of a beam that only fills a row and must not win.
NEVER = -1e9


@dataclass(frozen=True)
class Hypothesis:
    """A finished beam.

    Attributes:
        tokens: Token ids.
        logprobs: Log-probability of each token, without processing.
        score: Sum of the processed log-probabilities, divided by length ** length_penalty.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search.

    Attributes:
        beams: Number of beams.
        limit: Maximum number of tokens.
        eos: Tokens that end a beam.
        length_penalty: Exponent of the length by which scores are divided.
        early_stopping: True stops as soon as `beams` beams are finished. False stops when the best
            unfinished beam, at its current length, would not beat the worst finished one. "never"
            compares the score it could reach at best.
    """

    beams: int
    limit: int
    eos: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def search(
        self, score: Scoring, cancelled: Callable[[], bool] = lambda: False
    ) -> Waits[list[Hypothesis]]:
        """Return the `beams` best hypotheses, best first, or none if cancelled.

        Lets others have a turn between tokens, and whenever `score` does.
        """
        sequences = np.zeros((self.beams, 0), np.int64)
        logprobs = np.zeros((self.beams, 0))
        # All beams are equal at first, so only one may provide candidates.
        totals = np.array([0.0] + [NEVER] * (self.beams - 1))
        sources = np.arange(self.beams)
        finished: list[Hypothesis] = []
        for length in range(1, self.limit + 1):
            if length > 1:
                yield None
            if cancelled():
                return []
            scores = yield from score(sequences, sources)
            totals, parents, tokens = self._candidates(totals, scores)
            newest = scores.logits[parents, tokens] - scores.log_sums[parents]
            sequences = np.concatenate([sequences[parents], tokens[:, None]], axis=1)
            logprobs = np.concatenate([logprobs[parents], newest[:, None]], axis=1)
            ends = np.isin(tokens, list(self.eos)) | (length == self.limit)
            finished = self._finish(finished, sequences, logprobs, totals=totals, ends=ends)
            going = np.flatnonzero(~ends)[: self.beams]
            if len(going) == 0 or self._settled(finished, totals[going[0]], length):
                return finished
            # If too few beams continue, fill the other rows with beams that cannot win.
            fill = going[np.arange(self.beams) % len(going)]
            totals = np.where(np.arange(self.beams) < len(going), totals[fill], NEVER)
            sequences = sequences[fill]
            logprobs = logprobs[fill]
            sources = parents[fill]
        return finished

    def _candidates(
        self, totals: np.ndarray, scores: Scores
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return totals, beams and tokens of the best continuations of all beams, best first.

        There are enough for `beams` of them to continue even if all others end. `totals` [B] are
        the scores of the beams so far.
        """
        plain = scores.processed is None
        values = scores.logits if plain else scores.processed
        totals = totals - scores.log_sums if plain else totals
        assert values is not None
        count = min(values.size, self.beams * max(2, 1 + len(self.eos)))
        beams, tokens = _promising(values, totals, count)
        found = totals[beams] + values[beams, tokens]
        best = np.argsort(-found, kind="stable")[:count]
        return found[best], beams[best], tokens[best]

    def _finish(
        self,
        finished: list[Hypothesis],
        sequences: np.ndarray,
        logprobs: np.ndarray,
        totals: np.ndarray,
        ends: np.ndarray,
    ) -> list[Hypothesis]:
        """Add the beams that end, if they are among the first `beams` candidates.

        Later candidates may only continue.
        """
        if self.early_stopping is True and len(finished) == self.beams:
            return finished
        new = [
            Hypothesis(tuple(tokens), tuple(nats), self._scaled(total, len(tokens)))
            for tokens, nats, total, end in zip(
                sequences[: self.beams].tolist(),
                logprobs[: self.beams].tolist(),
                totals,
                ends,
                strict=False,
            )
            if end and total > NEVER / 2
        ]
        return sorted([*finished, *new], key=lambda hypothesis: -hypothesis.score)[: self.beams]

    def _settled(self, finished: list[Hypothesis], best: float, length: int) -> bool:
        """Return True if the best unfinished total, `best`, can no longer change the result."""
        if len(finished) < self.beams:
            return False
        optimistic = self.early_stopping == "never" and self.length_penalty > 0
        return (
            self.early_stopping is True
            or self._scaled(best, self.limit if optimistic else length) <= finished[-1].score
        )

    def _scaled(self, total: float, length: int) -> float:
        return float(total / length**self.length_penalty)


def _promising(values: np.ndarray, totals: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of entries that include the `count` best of totals[:, None] + values.

    `values` is [B, V]. Columns are divided into sets, and all entries of the sets with the `count`
    best maxima are returned, unsorted.
    """
    rows, columns = values.shape
    sets = columns // COLUMNS
    if rows * sets <= count:
        beams, tokens = np.divmod(np.arange(values.size), columns)
        return beams, tokens
    peaks = totals[:, None] + values[:, : sets * COLUMNS].reshape(rows, COLUMNS, sets).max(axis=1)
    # NaN is not less than any number, so it is selected.
    beams, numbers = np.nonzero(~(peaks < np.partition(peaks, -count, axis=None)[-count]))
    tokens = (numbers[:, None] + sets * np.arange(COLUMNS)).reshape(-1)
    last = np.indices((rows, columns - sets * COLUMNS)).reshape(2, -1)
    return np.append(np.repeat(beams, COLUMNS), last[0]), np.append(
        tokens, last[1] + sets * COLUMNS
    )


class BeamRows:
    """Rows of a beam search at the engines of a `decoder`, with caches of their own.

    Beams change places with an index: row `_places[i]` of the caches and the engine calls holds
    beam i. Cache rows are copied only if several beams continue the same one, and then only from
    the first position at which they differ.

    Args:
        decoder: Decoder whose engines are used.
        cross: Arrays that cross-attention reads, for one sequence.
        beams: Number of beams, B.
        rows: Maximum number of positions per beam.

    Attributes:
        stats: Statistics of the decoder's request.
    """

    def __init__(
        self, decoder: Decoder, cross: dict[str, np.ndarray], beams: int, rows: int
    ) -> None:
        self.stats = decoder.stats
        self._rows = rows
        self._runners = decoder.runners[:2]  # without the exit's
        self._tokens = np.zeros((beams, 1), np.int64)
        self._emitted = np.zeros(beams, np.int64)
        self._places = np.arange(beams)
        # Row that wrote each position of each row. Equal numbers are equal keys and values.
        self._writers = np.zeros((beams, rows), np.int32)
        self._hidden = decoder.runners[0].zeros((beams, 1, decoder.hidden_size), np.float32)
        self._logits = np.zeros((beams, decoder.vocab_size), np.float32)
        if not self._runners[0].engine.shares_prompts:
            cross = {
                name: _repeated(array, beams, decoder.runners[0]) for name, array in cross.items()
            }
        self._cross = cross
        self._caches = [
            runner.cache.resized(beams, min(rows, FIRST_ROWS)) for runner in self._runners
        ]
        self._bind()

    def stepping(self, tokens: np.ndarray, sources: np.ndarray) -> Waits[np.ndarray]:
        """Continue row `sources[i]` with `tokens[i]` as row i, and return logits float32 [B, V].

        They are valid until the next call.
        """
        if self._caches[0].lengths[0] >= self._caches[0].rows:
            rows = min(self._rows, 2 * self._caches[0].rows)
            self._caches = [cache.grown(rows) for cache in self._caches]
            self._bind()
        self._follow(sources)
        self._tokens[self._places, 0] = tokens
        self.stats.shallow_seconds += self._runners[0].submit(self._shallow).wait()
        yield None
        self.stats.count_pass(1, self._runners[1].submit(self._deep).wait())
        for cache in self._caches:
            for row in range(len(tokens)):
                cache.extend(row, 1)
        return self._logits

    def _follow(self, sources: np.ndarray) -> None:
        """Give each beam i a row that continues beam `sources[i]`."""
        rows = self._places[sources]
        _, keeping = np.unique(rows, return_index=True)
        copying = np.setdiff1d(np.arange(len(rows)), keeping)
        length = self._caches[0].length(0)
        for beam, row in zip(copying, np.setdiff1d(self._places, rows), strict=True):
            source = rows[beam]
            differs = self._writers[row, :length] != self._writers[source, :length]
            for cache in self._caches:
                cache.copy_rows(int(source), int(row), int(differs.argmax()))
            self._writers[row] = self._writers[source]
            rows[beam] = row
        self._writers[:, length] = np.arange(len(rows))
        self._places[:] = rows

    def _bind(self) -> None:
        shallow, deep = self._runners
        tokens = {
            "input_ids": self._tokens,
            **({"head_rows": np.zeros(0, np.int64)} if shallow.heads else {}),
        }
        self._shallow = _bind(
            shallow, self._caches[0], self._cross, inputs=tokens, outputs={"hidden": self._hidden}
        )
        hidden = {"hidden": self._hidden, "head_rows": self._places, "emitted": self._emitted}
        self._deep = _bind(
            deep, self._caches[1], self._cross, inputs=hidden, outputs={"logits": self._logits}
        )


def _repeated(array: Any, beams: int, runner: Runner) -> Any:
    """Repeat [1, ...] to [beams, ...]."""
    if isinstance(array, np.ndarray):
        return np.repeat(array, beams, axis=0)
    rows = runner.zeros((beams, *array.shape[1:]), array.dtype)
    for beam in range(beams):
        rows[beam : beam + 1] = array
    return rows


def _bind(
    runner: Runner,
    cache: KVCache,
    cross: dict[str, np.ndarray],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> Call:
    past = {f"past.{name}": array for name, array in cache.arrays.items()}
    beams = len(cache.lengths)
    lengths = {"past_lengths": cache.lengths, "query_lengths": np.ones(beams, np.int32)}
    if cache.own_exit:  # no beam exits
        lengths["exit_lengths"] = np.zeros(beams, np.int32)
    present = {f"present.{name}": array for name, array in cache.arrays.items()}
    return runner.engine.bind(
        {**inputs, **lengths, **cache.attended(cross), **past}, {**outputs, **present}
    )
