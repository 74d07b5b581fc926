"""Sources of drafts besides the exit: tokens that may come next, of text that may be repeated, or as the caller's own
code expects. runtime/decoding/draft_rule.py judges what they are worth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import takewhile
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import OptionError, shown
from runtime.options import DraftSource
from runtime.result import Token

# Tokens of the n-grams that are looked up.
SHORTEST, LONGEST = 2, 5
# Places of a text that are indexed; of a longer one the older half is forgotten.
MOST_PLACES = 16_384
# A predicted text is searched so many tokens before and after the place where the output left it.
NEAR = 64
# After so many tokens without a right candidate they are looked for at every fourth token only: that takes time outside
# the engines, and a token of a small model takes little.
PATIENCE = 32
REST = 4
# Between texts that do not follow each other.
GAP = -1


class Repetition:
    """A lookup: the tokens that followed where the newest ones stood before. `agrees`: how many did, 0 for none.

    For each n-gram of the text, of SHORTEST to LONGEST tokens, the place behind its latest occurrence is kept, for at
    most `most` places. `vocab_size` V bounds the tokens.
    """

    name = "lookup"

    def __init__(self, vocab_size: int, most: int = MOST_PLACES) -> None:
        self.tokens: list[int] = []
        self._vocab_size = vocab_size
        self._most = most
        self._place = self.agrees = 0
        self._forget()

    def _forget(self) -> None:
        self._first = len(self.tokens)
        self._known = 0
        self._keys = [0] * (LONGEST + 1)
        self._places: list[dict[int, int]] = [{} for _ in range(LONGEST + 1)]

    def push(self, token: int) -> None:
        """Add the next token; GAP: what comes does not follow what was."""
        place = len(self.tokens)
        if place - self._first >= self._most:
            recent = self.tokens[-(self._most // 2) :]
            del self.tokens[-len(recent) :]
            self._forget()
            for earlier in recent:
                self.push(earlier)
        self.tokens.append(token)
        if token == GAP:
            self._known = 0
            return
        # The newest n-gram of each size, as one number, now has a place behind it.
        keys = self._keys
        vocab_size = self._vocab_size
        for size in range(SHORTEST, self._known + 1):
            self._places[size][keys[size]] = place
        for size in range(LONGEST, 1, -1):
            keys[size] = keys[size - 1] * vocab_size + token
        keys[1] = token
        self._known = min(LONGEST, self._known + 1)

    def repeated(self, longer_than: int = 0) -> tuple[int, int]:
        """The place behind the latest earlier occurrence of the longest n-gram that the text ends with, and its n; 0
        and 0 where none of more than `longer_than` tokens occurs."""
        for size in range(self._known, max(SHORTEST, longer_than + 1) - 1, -1):
            place = self._places[size].get(self._keys[size])
            if place is not None:
                return place, size
        return 0, 0

    def read(self, token: int) -> None:
        followed = self.agrees and self.tokens[self._place] == token
        self.push(token)
        self._place += 1
        self.agrees = self.agrees + 1 if followed and self.tokens[self._place] != GAP else 0
        if self.agrees < LONGEST:
            place, size = self.repeated(longer_than=self.agrees)
            if size:
                self._place = place
                self.agrees = size

    def candidates(self, most: int) -> list[int]:
        return self._behind(self._place, most) if self.agrees else []

    def after(self, drafted: Sequence[int], most: int) -> tuple[int, list[int]]:
        """How many of the newest tokens, `drafted` the last, stand in the text, and what follows them there."""
        newest = [*self.tokens[len(self.tokens) - self._known :], *drafted][-LONGEST:]
        for size in range(len(newest), SHORTEST - 1, -1):
            key = 0
            for token in newest[-size:]:
                key = key * self._vocab_size + token
            place = self._places[size].get(key)
            if place is not None:
                return size, self._behind(place, most)
        return 0, []

    def _behind(self, place: int, most: int) -> list[int]:
        found = self.tokens[place : place + most]
        return found[: found.index(GAP)] if GAP in found else found


class Expected:
    """The rest of a text that the output is expected to be, but for changes."""

    name = "predicted"

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._place = self.agrees = 0
        self._left = 0  # the place where it was last followed
        self._newest: list[int] = []

    def read(self, token: int) -> None:
        self._newest = [*self._newest[1 - LONGEST :], token]
        if self._tokens[self._place : self._place + 1] == [token]:
            self._place = self._place + 1
            self.agrees = self.agrees + 1
        else:
            # Where the same tokens stand near by, else as if this one had taken the place of another.
            following = self._place + 1
            found = (
                (self._agreement(place), -abs(place - following), place)
                for place in self._places(token)
            )
            self.agrees, _, self._place = max(found, default=(0, 0, following))
        if self.agrees >= SHORTEST:
            self._left = self._place

    def candidates(self, most: int) -> list[int]:
        return self._tokens[self._place : self._place + most]

    def after(self, drafted: Sequence[int], most: int) -> tuple[int, list[int]]:
        """How many of the newest tokens, `drafted` the last, are as expected, and what is expected then."""
        ahead = copy.copy(self)
        for token in drafted:
            ahead.read(token)
        return ahead.agrees, ahead.candidates(most)

    def _places(self, token: int) -> Iterator[int]:
        """Behind each occurrence of a token."""
        start, end = max(0, self._left - NEAR), min(len(self._tokens), self._left + NEAR)
        while token in self._tokens[start:end]:
            start = self._tokens.index(token, start) + 1
            yield start

    def _agreement(self, place: int) -> int:
        """How many tokens before a place are the newest of the output, up to LONGEST."""
        before = self._tokens[max(0, place - LONGEST) : place]
        pairs = zip(reversed(before), reversed(self._newest), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Own:
    """The caller's code, which is given the decoder's tokens so far, int64 [n]. OptionError where it returns no list of
    token ids."""

    name = "own"

    def __init__(self, source: DraftSource, vocab_size: int) -> None:
        self._source = source
        self._vocab_size = vocab_size

    def candidates(self, context: Sequence[int], most: int) -> list[int]:
        given: Any = self._source(np.array(context, np.int64))
        if isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim == 1):
            tokens = given[:most]
            whole = all(
                isinstance(token, Integral) and not isinstance(token, bool) for token in tokens
            )
            if whole and all(0 <= token < self._vocab_size for token in tokens):
                return [int(token) for token in tokens]
        raise OptionError(
            f"draft_source returned {shown(given)}; return a list of token ids, integers from 0 to "
            f"{self._vocab_size - 1}, empty where nothing is expected"
        )


class Candidates(NamedTuple):
    """`tokens` of a `source` that may come next; so many tokens before them agree with it."""

    source: str
    agrees: int
    tokens: list[int]


class DraftSources:
    """Candidates for one sequence. `prompt`: what the decoder read before the first token; `text`: what else may be
    repeated, as the encoder's prompt; `predicted`: the output that is expected; `own`: the caller's source."""

    def __init__(
        self,
        vocab_size: int,
        prompt: Sequence[int] = (),
        text: Sequence[int] = (),
        predicted: Sequence[int] | None = None,
        own: DraftSource | None = None,
    ) -> None:
        self.own = None if own is None else Own(own, vocab_size)
        repetition = Repetition(vocab_size)
        self._texts: list[Expected | Repetition] = [repetition]
        if predicted is not None:
            self._texts.insert(0, Expected(predicted))
        for part in filter(len, (predicted or (), text)):
            for token in (*part, GAP):
                repetition.push(token)
        for token in prompt:
            repetition.read(token)
        self.context = list(prompt)
        self._begun = len(prompt)
        self.tokens_to_look = 0
        self.unexpected = 0  # tokens since a candidate was right

    def due(self) -> bool:
        """Count a token, and tell whether to look for candidates at it."""
        self.tokens_to_look -= 1
        if self.tokens_to_look > 0:
            return False
        self.tokens_to_look = REST if self.unexpected >= PATIENCE else 0
        return True

    def follow(self, tokens: Sequence[Token]) -> list[int]:
        """Read those of the final `tokens` that are new, and return them."""
        final = [token.id for token in tokens[len(self.context) - self._begun :]]
        self.unexpected += len(final)
        self.context += final
        for token in final:
            for text in self._texts:
                text.read(token)
        return final

    def found(self, most: int) -> Iterator[Candidates]:
        """Yield candidates of the texts, at most `most` tokens each."""
        for source in self._texts:
            yield Candidates(source.name, source.agrees, source.candidates(most))

    def after(self, drafted: Sequence[int], most: int) -> Candidates:
        """The candidates behind `drafted` tokens of the text that most of them agree with."""
        found = [Candidates(source.name, *source.after(drafted, most)) for source in self._texts]
        return max(found, key=lambda candidates: candidates.agrees)
