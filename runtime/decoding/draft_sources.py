"""Sources of drafts other than the exit: repeated text, an expected output, or the caller's code.

runtime/decoding/draft_rule.py decides which of their candidates are worth drafting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from runtime.decoding.draft_memory import LEVELS, ORDERS, TextMemory
from runtime.decoding.draft_memory import LONGEST as MEMORY_LONGEST
from runtime.decoding.draft_rule import RULE
from runtime.decoding.phrases import PhraseTable
from runtime.errors import OptionError, shown
from runtime.options import DraftSource
from runtime.result import Token

# Sizes of the n-grams that are looked up, in tokens.
SHORTEST, LONGEST = 2, 5
# Maximum number of indexed places. Of a longer text, the older half is dropped.
MOST_PLACES = 16_384
# A predicted text is searched within this many tokens of the place where the output left it.
NEAR = 64
# Number of ids from the caller's draft source that are checked, even if fewer fit into a sync
# pass. Bounds the time for a long list.
MOST_CHECKED = 256
# Separates texts that do not follow each other.
GAP = -1

# Source of a token, and a level on which its acceptance depends: the number of matching tokens
# before it, or the level of an Expectation.
Evidence = tuple[str, int]
# Sources that count what followed an n-gram, so that a share of occurrences is known.
COUNTED = ("memory", "phrases")
# Added to the level of an Expectation that the source before it shares.
AGREED = LEVELS * len(ORDERS)


class Repetition:
    """A lookup: the tokens that followed the latest earlier occurrence of the newest tokens.

    For each n-gram of SHORTEST to LONGEST tokens, it keeps the place after its latest occurrence,
    for at most `most` places. `vocab_size`, V, bounds the tokens.

    Attributes:
        tokens: The text.
        place: Place after the earlier occurrence that the newest tokens follow.
        agrees: Number of newest tokens that match the earlier occurrence, 0 if there is none.
    """

    name = "lookup"

    def __init__(self, vocab_size: int, most: int = MOST_PLACES) -> None:
        self.tokens: list[int] = []
        self._vocab_size = vocab_size
        self._most = most
        self.place = self.agrees = 0
        self._forget(0)

    def _forget(self, first: int) -> None:
        self._first = first  # place of the first indexed token
        # The newest n-gram of each size, encoded as one number, as far as its tokens are known.
        self._keys = [0] * (LONGEST + 1)
        self._known = 0
        self._places: list[dict[int, int]] = [{} for _ in range(LONGEST + 1)]

    def push(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text. GAP separates texts that do not follow each other."""
        text = self.tokens
        start = len(text)
        text += tokens
        if len(text) - self._first > self._most:
            start = len(text) - self._most // 2
            self._forget(start)
        places = self._places
        vocab_size = self._vocab_size
        known = self._known
        # In variables of their own: a loop over sizes takes twice the time.
        _, one, two, three, four, five = self._keys
        _, _, after_two, after_three, after_four, after_five = places
        for place in range(start, len(text)):
            token = text[place]
            if token == GAP:
                known = 0
                continue
            if known == LONGEST:
                after_two[two] = place
                after_three[three] = place
                after_four[four] = place
                after_five[five] = place
            else:
                newest = [0, one, two, three, four]
                for size in range(SHORTEST, known + 1):
                    places[size][newest[size]] = place
                known += 1
            five = four * vocab_size + token
            four = three * vocab_size + token
            three = two * vocab_size + token
            two = one * vocab_size + token
            one = token
        self._keys = [0, one, two, three, four, five]
        self._known = known

    def repeated(self, longer_than: int = 0) -> tuple[int, int]:
        """Return the place after the latest earlier occurrence of the n-gram at the end, and its n.

        Chooses the longest n-gram that occurs. Returns (0, 0) if none of more than `longer_than`
        tokens does.
        """
        for size in range(self._known, max(SHORTEST, longer_than + 1) - 1, -1):
            place = self._places[size].get(self._keys[size])
            if place is not None:
                return place, size
        return 0, 0

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens of the output, and update the occurrence that they follow."""
        self.push(tokens)
        text = self.tokens
        for token in tokens:
            self.agrees = self.agrees + 1 if self.agrees and text[self.place] == token else 0
            self.place += 1
        if self.agrees and text[self.place] == GAP:
            self.agrees = 0
        if self.agrees < LONGEST:
            place, size = self.repeated(longer_than=self.agrees)
            if size:
                # An occurrence that began before the last token may be longer.
                while text[place - size - 1] == text[-size - 1] != GAP and place > size:
                    size += 1
                self.place = place
                self.agrees = size

    def match(self, drafted: Sequence[int]) -> tuple[int, int]:
        """Return the latest occurrence of the newest tokens, the last ones `drafted`.

        Returns the place after it and the number of tokens that match, (0, 0) if none do.
        """
        newest = [*self.tokens[len(self.tokens) - self._known :], *drafted][-LONGEST:]
        # A longer n-gram occurs only where its end does.
        if len(newest) < 2 or newest[-2] * self._vocab_size + newest[-1] not in self._places[2]:
            return 0, 0
        for size in range(len(newest), SHORTEST - 1, -1):
            key = 0
            for token in newest[-size:]:
                key = key * self._vocab_size + token
            place = self._places[size].get(key)
            if place is not None:
                return place, size
        return 0, 0

    def at(self, place: int) -> int:
        """Return the token at a place, GAP at the end of a text."""
        return self.tokens[place] if place < len(self.tokens) else GAP


class Expected:
    """A text that the output is expected to match, except for some changes."""

    name = "predicted"

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._place = self.agrees = 0
        self._left = 0  # the place where the output last followed it
        self._newest: list[int] = []

    def read(self, token: int) -> None:
        """Read the next token of the output and move to the matching place."""
        self._newest = [*self._newest[1 - LONGEST :], token]
        if self._tokens[self._place : self._place + 1] == [token]:
            self._place = self._place + 1
            self.agrees = self.agrees + 1
        else:
            # Move to the nearby place that matches best. If there is none, assume that this token
            # replaced another.
            following = self._place + 1
            found = (
                (self._agreement(place), -abs(place - following), place)
                for place in self._places(token)
            )
            self.agrees, _, self._place = max(found, default=(0, 0, following))
        if self.agrees >= SHORTEST:
            self._left = self._place

    def candidates(self, most: int) -> list[int]:
        """Return the next tokens of the expected text, at most `most`."""
        return self._tokens[self._place : self._place + most]

    def after(self, drafted: Sequence[int], most: int) -> tuple[int, list[int]]:
        """Return how many newest tokens, the last ones `drafted`, match, and what follows them."""
        ahead = copy.copy(self)
        for token in drafted:
            ahead.read(token)
        return ahead.agrees, ahead.candidates(most)

    def _places(self, token: int) -> Iterator[int]:
        """Yield the place after each nearby occurrence of a token."""
        start = max(0, self._left - NEAR)
        end = min(len(self._tokens), self._left + NEAR)
        while token in self._tokens[start:end]:
            start = self._tokens.index(token, start) + 1
            yield start

    def _agreement(self, place: int) -> int:
        """Return how many tokens before a place match the end of the output, at most LONGEST."""
        before = self._tokens[max(0, place - LONGEST) : place]
        pairs = zip(reversed(before), reversed(self._newest), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Own:
    """Calls the caller's draft source with the decoder's tokens so far, int64 [n]."""

    name = "own"

    def __init__(self, source: DraftSource, vocab_size: int) -> None:
        self._source = source
        self._vocab_size = vocab_size

    def candidates(self, context: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that the source expects next.

        The first MOST_CHECKED ids are checked, so an invalid id is an error even if it does not fit
        into a pass.
        """
        given: Any = self._source(np.array(context, np.int64))
        if isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim == 1):
            tokens = given[: max(most, MOST_CHECKED)]
            whole = all(
                isinstance(token, Integral) and not isinstance(token, bool) for token in tokens
            )
            if whole and all(0 <= token < self._vocab_size for token in tokens):
                return [int(token) for token in tokens[:most]]
        raise OptionError(
            f"draft_source returned {shown(given)}; return a list of token ids, integers from 0 to "
            f"{self._vocab_size - 1}, empty where nothing is expected"
        )


