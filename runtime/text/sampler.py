"""Choice of a token from logits, as by transformers' `generate`: processors, warpers, then a draw.

The draw is an exponential race: token v wins if E_v / p_v is smallest, with E_v exponential. This
happens with probability p_v. The E of a position depend only on the seed and the position, so both
decoders draw with the same ones. A draft is accepted if the deep decoder draws the same token. The
output is therefore the deep decoder's own draw: it has the distribution of mode "full" and, for a
given seed, the same tokens, regardless of the length of drafts. (Daliri, Musco and Suresh,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024.)

A draft is accepted with probability at least (1 - d) / (1 + d), where d is the total variation
distance between the decoders. The acceptance test of Leviathan et al. 2023 accepts with 1 - d, but
its tokens depend on the length of drafts, and so on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from runtime.errors import OptionError
from runtime.text.grammar import NEVER, UNKNOWN, Constraint

# Like transformers' LogitsProcessor, on numpy: (input_ids int64 [1, n], scores float32 [1, V]) ->
# scores [1, V]. The same arguments must return the same scores, because drafts are chosen twice.
LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]

_GOLDEN = 0x9E3779B97F4A7C15  # of SplitMix64
_MASK = (1 << 64) - 1
# Number of scores in a part, of which only the maximum is compared at first.
_PART = 64


@dataclass(frozen=True)
class Warping:
    """Modifies scores before a draw. Neutral values are 1.0, 0, 1.0 and 0.0."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def __call__(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that can be drawn, int64 [n], ascending, and their scores, float32 [n].

        Args:
            scores: float32 [V]. They are not modified.
        """
        # None: all. An array of all ids doubles the time with `top_p` alone.
        tokens = _possible(scores, self.top_k) if self.top_k else None
        if tokens is not None:
            scores = scores[tokens]
        if self.temperature != 1.0:
            with np.errstate(over="ignore"):  # scores outside an exit vocabulary
                scores = scores / np.float32(self.temperature)
        if self.top_k:  # the best tokens, and those tied with the last of them
            count = min(self.top_k, len(scores))
            kept = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
            tokens, scores = _only(tokens, scores, kept)
        if self.top_p < 1.0:  # the fewest best tokens whose probabilities reach it
            probabilities = _float32_softmax(scores)
            rest = 1 - self.top_p
            # Tokens below rest / n are excluded: all of them together have less than the rest.
            unlikely = probabilities < rest / len(scores)
            likely = np.flatnonzero(~unlikely)
            order = likely[np.argsort(scores[likely], kind="stable")]
            below = probabilities[unlikely].sum(dtype=np.float64)
            included = below + np.cumsum(probabilities[order], dtype=np.float64) > rest
            included[-1] = True
            tokens, scores = _only(tokens, scores, np.sort(order[included]))
        if self.min_p:  # tokens with at least this share of the best probability
            probabilities = _float32_softmax(scores)
            least = min(self.min_p, 1.0) * probabilities.max()
            tokens, scores = _only(tokens, scores, np.flatnonzero(probabilities >= least))
        return _only(tokens, scores, np.flatnonzero(scores > NEVER))


@dataclass(frozen=True)
class Sampler:
    """Chooses a token as a function of the logits, the context and the seed only.

    Attributes:
        prompt_length: Number of first tokens of the context that are the prompt.
        eos: Tokens that end the output.
        min_new_tokens: Minimum number of tokens before one of these.
        repetition_penalty: Penalty for tokens in the context.
        frequency_penalty: Subtracted from the score of a token for each time it was generated.
        presence_penalty: Subtracted from the score of a token that was generated.
        sequence_bias: Biases by token sequence.
        processors: The caller's processors.
        warping: Modifies scores before a draw. None: choose the arg max.
        seed: The seed of the request, and the number of the sample.
        grammar: Constraint of the output.
    """

    prompt_length: int
    eos: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    warping: Warping | None = None
    seed: tuple[int, int] = (0, 0)
    grammar: Constraint | None = None

    def __call__(self, logits: np.ndarray, context: np.ndarray) -> int:
        """Return the token after `context`, int64 [n], chosen from logits float32 [V].

        The logits are not modified.

        Raises:
            OptionError: If a processor of the caller returns unusable scores.
        """
        scores = self.process(logits, context)
        if self.warping is None:
            return int(np.argmax(scores))
        tokens, scores = self.warping(scores)
        return int(tokens[race(softmax(scores), self.seed, len(context), tokens)])

    @cached_property
    def _biases(self) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, ...], float]]:
        """Ids and biases of single tokens, which can be many, and biases of longer sequences."""
        given = self.sequence_bias or {}
        single = {sequence[0]: bias for sequence, bias in given.items() if len(sequence) == 1}
        longer = {sequence: bias for sequence, bias in given.items() if len(sequence) > 1}
        return np.array(list(single), np.int64), np.array(list(single.values()), np.float32), longer

    def process(self, logits: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Return processed logits, in the order of transformers.

        The penalties of OpenAI's API follow the repetition penalty. The caller's processors come
        after the others, the grammar last.
        """
        early = bool(self.eos) and len(context) - self.prompt_length < self.min_new_tokens
        counted = self.frequency_penalty or self.presence_penalty
        scores = logits
        if self.sequence_bias or self.repetition_penalty != 1.0 or counted or early:
            scores = logits.copy()
        if self.sequence_bias:
            tokens, biases, sequences = self._biases
            for (*before, last), bias in sequences.items():
                if context[-len(before) :].tolist() == before:
                    scores[last] += np.float32(bias)
            scores[tokens] += biases
        if self.repetition_penalty != 1.0:
            seen = np.unique(context)
            penalty = np.float32(self.repetition_penalty)
            with np.errstate(over="ignore"):  # scores outside an exit vocabulary
                scores[seen] = np.where(
                    scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty
                )
        if counted:
            generated, counts = np.unique(context[self.prompt_length :], return_counts=True)
            penalties = self.frequency_penalty * counts + self.presence_penalty
            scores[generated] -= penalties.astype(np.float32)
        if early:
            scores[list(self.eos)] = NEVER
        for processor in self.processors:
            scores = _processed(processor, scores, context)
        return (
            scores
            if self.grammar is None
            else self.grammar.mask(scores, context[self.prompt_length :])
        )

    @property
    def only_masks(self) -> bool:
        """True if only the grammar changes scores. The best token is then chosen if allowed."""
        if self.grammar is not None and self.grammar.by_scores:
            return False
        penalties = self.frequency_penalty or self.presence_penalty
        others = self.sequence_bias or self.processors or self.warping or self.min_new_tokens
        return not (penalties or others) and self.repetition_penalty == 1.0


