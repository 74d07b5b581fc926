"""How a token is chosen from logits, as by transformers' `generate`: processors, then warpers, then a draw.

The draw is an exponential race: token v wins where E_v / p_v is least, with E_v exponential, which happens with
probability p_v. The E of a position depend on the seed and the position alone: both decoders draw with the same ones.
A draft is kept where the deep decoder's draw is the same token. What comes out is then the deep decoder's own draw: the
distribution, and for a seed the very tokens, of mode full, however long the drafts were. (Daliri, Musco and Suresh,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", 2024.) A draft is kept with probability at
least (1 - d) / (1 + d), where d is the total variation between the decoders; the acceptance test of Leviathan et al.
2023 keeps 1 - d, but its tokens depend on how long drafts happen to be, and so on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runtime.errors import OptionError
from runtime.text.grammar import NEVER, UNKNOWN, Constraint

# As transformers' LogitsProcessor, on numpy: (input_ids int64 [1, n], scores float32 [1, V]) -> scores [1, V]. A draft
# is chosen, and chosen again: the same arguments must give the same scores.
LogitsProcessor = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Warping:
    """Changes scores before a draw. 1.0, 0, 1.0 and 0.0 change nothing."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        if self.temperature != 1.0:
            with np.errstate(over="ignore"):  # of tokens that an exit does not know
                scores = scores / np.float32(self.temperature)
        if self.top_k:  # the best, and what ties with the last of them
            count = min(self.top_k, len(scores))
            scores = np.where(scores >= np.partition(scores, -count)[-count], scores, NEVER)
        if self.top_p < 1.0:  # the fewest best whose probabilities reach it
            order = np.argsort(scores, kind="stable")
            kept = np.empty(len(scores), bool)
            kept[order] = np.cumsum(softmax(scores[order])) > 1 - self.top_p
            kept[order[-1]] = True
            scores = np.where(kept, scores, NEVER)
        if self.min_p:  # those with this share of the best one's probability
            probabilities = softmax(scores)
            best = probabilities.max()
            scores = np.where(
                (probabilities >= self.min_p * best) | (probabilities == best), scores, NEVER
            )
        return scores


@dataclass(frozen=True)
class Sampler:
    """Chooses a token: a function of the logits, the tokens before, and the seed alone. `warping` None is arg max.

    `prompt_length` of the tokens before are the prompt. `seed` is two numbers: the request's, and which of its samples.
    """

    prompt_length: int
    eos: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    sequence_bias: Mapping[tuple[int, ...], float] | None = None
    processors: tuple[LogitsProcessor, ...] = ()
    warping: Warping | None = None
    seed: tuple[int, int] = (0, 0)
    grammar: Constraint | None = None

    def __call__(self, logits: np.ndarray, context: np.ndarray) -> int:
        """The token after `context`, int64 [n], from logits float32 [V], which stay as they are. Raises OptionError
        where a processor of the caller returned what cannot be used."""
        scores = self.process(logits, context)
        if self.warping is None:
            return int(scores.argmax())
        return race(softmax(self.warping(scores)), self.seed, len(context))

    @cached_property
    def _biases(self) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, ...], float]]:
        """Ids and biases of single tokens, of which there may be a thousand, and biases of longer sequences."""
        given = self.sequence_bias or {}
        single = {sequence[0]: bias for sequence, bias in given.items() if len(sequence) == 1}
        longer = {sequence: bias for sequence, bias in given.items() if len(sequence) > 1}
        return np.array(list(single), np.int64), np.array(list(single.values()), np.float32), longer

    def process(self, logits: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Change logits as the processors of transformers do, the caller's after the others, the grammar last."""
        early = bool(self.eos) and len(context) - self.prompt_length < self.min_new_tokens
        scores = logits
        if self.sequence_bias or self.repetition_penalty != 1.0 or early:
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
            with np.errstate(over="ignore"):  # of tokens that an exit does not know
                scores[seen] = np.where(
                    scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty
                )
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
        """Whether the grammar alone changes scores, so that the best token is chosen wherever it is allowed."""
        if self.grammar is not None and self.grammar.by_scores:
            return False
        others = self.sequence_bias or self.processors or self.warping or self.min_new_tokens
        return not others and self.repetition_penalty == 1.0


def race(probabilities: np.ndarray, seed: tuple[int, int], position: int) -> int:
    """Draw from `probabilities` float64 [V]: the same for the same seed and position."""
    bits = np.random.Philox(
        key=np.array(seed, np.uint64), counter=np.array([0, 0, 0, position], np.uint64)
    )
    times = np.random.Generator(bits).standard_exponential(len(probabilities))
    arrivals = np.full(len(probabilities), np.inf)
    np.divide(times, probabilities, out=arrivals, where=probabilities > 0)
    return int(arrivals.argmin())


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """The ids, int64 [n], of the `count` best of raw logits float32 [V], best first; of equal ones the least id, as the
    engines' arg max. Fewer where the decoder knows fewer: the others of an exit vocabulary have probability 0."""
    count = min(count, len(logits))
    least = np.partition(logits, -count)[-count]
    best = np.flatnonzero((logits >= least) & (logits > UNKNOWN / 2))
    return best[np.argsort(-logits[best], kind="stable")][:count]


def _processed(processor: LogitsProcessor, scores: np.ndarray, context: np.ndarray) -> np.ndarray:
    name = getattr(processor, "__name__", type(processor).__name__)
    # Copies: a processor may write where it reads, and what it gets must not change later.
    result = np.asarray(processor(context[None].copy(), scores[None].copy()))
    if result.shape != (1, len(scores)) or not np.issubdtype(result.dtype, np.floating):
        raise OptionError(
            f"logits_processor {name} returned {result.dtype} {list(result.shape)}; return "
            f"floats [1, {len(scores)}]"
        )
    row: np.ndarray = result[0].astype(np.float32)
    if np.isnan(row).any() or not np.isfinite(row.max()):
        raise OptionError(
            f"logits_processor {name} left no token to choose (NaN, or all minus infinity); fix it"
        )
    return row


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
