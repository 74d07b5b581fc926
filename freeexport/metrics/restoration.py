"""Text restoration: how well an output puts back the capital letters and the punctuation of a text.

Words of both are aligned without case and punctuation; what stands at words that are not aligned is wrong or missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

from rapidfuzz.distance import Levenshtein

from freeexport.metrics.metric import Metric, f1
from freeexport.metrics.reference import Reference

# A word with what joins its parts, or one mark.
_PIECE = re.compile(r"\w+(?:['’+#/.-]+\w+)*|[^\w\s]")
_NEEDS = {"case-f1": "the references have no capital letters", "punct-f1": "the references have no punctuation"}


def metric(name: str) -> Metric:
    """case-f1: words that are written with capitals, and how; punct-f1: marks, each by its kind and the word before it.
    F1 over all sequences; the counts are of what is right, of the output and of the reference."""
    wanted = _capitals if name == "case-f1" else _marks

    def counts(output: str, text: str) -> tuple[float, float, float]:
        words, marks = _read(output)
        true_words, true_marks = _read(text)
        place = _aligned(words, true_words)
        ours = wanted(words, marks, place)
        theirs = wanted(true_words, true_marks, {number: number for number in range(-1, len(true_words))})
        return (ours & theirs).total(), ours.total(), theirs.total()

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        return max((counts(output, text) for text in reference.texts), key=lambda found: found[0])

    return Metric(name, statistics, f1, needs=(2, _NEEDS[name]))


def _read(text: str) -> tuple[list[str], list[tuple[int, str]]]:
    """Words, and marks with the number of the word before them (-1: none)."""
    words: list[str] = []
    marks: list[tuple[int, str]] = []
    for piece in _PIECE.findall(text):
        if piece[0].isalnum() or piece[0] == "_":
            words.append(piece)
        else:
            marks.append((len(words) - 1, piece))
    return words, marks


def _aligned(words: Sequence[str], true_words: Sequence[str]) -> dict[int, int]:
    """The reference's word for each word that is the same but for case; the start is that of both."""
    ours, theirs = ([word.lower() for word in each] for each in (words, true_words))
    place = {-1: -1}
    for block in Levenshtein.opcodes(ours, theirs).as_matching_blocks():
        place.update({block.a + step: block.b + step for step in range(block.size)})
    return place


def _capitals(words: Sequence[str], marks: Sequence[tuple[int, str]], place: dict[int, int]) -> Counter[Hashable]:
    written = ((number, word) for number, word in enumerate(words) if word != word.lower())
    return Counter((place.get(number, f"other {number}"), word) for number, word in written)


def _marks(words: Sequence[str], marks: Sequence[tuple[int, str]], place: dict[int, int]) -> Counter[Hashable]:
    return Counter((place.get(number, f"other {number}"), mark) for number, mark in marks)
