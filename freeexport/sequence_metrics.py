"""How good an output is against a reference: a score in [0, 1] for each sequence, 1 is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

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

    from freeexport.phonemes import SEPARATOR

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
