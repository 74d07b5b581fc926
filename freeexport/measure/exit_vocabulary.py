"""How many tokens, and which, the shallow head should know: what a smaller one loses in exits and wins in speed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import read_examples
from freeexport.measure.calibrate import check_enough
from freeexport.measure.sources import CheckpointSource, Facts, collect
from freeexport.measure.threshold import Rule, choose
from freeexport.measure.traces import Replay, Traces, replay
from graphs.errors import GraphError
from runtime.bundle.beta import NEVER_EXIT
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ExitVocabulary
from runtime.errors import CalibrationError, OptionError

# Lines that are decoded, and tokens of each.
SAMPLES, MAX_NEW_TOKENS = 500, 128
# The fewest tokens of a head; others double.
STEP = 64
# What is chosen on one half of the sequences is judged on the other.
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
    replayed: Replay
    costs: Costs

    @property
    def speedup(self) -> float:
        """Over mode full, predicted."""
        return self.replayed.speedup(self.costs)


@dataclass(frozen=True)
class ChosenVocabulary:
    """The `tokens` of a shallow head, ascending, and what a bundle records of them."""

    tokens: tuple[int, ...]
    facts: ExitVocabulary


def choose_exit_vocabulary(
    model: str, data: Path, size: int, out: Path, exit_layer: int | None = None, threshold: float | None = None
) -> ChosenVocabulary:
    """The tokens of a checkpoint's shallow head: `size` of them, or where that is 0, as many as are predicted to be
    fastest, by the sizes of layers and head.

    The first SAMPLES lines of `data` are decoded, and their traces kept beside `out`; the targets of all say which
    other tokens to expect. `threshold`: above which tokens exit, None for that of the rule. Raises GraphError for a
    size out of range, CalibrationError and DataError for data that do not do, OptionError where nothing would exit.
    """
    lines = read_examples(data)
    source = CheckpointSource(open_checkpoint(model), exit_layer, "cpu")
    facts, fewest = source.facts, max(2, len(source.facts.ends))
    if size and not fewest <= size <= facts.vocab_size:
        raise GraphError(
            f"exit vocabulary {size} is out of range; this model has {facts.vocab_size} tokens and "
            f"{len(facts.ends)} that end a sequence, choose {fewest} to {facts.vocab_size}"
        )
    traces = collect(source, data, lines[:SAMPLES], out.with_name(f"{out.name}.traces.jsonl"), MAX_NEW_TOKENS)
    check_enough(traces, Rule())
    above = choose(traces, Rule()).threshold if threshold is None else threshold
    if above >= NEVER_EXIT:
        raise OptionError(
            f"{facts.path}: no token would exit after layer {facts.exit_layer}, so no exit vocabulary pays; train "
            "the exit first (freeexport train)"
        )
    targets = source.token_ids([line.target for line in lines if line.target])
    costs = source.costs(lines[:SAMPLES], traces.mean_length)
    gains, ranked = exit_gains(traces, above, costs, facts, targets, (size,) if size else ())
    chosen = gains[size] if size else best(gains)
    tokens = tuple(sorted(map(int, ranked[: chosen.size])))
    return ChosenVocabulary(tokens, ExitVocabulary(chosen.size, chosen.covers, traces.tokens))


def exit_gains(
    traces: Traces,
    threshold: float,
    costs: Costs,
    facts: Facts,
    text: Iterable[Sequence[int]] = (),
    sizes: Sequence[int] = (),
) -> tuple[dict[int, Gain], np.ndarray]:
    """Gains by size, ascending: powers of two, `sizes`, and the whole vocabulary; and all token ids, the most useful
    first, by all sequences. The tokens that end a sequence are always known; `text` is token ids
    of text to expect. The head's part of a step is taken to be in proportion to its tokens, and confidences not to
    change. Raises CalibrationError where nothing exits at the threshold, or there is one sequence only."""
    vocabulary, count = facts.vocab_size, len(traces.length)
    if count < FOLDS:
        raise CalibrationError(f"{count} sequence cannot be both chosen on and judged by; give more samples")
    exits = traces.above(threshold)
    if not exits.any():
        raise CalibrationError(f"nothing exits at threshold {threshold:g}; give a lower --threshold")
    written = np.bincount([one for ids in text for one in ids if 0 <= one < vocabulary], minlength=vocabulary)
    fold = np.arange(count) % FOLDS
    ranks = [_ranked(traces.part(fold != number), threshold, written, facts) for number in range(FOLDS)]
    powers = (STEP << power for power in range(vocabulary.bit_length()))
    gains = {}
    for size in sorted({*(one for one in powers if len(facts.ends) <= one < vocabulary), *sizes, vocabulary}):
        known = np.zeros(traces.tokens, np.bool_)
        for number, ranked in enumerate(ranks):
            known |= (fold[traces.sequence] == number) & np.isin(traces.token, ranked[:size])
        # A token that the head does not know is never surer than a threshold.
        left = replace(traces, confidence=np.where(known, traces.confidence, -1.0))
        head = (costs.shallow - costs.shallow_without_head) * size / vocabulary
        smaller = replace(costs, shallow=costs.shallow_without_head + head)
        lost, done = 1 - float(known[exits].mean()), replay(left, threshold, facts.max_pending)
        gains[size] = Gain(size, float(known.mean()), lost, done, smaller)
    return gains, _ranked(traces, threshold, written, facts)


def best(gains: Mapping[int, Gain]) -> Gain:
    """The largest of those that are as good as the fastest."""
    fastest = max(gain.speedup for gain in gains.values())
    return [gain for gain in gains.values() if gain.speedup >= AS_GOOD * fastest][-1]


def _ranked(traces: Traces, threshold: float, written: np.ndarray, facts: Facts) -> np.ndarray:
    """All token ids: the ends, then by exits, shallow predictions and frequency in text, then the lower ids first, as
    vocabularies are roughly in the order of use."""
    vocabulary = facts.vocab_size
    exits = np.bincount(traces.token[traces.above(threshold)], minlength=vocabulary)
    predicted = np.bincount(traces.token, minlength=vocabulary)
    ranked = np.lexsort((np.arange(vocabulary), -written, -predicted, -exits))
    return np.concatenate([np.array(sorted(facts.ends), np.int64), ranked[~np.isin(ranked, facts.ends)]])
