"""Metrics of texts, by the libraries that published figures use."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from freeexport.metrics.metric import Metric, Statistics, less_errors, mean
from freeexport.metrics.reference import Reference

_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL", "rouge-lsum": "rougeLsum"}


def metric(name: str) -> Metric:
    """Of NAMES, those of texts."""
    if name in _ROUGE:
        return _rouge(name)
    if name in ("bleu", "chrf"):
        return _sacrebleu(name)
    if name == "wer":
        return _words()
    if name == "exact":
        return Metric(name, _exact, mean)
    compare = {"squad-em": _squad_exact, "squad-f1": _squad_f1}[name]
    return Metric(name, _best(compare), mean)


def _best(score: Callable[[str, str], float]) -> Statistics:
    """The best of the alternatives, and 1."""
    return lambda output, reference: (max(float(score(output, text)) for text in reference.texts), 1.0)


def _exact(output: str, reference: Reference) -> Sequence[float]:
    if reference.words is not None:
        words = [" ".join(word.split()) for word in output.split("|")]
        known = [[" ".join(text.split()) for text in texts] for texts in reference.words]
        return len(words) == len(known) and all(map(list.__contains__, known, words)), 1
    return any(output.strip() == text.strip() for text in reference.texts), 1


def _rouge(name: str) -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    kind = _ROUGE[name]
    scorer = RougeScorer([kind], use_stemmer=True)
    score = _best(lambda output, reference: scorer.score(reference, output)[kind].fmeasure)
    return Metric(name, score, mean, signature=f"rouge-score, {kind}, F1, stemmer")


def _sacrebleu(name: str) -> Metric:
    """What `sacrebleu.significance` resamples as well: sufficient statistics of a sequence."""
    from sacrebleu.metrics import BLEU, CHRF

    corpus: Any = BLEU() if name == "bleu" else CHRF()
    # A sentence may be too short for 4-grams.
    alone: Any = BLEU(effective_order=True) if name == "bleu" else corpus

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        rows = corpus._extract_corpus_statistics([output], [[text] for text in reference.texts])
        row: Sequence[float] = rows[0]
        return row

    def value_by(scorer: Any) -> Callable[[np.ndarray], float]:
        def value(sums: np.ndarray) -> float:
            return float(scorer._compute_score_from_stats([int(one) for one in sums]).score) / 100

        return value

    statistics("a", Reference(("a",)))  # the signature says how many references
    return Metric(name, statistics, value_by(corpus), value_by(alone), signature=str(corpus.get_signature()))


def _words() -> Metric:
    import jiwer

    def errors(output: str, text: str) -> tuple[float, float]:
        if not text.split():
            return len(output.split()), 0
        done = jiwer.process_words(text, output)
        return done.substitutions + done.deletions + done.insertions, len(text.split())

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        return min(errors(output, text) for text in reference.texts)

    return Metric("wer", statistics, less_errors, needs=(1, "the references have no words"), signature="jiwer")


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalized(answer: str) -> list[str]:
    """Words as SQuAD compares them (Rajpurkar et al. 2016): lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _squad_exact(output: str, reference: str) -> float:
    return _normalized(output) == _normalized(reference)


def _squad_f1(output: str, reference: str) -> float:
    ours, theirs = _normalized(output), _normalized(reference)
    if not ours or not theirs:
        return ours == theirs
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))
