"""Sources of drafts other than the exit: texts, an expected output, or the caller's code.

Each proposes tokens with the probability that the full model chooses them. runtime/decoding/
drafts.py decides how many of them are worth their time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from numbers import Integral, Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from runtime.decoding.acceptance import MAX_AGREEMENT, Acceptance, Evidence
from runtime.decoding.phrases import PhraseTable
from runtime.decoding.text_index import LEVELS, LONGEST, ORDERS, Expectation, TextIndex, TextMemory
from runtime.errors import OptionError, shown
from runtime.options.generation_options import DraftSource as OwnSource

# Maximum number of tokens of a request's text that are indexed, the newest.
MAX_INDEXED = 16_384
# A predicted text is searched within this many tokens of the place where the output left it.
NEAR = 64
# Number of newest tokens that are compared to find that place.
COMPARED = 5
# Number of tokens and probabilities from the caller's draft source that are checked, even if fewer
# fit into a sync pass. Bounds the time for a long list.
MAX_CHECKED = 256
# Added to the level of an Expectation that another source shares.
AGREED = LEVELS * len(ORDERS)
# Probability that all tokens so far are accepted, below which a proposal ends. A row of a deep
# pass costs more on every machine measured.
MIN_REACH = 0.1


class Proposal(NamedTuple):
    """Possible next tokens.

    Attributes:
        source: Source of the first token.
        tokens: Token ids.
        probabilities: Probability of each token to be accepted, if those before it are.
        evidence: The evidence for each token, whose acceptance is counted.
    """

    source: str
    tokens: list[int]
    probabilities: list[float]
    evidence: list[Evidence]


NO_PROPOSAL = Proposal("", [], [], [])


class DraftSource(Protocol):
    """A source of drafts for one sequence."""

    def follow(self, tokens: Sequence[int]) -> None:
        """Read final tokens of the output."""

    def propose(self, drafted: Sequence[int], max_tokens: int) -> Proposal:
        """Return at most `max_tokens` tokens after the final ones and those `drafted`."""


class TextSource:
    """Proposes what followed the newest tokens in several texts.

    At each token, the text whose token is accepted more often continues.

    Args:
        acceptance: Measured acceptance rates.
        text: Text of the request that may be repeated, such as its prompt.
        memory: Outputs of earlier requests.
        salt: The user whose outputs the memory may draft.
        phrases: Tables of the likeliest tokens.
    """

    def __init__(
        self,
        acceptance: Acceptance,
        vocab_size: int,
        text: Sequence[Sequence[int]] = (),
        memory: TextMemory | None = None,
        salt: str | None = None,
        phrases: Sequence[PhraseTable] = (),
    ) -> None:
        self._acceptance = acceptance
        self._vocab_size = vocab_size
        self._own = TextIndex(vocab_size)
        self._older = TextIndex(vocab_size)
        self._room = MAX_INDEXED // 2
        for part in text:
            self._own.start()
            self._add(part[-MAX_INDEXED:])
        self._newest = list(text[-1][-LONGEST:]) if text else []
        self._tables = [table.expected for table in phrases]
        self._indexes: list[tuple[str, Callable[[bytes], Expectation | None]]] = [
            ("lookup", self._expected)
        ]
        if memory is not None:
            self._indexes.append(("memory", partial(memory.expected, salt)))

    def follow(self, tokens: Sequence[int]) -> None:
        self._add(tokens)
        self._newest = [*self._newest, *tokens][-LONGEST:]

    def _add(self, tokens: Sequence[int]) -> None:
        """Index tokens of the request. Of a longer text, the older half is dropped."""
        while len(tokens) > self._room:
            self._own.add(tokens[: self._room])
            tokens = tokens[self._room :]
            self._older = self._own
            self._own = TextIndex(self._vocab_size)
            self._room = MAX_INDEXED // 2
        self._own.add(tokens)
        self._room -= len(tokens)

    def _expected(self, newest: bytes) -> Expectation | None:
        return self._own.expected(newest) or self._older.expected(newest)

    def propose(self, drafted: Sequence[int], max_tokens: int) -> Proposal:
        newest = [*self._newest, *drafted][-LONGEST:]
        encode = self._own.encode
        encoded = encode(newest)
        rate = self._acceptance.rate
        tokens: list[int] = []
        probabilities: list[float] = []
        evidence: list[Evidence] = []
        reached = 1.0
        while len(tokens) < max_tokens and reached > MIN_REACH:
            likely = 0.0
            token = -1
            kind: Evidence = "", 0
            found = [(source, expected(encoded)) for source, expected in self._indexes]
            found += [("phrases", expected(newest)) for expected in self._tables]
            for source, expected in found:
                if expected is None:
                    continue
                agreed = expected.token == token
                other = source, expected.level + (AGREED if agreed else 0)
                other_rate = rate(other)
                if agreed or other_rate > likely:
                    token = expected.token
                    kind = other
                    likely = other_rate
            if token < 0:
                break
            tokens.append(token)
            probabilities.append(likely)
            evidence.append(kind)
            reached *= likely
            newest.append(token)
            encoded += encode((token,))
        if not tokens:
            return NO_PROPOSAL
        return Proposal(evidence[0][0], tokens, probabilities, evidence)


class Predicted:
    """Proposes a text that the output is expected to match, except for some changes."""

    def __init__(self, acceptance: Acceptance, tokens: Sequence[int]) -> None:
        self._acceptance = acceptance
        self._tokens = list(tokens)
        self._place = 0
        self._agrees = 0
        self._left = 0  # the place where the output last followed it
        self._newest: list[int] = []

    def follow(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._read(token)

    def propose(self, drafted: Sequence[int], max_tokens: int) -> Proposal:
        ahead = self
        if drafted:
            ahead = copy.copy(self)
            ahead.follow(drafted)
        tokens = ahead._tokens[ahead._place : ahead._place + max_tokens]
        return _agreeing("predicted", ahead._agrees, tokens, self._acceptance)

    def _read(self, token: int) -> None:
        """Read the next token of the output and move to the matching place."""
        self._newest = [*self._newest[1 - COMPARED :], token]
        if self._tokens[self._place : self._place + 1] == [token]:
            self._place += 1
            self._agrees += 1
        else:
            # Move to the nearby place that matches best. If there is none, assume that this token
            # replaced another.
            following = self._place + 1
            found = (
                (self._agreement(place), -abs(place - following), place)
                for place in self._places(token)
            )
            self._agrees, _, self._place = max(found, default=(0, 0, following))
        if self._agrees >= 2:
            self._left = self._place

    def _places(self, token: int) -> Iterator[int]:
        """Yield the place after each nearby occurrence of a token."""
        start = max(0, self._left - NEAR)
        end = min(len(self._tokens), self._left + NEAR)
        while token in self._tokens[start:end]:
            start = self._tokens.index(token, start) + 1
            yield start

    def _agreement(self, place: int) -> int:
        """Return how many tokens before a place match the end of the output."""
        before = self._tokens[max(0, place - COMPARED) : place]
        pairs = zip(reversed(before), reversed(self._newest), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Own:
    """Proposes what the caller's `draft_source` expects.

    Args:
        source: Called with the decoder's tokens so far, int64 [n]. Returns token ids, or a pair of
            token ids and their probabilities.
        context: Tokens that the decoder reads before the first token.
    """

    def __init__(
        self, acceptance: Acceptance, source: OwnSource, context: Sequence[int], vocab_size: int
    ) -> None:
        self._acceptance = acceptance
        self._source = source
        self._context = list(context)
        self._vocab_size = vocab_size

    def follow(self, tokens: Sequence[int]) -> None:
        self._context += tokens

    def propose(self, drafted: Sequence[int], max_tokens: int) -> Proposal:
        given: Any = self._source(np.array([*self._context, *drafted], np.int64))
        probabilities: Any = None
        tokens: Any = given
        if isinstance(given, tuple) and len(given) == 2 and not isinstance(given[0], Integral):
            tokens, probabilities = given
        tokens = self._checked(tokens, max(max_tokens, MAX_CHECKED))
        if tokens is None:
            raise OptionError(
                f"draft_source returned {shown(given)}; return a list of token ids, integers from "
                f"0 to {self._vocab_size - 1}, empty where nothing is expected"
            )
        if probabilities is None:
            return _agreeing("own", 0, tokens[:max_tokens], self._acceptance)
        estimates = _probabilities(probabilities, len(tokens))
        if estimates is None:
            raise OptionError(
                f"draft_source returned probabilities {shown(probabilities)}; return one from 0 "
                "to 1 for each token id"
            )
        evidence = [
            self._acceptance.of_estimate("own", estimate) for estimate in estimates[:max_tokens]
        ]
        probabilities = [*map(self._acceptance.rate, evidence)]
        return Proposal("own", tokens[:max_tokens], probabilities, evidence)

    def _checked(self, given: Any, count: int) -> list[int] | None:
        """Return the first `count` token ids, or None if one of them is not valid."""
        is_list = isinstance(given, (list, tuple))
        if not is_list and not (isinstance(given, np.ndarray) and given.ndim == 1):
            return None
        tokens = given[:count]
        for token in tokens:
            if not isinstance(token, Integral) or isinstance(token, bool):
                return None
            if not 0 <= int(token) < self._vocab_size:
                return None
        return [int(token) for token in tokens]


def _probabilities(given: Any, count: int) -> list[float] | None:
    """Return the first `count` probabilities, or None if they are not valid."""
    is_list = isinstance(given, (list, tuple))
    if not is_list and not (isinstance(given, np.ndarray) and given.ndim == 1):
        return None
    if len(given) < count:
        return None
    for each in given[:count]:
        if not isinstance(each, Real) or isinstance(each, bool) or not 0 <= float(each) <= 1:
            return None
    return [float(each) for each in given[:count]]


def _agreeing(source: str, agrees: int, tokens: list[int], acceptance: Acceptance) -> Proposal:
    """Return a proposal whose evidence is the number of tokens that agreed before each."""
    evidence = [(source, min(agrees + place, MAX_AGREEMENT)) for place in range(len(tokens))]
    return Proposal(source, tokens, [*map(acceptance.rate, evidence)], evidence)