class Candidates(NamedTuple):
    """Possible next tokens.

    Attributes:
        source: Source of the first token.
        agrees: Number of tokens before them that match this source.
        evidence: The evidence for each token.
    """

    source: str
    agrees: int
    tokens: list[int]
    evidence: list[Evidence]


NO_CANDIDATES = Candidates("lookup", 0, [], [])


def agreeing(source: str, agrees: int, tokens: list[int]) -> Candidates:
    """Return candidates from one place of a text, after `agrees` matching tokens."""
    most = RULE.most_agreement
    evidence = [(source, min(agrees + place, most)) for place in range(len(tokens))]
    return Candidates(source, agrees, tokens, evidence)


class DraftSources:
    """Sources of candidates for one sequence.

    Args:
        prompt: Tokens that the decoder reads before the first token.
        text: Other text that may be repeated, such as the encoder's prompt.
        predicted: Expected output.
        own: The caller's source.
        memory: Texts of earlier requests.
        salt: The user whose texts the memory may draft.
        phrases: Tables of the likeliest tokens.

    Attributes:
        context: Tokens of the decoder so far.
    """

    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int] = (),
        text: Sequence[int] = (),
        predicted: Sequence[int] | None = None,
        own: DraftSource | None = None,
        memory: TextMemory | None = None,
        salt: str | None = None,
        phrases: Sequence[PhraseTable] = (),
    ) -> None:
        self.own = None if own is None else Own(own, vocab_size)
        self._repetition = repetition = Repetition(vocab_size)
        self._expected = None if predicted is None else Expected(predicted)
        # Names of the sources with counts, and functions that return the likeliest next token.
        self._counted = [("phrases", table.expected) for table in phrases]
        if memory is not None:
            self._counted.insert(0, ("memory", partial(memory.expected, salt)))
        for part in filter(len, (predicted or (), text)):
            repetition.push([*part, GAP])
        repetition.read(prompt)
        self.context = list(prompt)
        self._begun = len(prompt)

    def follow(self, tokens: Sequence[Token]) -> list[int]:
        """Read the new ones among the final `tokens`, and return their ids."""
        final = [token.id for token in tokens[len(self.context) - self._begun :]]
        self.context += final
        self._repetition.read(final)
        if self._expected is not None:
            for token in final:
                self._expected.read(token)
        return final

    def found(self, most: int, rate: Callable[[Evidence], float]) -> Iterator[Candidates]:
        """Yield the candidates of each text, at most `most` tokens each, by acceptance `rate`."""
        expected = self._expected
        if expected is not None:
            yield agreeing(expected.name, expected.agrees, expected.candidates(most))
        yield self._chain((), most, rate)

    def after(
        self, drafted: Sequence[int], most: int, rate: Callable[[Evidence], float]
    ) -> Candidates:
        """Return the candidates after `drafted`, from the text that is more likely to go on."""
        found = self._chain(drafted, most, rate)
        if self._expected is None:
            return found
        other = agreeing(self._expected.name, *self._expected.after(drafted, most))
        if not (found.tokens and other.tokens):
            return found if found.tokens else other
        return max(other, found, key=lambda candidates: rate(candidates.evidence[0]))

    def _chain(
        self, drafted: Sequence[int], most: int, rate: Callable[[Evidence], float]
    ) -> Candidates:
        """Return the tokens that followed the newest ones, in this request or in other texts.

        At each token, the source with the higher acceptance rate continues. Ends where all tokens
        so far are unlikely to be accepted.
        """
        repetition = self._repetition
        if drafted:
            place, agrees = repetition.match(drafted)
        else:
            place = repetition.place
            agrees = repetition.agrees
        begins = agrees
        if not self._counted:
            if not agrees:
                return NO_CANDIDATES
            found = repetition.tokens[place : place + most]
            return agreeing("lookup", agrees, found[: found.index(GAP)] if GAP in found else found)
        newest = [*self.context[-MEMORY_LONGEST:], *drafted]
        tokens: list[int] = []
        evidence: list[Evidence] = []
        probability = 1.0
        while len(tokens) < most and probability > RULE.hopeless:
            token = repetition.at(place) if agrees else GAP
            likely = 0.0
            if token != GAP:
                kind = "lookup", min(agrees, RULE.most_agreement)
                likely = rate(kind)
            for source, expected_after in self._counted:
                expected = expected_after(newest)
                if expected is None:
                    continue
                agreed = expected.token == token and agrees < RULE.most_agreement
                other = source, expected.level + (AGREED if agreed else 0)
                other_rate = rate(other)
                if token == GAP or agreed or other_rate > likely:
                    kind = other
                    likely = other_rate
                    if expected.token != token:
                        agrees = -1
                    token = expected.token
            if token == GAP:
                break
            tokens.append(token)
            evidence.append(kind)
            probability *= likely
            newest.append(token)
            if agrees >= 0:
                place += 1
                agrees += 1
            if agrees <= 0:
                place, agrees = repetition.match([*drafted, *tokens])
        return Candidates(evidence[0][0], begins, tokens, evidence) if tokens else NO_CANDIDATES
