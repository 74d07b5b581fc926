"""How good an output is against a reference: a score in [0, 1] for each sequence, 1 is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

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

    @property
    def phoneme_error_rate(self) -> float:
        return self.phoneme_edits / max(1, self.phonemes)

    @property
    def word_error_rate(self) -> float:
        return self.wrong_words / max(1, self.words)


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
    said = [tuple(word) for word in words]
    flat = [phoneme for word in first for phoneme in word]
    edits = Levenshtein.distance([phoneme for word in said for phoneme in word], flat)
    wrong = min(len(first), Levenshtein.distance(said, first))
    return Errors(edits, len(flat), wrong, len(first))


def _nearest(word: Sequence[str], known: Sequence[Sequence[str]]) -> Errors:
    edits, length = min((Levenshtein.distance(word, other), len(other)) for other in known)
    return Errors(edits, length, int(edits > 0), 1)


Metric = Literal["exact", "rouge-l", "bleu", "chrf", "wer", "per"]
Score = Callable[[str, str], float]  # of an output against a reference


def score_of(metric: Metric) -> Score:
    """Whole lines equal; ROUGE-L's F1; sentence BLEU and chrF; and 1 less the rate of wrong words or phonemes, where
    everything beyond one error a word counts as one. Needs the extra `metrics` but for "exact"."""
    return {"exact": _exact, "rouge-l": _rouge, "bleu": _bleu, "chrf": _chrf, "wer": _words, "per": _phonemes}[metric]()


def scores(metric: Metric, outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Of each sequence: bool [n] for "exact", float64 [n] for the others."""
    score = score_of(metric)
    values = [score(output, reference) for output, reference in zip(outputs, references, strict=True)]
    return np.array(values, np.bool_ if metric == "exact" else np.float64)


def _exact() -> Score:
    return lambda output, reference: float(output.strip() == reference.strip())


def _rouge() -> Score:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return _or_equal(lambda output, reference: float(scorer.score(reference, output)["rougeL"].fmeasure))


def _bleu() -> Score:
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    return _or_equal(lambda output, reference: bleu.sentence_score(output, [reference]).score / 100)


def _chrf() -> Score:
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    return _or_equal(lambda output, reference: chrf.sentence_score(output, [reference]).score / 100)


def _words() -> Score:
    import jiwer

    return _or_equal(lambda output, reference: 1 - jiwer.wer(reference, output))


def _phonemes() -> Score:
    """What stands between spaces; `|` between words is no phoneme."""
    from rapidfuzz.distance import Levenshtein

    from freeexport.calibration.metrics import SEPARATOR

    def split(text: str) -> list[str]:
        return [phoneme for phoneme in text.split() if phoneme != SEPARATOR]

    return _or_equal(lambda out, ref: 1 - Levenshtein.distance(split(out), split(ref)) / max(1, len(split(ref))))


def _or_equal(score: Score) -> Score:
    """1 where both are the same, also where the metric is not made for it (no words); nothing for an empty one."""

    def bounded(output: str, reference: str) -> float:
        if output.strip() == reference.strip():
            return 1.0
        if not output.strip() or not reference.strip():
            return 0.0
        return min(1.0, max(0.0, score(output, reference)))

    return bounded
