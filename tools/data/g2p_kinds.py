"""Words of the pronouncing dictionary by how usual their spelling is: a stand-in for common, and for rare and foreign.

The dictionary lists no frequencies, but a foreign name shows in its letters: a word is as usual as its three-letter
sequences are in the whole dictionary, on average.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.data.g2p import Word

# "Common": so many letters at most, without an apostrophe, and among the most usual share of such words.
SHORT, USUAL_SHARE = 6, 0.5
# "Rare": the least usual share of all words, and those of so many letters at least.
UNUSUAL_SHARE, LONG = 0.05, 12


@dataclass(frozen=True)
class Spelling:
    """How usual spellings are among `counts` of three-letter sequences, ends of words marked."""

    counts: Counter[str]

    @classmethod
    def of(cls, words: Iterable[Word]) -> Spelling:
        return cls(Counter(part for word in words for part in _parts(word)))

    def usualness(self, word: Word) -> float:
        """The mean logarithm of how often its three-letter sequences occur."""
        parts = _parts(word)
        return sum(math.log(1 + self.counts[part]) for part in parts) / len(parts)

    def common(self, words: Sequence[Word]) -> list[Word]:
        short = [word for word in words if len(word.spelling) <= SHORT and "'" not in word.spelling]
        return self._ranked(short)[: math.ceil(USUAL_SHARE * len(short))]

    def rare(self, words: Sequence[Word]) -> list[Word]:
        unusual = set(self._ranked(words)[::-1][: math.ceil(UNUSUAL_SHARE * len(words))])
        return [word for word in words if word in unusual or len(word.spelling) >= LONG]

    def _ranked(self, words: Sequence[Word]) -> list[Word]:
        """Most usual first."""
        return sorted(words, key=lambda word: (-self.usualness(word), word.spelling))


def _parts(word: Word) -> list[str]:
    marked = f"^{word.spelling}$"
    return [marked[start : start + 3] for start in range(len(marked) - 2)]
