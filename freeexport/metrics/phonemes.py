"""Errors of pronunciations, counted against the nearest one that is listed for a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from freeexport.metrics.metric import Metric, less_errors
from freeexport.metrics.reference import Reference

SEPARATOR = "|"


@dataclass(frozen=True)
class Errors:
    """Edits against the reference and the reference's phonemes; words that are not exactly right, and all words."""

    phoneme_edits: int = 0
    phonemes: int = 0
    wrong_words: int = 0
    words: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.phoneme_edits + other.phoneme_edits,
            self.phonemes + other.phonemes,
            self.wrong_words + other.wrong_words,
            self.words + other.words,
        )


def errors(text: str, references: Sequence[Sequence[str]]) -> Errors:
    """`text` against the pronunciations of each word. A word counts against the nearest of its pronunciations, as
    published rates do; where the number of words is wrong, phonemes count against the first ones, and words are aligned
    whole."""
    words = [word.split() for word in text.split(SEPARATOR)]
    if len(words) == len(references):
        total = Errors()
        for word, known in zip(words, references, strict=True):
            total += _nearest(word, [pronunciation.split() for pronunciation in known])
        return total
    first = [tuple(known[0].split()) for known in references]
    found = [tuple(word) for word in words]
    flat = [phoneme for word in first for phoneme in word]
    edits = Levenshtein.distance([phoneme for word in found for phoneme in word], flat)
    wrong = min(len(first), Levenshtein.distance(found, first))
    return Errors(edits, len(flat), wrong, len(first))


def _nearest(word: Sequence[str], known: Sequence[Sequence[str]]) -> Errors:
    edits, length = min((Levenshtein.distance(word, other), len(other)) for other in known)
    return Errors(edits, length, int(edits > 0), 1)


def errors_of(text: str, reference: Reference) -> Errors:
    """Against alternatives of each word, or else the nearest of the texts."""
    if reference.words is not None:
        return errors(text, reference.words)
    each = [errors(text, [[word] for word in known.split(SEPARATOR)]) for known in reference.texts]
    return min(each, key=lambda one: (one.phoneme_edits, one.wrong_words))


def metric(name: str) -> Metric:
    """per and word-acc: 1 less the rate of wrong phonemes, and of wrong words."""

    def statistics(text: str, reference: Reference) -> Sequence[float]:
        found = errors_of(text, reference)
        counts = (found.phoneme_edits, found.phonemes, found.wrong_words, found.words)
        return counts[:2] if name == "per" else counts[2:]

    return Metric(name, statistics, less_errors, needs=(1, "the references have no phonemes"))