def race(
    probabilities: np.ndarray,
    seed: tuple[int, int],
    position: int,
    tokens: np.ndarray | None = None,
) -> int:
    """Draw an index of `probabilities`, float64 [n], determined by seed and position.

    Args:
        tokens: The token of each index, int64 [n]. The random numbers belong to tokens, so tokens
            without probability can be left out. Default: 0 to n - 1.
    """
    if tokens is None:
        tokens = np.arange(len(probabilities))
    key = 0
    for number in (*seed, position):
        key = _mixed((key + number + 1) * _GOLDEN & _MASK)
    # Output number `token` of the generator SplitMix64 (Steele, Lea and Flood, 2014).
    states = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    uniform = ((_mixed(states) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    arrivals = np.full(len(probabilities), np.inf)
    with np.errstate(over="ignore"):  # of probabilities below 1e-307
        np.divide(-np.log(uniform), probabilities, out=arrivals, where=probabilities > 0)
    return int(np.argmin(arrivals))


def _mixed(value: Any) -> Any:
    """Return the finalizer of SplitMix64 of an int of 64 bits, or of each of an array uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _only(
    tokens: np.ndarray | None, scores: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and scores at `places`. If `tokens` is None, places are tokens."""
    return places if tokens is None else tokens[places], scores[places]


def _possible(scores: np.ndarray, count: int) -> np.ndarray:
    """Return ids, ascending, that include the `count` best, and those that may tie with the last.

    Divides the scores into parts. The `count`-th best of their maxima is at most the `count`-th
    best score, and finding it takes half the time of a partition of all scores.
    """
    parts = len(scores) // _PART
    if count > parts:
        return np.arange(len(scores))
    maxima = scores[: parts * _PART].reshape(_PART, parts).max(axis=0)  # faster than along rows
    least = np.partition(maxima, -count)[-count]
    # Scores that differ in the last bits may be equal after they are divided by the temperature.
    with np.errstate(over="ignore"):  # scores outside an exit vocabulary
        least -= np.abs(least) * np.float32(1e-6)
    return np.flatnonzero(scores >= least)


def _float32_softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities as in transformers, to decide which tokens can be drawn."""
    with np.errstate(over="ignore"):  # scores outside an exit vocabulary
        weights = np.exp(scores - scores.max())
    result: np.ndarray = weights / weights.sum(dtype=np.float64).astype(np.float32)
    return result


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids, int64 [n], of the `count` highest of raw logits float32 [V], best first.

    Ties are in order of id, as in the engines' arg max. Fewer are returned if the decoder has fewer
    tokens, because tokens outside an exit vocabulary have probability 0.
    """
    count = min(count, len(logits))
    least = np.partition(logits, -count)[-count]
    best = np.flatnonzero((logits >= least) & (logits > UNKNOWN / 2))
    return best[np.argsort(-logits[best], kind="stable")][:count]


def _processed(processor: LogitsProcessor, scores: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Call a processor and check its result.

    Raises:
        OptionError: If it returns another shape or type, or leaves no token.
    """
    name = getattr(processor, "__name__", type(processor).__name__)
    # Pass copies: a processor may modify its arguments, and may keep them.
    result = np.asarray(processor(context[None].copy(), scores[None].copy()))
    if result.shape != (1, len(scores)) or not np.issubdtype(result.dtype, np.floating):
        raise OptionError(
            f"logits_processor {name} returned {result.dtype} {list(result.shape)}; return "
            f"floats [1, {len(scores)}]"
        )
    row: np.ndarray = result[0].astype(np.float32)
    if np.isnan(row).any() or not np.isfinite(row.max()):
        raise OptionError(
            f"logits_processor {name} left no token to choose (NaN, or all minus infinity); "
            "return a finite score"
        )
    return row


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis in float64."""
    shifted = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    total: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return total


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return the log-softmax over the last axis in float64."""
    shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
