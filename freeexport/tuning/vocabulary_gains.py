"""What the shallow head loses and wins by knowing fewer tokens: exits by their tokens, and what a step then costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from freeexport.traces.simulate import SimulatedRun, replay
from freeexport.traces.trace import Trace, Traces
from runtime.bundle.costs import Costs
from runtime.errors import CalibrationError

# The fewest tokens of a head; others double.
STEP = 64
# Tells the folds apart: what is chosen on one half of the sequences is judged on the other.
FOLDS = 2
# Predictions are no better than that, and a larger vocabulary is the safer one on other text.
AS_GOOD = 0.98


@dataclass(frozen=True)
class Gain:
    """A head of `size` tokens on sequences that they were not chosen on: the share of the shallow predictions that it
    `covers`, the share of the exits that it `lost`, and what that comes to."""

    size: int
    covers: float
    lost: float
    replayed: SimulatedRun
    costs: Costs

    @property
    def speedup(self) -> float:
        """Over mode full, predicted."""
        return self.replayed.speedup(self.costs)


@dataclass(frozen=True)
class ExitGains:
    """`gains` by ascending size, the last that of the whole vocabulary. `ranked`: all token ids, the most useful first,
    by all sequences."""

    threshold: float
    gains: tuple[Gain, ...]
    ranked: np.ndarray

    @property
    def best(self) -> Gain:
        """The largest of those that are as good as the fastest."""
        fastest = max(gain.speedup for gain in self.gains)
        return max((gain for gain in self.gains if gain.speedup >= AS_GOOD * fastest), key=lambda gain: gain.size)

    @property
    def whole(self) -> Gain:
        return self.gains[-1]

    def at(self, size: int) -> Gain:
        return next(gain for gain in self.gains if gain.size == size)


def exit_gains(
    traces: Traces,
    threshold: float,
    costs: Costs,
    max_pending: int,
    vocabulary: int,
    ends: Sequence[int],
    text: Iterable[Sequence[int]] = (),
    sizes: Sequence[int] = (),
) -> ExitGains:
    """Of a vocabulary of so many tokens, of which `ends` end a sequence and are always known; `text` is token ids of
    text to expect. `sizes` are looked at besides powers of two.

    The head's part of a step is taken to be in proportion to its tokens, and confidences not to change. Raises
    CalibrationError where nothing exits at the threshold, or there is one sequence only.
    """
    sequences = traces.sequences
    if len(sequences) < FOLDS:
        raise CalibrationError(f"{len(sequences)} sequence cannot be both chosen on and judged by; give more samples")
    if not replay(traces, threshold, max_pending).exits:
        raise CalibrationError(f"nothing exits at threshold {threshold:g}; give a lower --threshold")
    written = _counts(text, vocabulary)
    ranks = [_ranked(sequences[1 - fold :: FOLDS], threshold, written, vocabulary, ends) for fold in range(FOLDS)]
    gains = [
        _gain(size, [(sequences[fold::FOLDS], ranks[fold][:size]) for fold in range(FOLDS)], threshold, costs,
              max_pending, vocabulary)
        for size in _sizes(vocabulary, len(ends), sizes)
    ]  # fmt: skip
    return ExitGains(threshold, tuple(gains), _ranked(sequences, threshold, written, vocabulary, ends))


def _sizes(vocabulary: int, ends: int, more: Sequence[int]) -> list[int]:
    powers = [STEP << power for power in range(vocabulary.bit_length()) if ends <= STEP << power < vocabulary]
    return sorted({*powers, *more, vocabulary})


def _ranked(
    sequences: Sequence[Trace], threshold: float, written: np.ndarray, vocabulary: int, ends: Sequence[int]
) -> np.ndarray:
    """All token ids: `ends`, then by exits, shallow predictions and frequency in text, then the lower ids first, as
    vocabularies are roughly in the order of use."""
    exits = _counts([one.token[one.sure(threshold)] for one in sequences], vocabulary)
    predicted = _counts([one.token for one in sequences], vocabulary)
    ranked = np.lexsort((np.arange(vocabulary), -written, -predicted, -exits))
    return np.concatenate([np.array(sorted(ends), np.int64), ranked[~np.isin(ranked, ends)]])


def _gain(
    size: int,
    folds: Sequence[tuple[Sequence[Trace], np.ndarray]],
    threshold: float,
    costs: Costs,
    max_pending: int,
    vocabulary: int,
) -> Gain:
    known = [(one, np.isin(one.token, chosen)) for sequences, chosen in folds for one in sequences]
    covered = np.concatenate([knows for _, knows in known])
    exits = np.concatenate([one.sure(threshold) for one, _ in known])
    # A token that the head does not know is never surer than a threshold.
    left = Traces.of([replace(one, confidence=np.where(knows, one.confidence, -1.0)) for one, knows in known])
    head = (costs.shallow - costs.shallow_without_head) * size / vocabulary
    smaller = replace(costs, shallow=costs.shallow_without_head + head)
    lost = 1 - float(covered[exits].mean())
    return Gain(size, float(covered.mean()), lost, replay(left, threshold, max_pending), smaller)


def _counts(texts: Iterable[Sequence[int] | np.ndarray], vocabulary: int) -> np.ndarray:
    counts = np.zeros(vocabulary, np.int64)
    for ids in texts:
        tokens = np.asarray(ids, np.int64)
        np.add.at(counts, tokens[(tokens >= 0) & (tokens < vocabulary)], 1)
    return counts
