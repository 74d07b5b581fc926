"""Metrics of outputs against references, shared by training, calibration and evaluation.

A metric has additive statistics for each sequence, and computes its value from their sum. The value
of any subset, or of a bootstrap resample, therefore needs no text to be scored again.
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from runtime.errors import FreeExportError, OptionError, shown

NAMES = (
    *(
        "exact",
        "rouge-1",
        "rouge-2",
        "rouge-l",
        "rouge-lsum",
        "bleu",
        "chrf",
        "wer",
        "per",
        "word-acc",
    ),
    *("squad-em", "squad-f1", "case-f1", "punct-f1"),
)


ERROR_RATES = ("wer", "per")
# Suffix of a metric's name: tables show its errors, 1 - value.
ERROR = "-error"


class MetricError(FreeExportError):
    """A metric does not fit the data."""


@dataclass(frozen=True)
class Reference:
    """References of one sequence.

    Attributes:
        texts: Alternative texts, all correct. The first is the main one.
        words: Alternatives for each of the words that `|` separates, or None.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def of(cls, target: str | None, references: Any, where: str) -> Reference | None:
        """Read the fields `target` and `references` of a line of data.

        `references` is a list of texts, or a list of alternatives for each word. Returns None if
        both fields are missing. `where` names the line in errors.
        """
        main = () if target is None else (target,)
        if references is None:
            return cls(main) if main else None
        if _is_texts(references):
            return cls((*main, *(text for text in references if text != target)))
        if isinstance(references, list) and references and all(map(_is_texts, references)):
            words = tuple(map(tuple, references))
            return cls(main or (" | ".join(word[0] for word in words),), words)
        raise OptionError(
            f"{where}: 'references' is {repr(references)[:60]}; give a list of texts, or a list "
            "of texts for each word"
        )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


Statistics = Callable[[str, Reference], Sequence[float]]
Value = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Name of the metric.
        statistics: Returns k numbers for an output and its reference.
        value: Computes the value from the sum [k] over sequences, in [0, 1]. Higher is better.
        single: Computes the value of a single sequence. Default: `value`.
        needs: Index of a statistic that is 0 for all sequences if the metric does not fit, and the
            reason.
        signature: Implementation and its settings.
    """

    name: str
    statistics: Statistics
    value: Value
    single: Value | None = None
    needs: tuple[int, str] | None = None
    signature: str = ""

    @property
    def error(self) -> bool:
        """Return True if tables show 1 - value, for error rates and names that end in `-error`."""
        return self.name in ERROR_RATES or self.name.endswith(ERROR)

    @property
    def shown(self) -> str:
        """Return the name shown in tables."""
        return self.name.upper() if self.name in ERROR_RATES else self.name

    @property
    def label(self) -> str:
        """Return the name of the value, for which higher is better."""
        return f"1 - {self.shown}" if self.name in ERROR_RATES else self.name.removesuffix(ERROR)

    def table(self, outputs: Sequence[str], references: Sequence[Reference]) -> np.ndarray:
        """Compute the statistics of all sequences, float64 [n, k]."""
        rows = [
            self.statistics(text, reference)
            for text, reference in zip(outputs, references, strict=True)
        ]
        found = np.array(rows, np.float64)
        if self.needs is not None and not found[:, self.needs[0]].any():
            raise MetricError(
                f"metric {self.name} does not fit these data: {self.needs[1]}; choose another "
                "--metric"
            )
        return found

    def of(self, table: np.ndarray) -> float:
        """Return the value over all sequences of a table [n, k]."""
        return bounded(self.value(table.sum(axis=0)))


def bounded(value: float) -> float:
    return min(1.0, max(0.0, value))


@lru_cache(maxsize=2)
def draws(count: int, resamples: int) -> np.ndarray:
    """Draw bootstrap resamples: how often each sequence occurs in each, int64 [resamples, count].

    The draws are the same at every call.
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)


def check_name(name: str) -> None:
    """Check the form of a metric's name, without importing its library."""
    module, colon, function = name.partition(":")
    if name.removesuffix(ERROR) in NAMES or (
        colon and function.isidentifier() and all(map(str.isidentifier, module.split(".")))
    ):
        return
    raise OptionError(
        f"{shown(name)} is no metric; choose from {', '.join(NAMES)}, or name a function as "
        "module:function"
    )


def metric_of(name: str) -> Metric:
    """Build a metric by its name, which is in NAMES or of the form `module:function`.

    Raises:
        OptionError: If there is no such metric.
        ImportError: If the library of the metric, in the extra `metrics`, is not installed.
    """
    check_name(name)
    if ":" in name:
        return _imported(name)
    if name.endswith(ERROR):
        return replace(metric_of(name.removesuffix(ERROR)), name=name)
    if name in _ROUGE:
        return _rouge(name)
    means: dict[str, Statistics] = {
        "exact": _exact,
        "squad-em": _best(lambda output, text: _normalized(output) == _normalized(text)),
        "squad-f1": _best(_squad_f1),
    }
    if name in means:
        return Metric(name, means[name], _mean)
    makers = {"bleu": _sacrebleu, "chrf": _sacrebleu, "wer": _word_errors, "per": _pronunciations}
    return {**makers, "word-acc": _pronunciations}.get(name, _restoration)(name)


def scores(name: str, outputs: Sequence[str], references: Sequence[Reference]) -> np.ndarray:
    """Score each sequence on its own: bool [n] for "exact", float64 [n] for the others.

    An identical text scores 1, even if the metric does not fit it. If only one of the two is empty,
    the score is 0.
    """
    metric = metric_of(name)
    value = metric.single or metric.value

    def score(output: str, reference: Reference) -> float:
        if any(output.strip() == text.strip() for text in reference.texts):
            return 1.0
        if not output.strip() or not any(text.strip() for text in reference.texts):
            return 0.0
        return bounded(value(np.array(metric.statistics(output, reference), np.float64)))

    found = list(map(score, outputs, references))
    return np.array(found, np.bool_ if name == "exact" else np.float64)


def _mean(sums: np.ndarray) -> float:
    """Return the mean from statistics (score, 1)."""
    return float(sums[0] / sums[1])


def _less_errors(sums: np.ndarray) -> float:
    """Return 1 - the error rate, from statistics (errors, units of the reference)."""
    return 1 - float(sums[0] / sums[1]) if sums[1] else float(sums[0] == 0)


def _f1(sums: np.ndarray) -> float:
    """Return F1 from statistics (correct, units of the output, units of the reference)."""
    both = float(sums[1] + sums[2])
    return 2 * float(sums[0]) / both if both else 1.0


def _best(score: Callable[[str, str], float]) -> Statistics:
    """Return statistics with the best score among the alternative texts, and 1."""
    return lambda output, reference: (
        max(float(score(output, text)) for text in reference.texts),
        1.0,
    )


def _imported(name: str) -> Metric:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(
            f"--metric {name}: {error}; name a function that Python can import"
        ) from None

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        try:
            score = float(max(function(output, text) for text in reference.texts))
        except Exception as error:
            raise MetricError(
                f"metric {name} failed with {type(error).__name__}: {error}; repair the function"
            ) from error
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise MetricError(f"metric {name} gave {score}; it must return a number from 0 to 1")
        return score, 1

    return Metric(name, statistics, _mean)


# Metrics of texts use the libraries with which published results are computed.

_ROUGE = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL", "rouge-lsum": "rougeLsum"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
    score = _best(lambda output, text: scorer.score(text, output)[kind].fmeasure)
    return Metric(name, score, _mean, signature=f"rouge-score, {kind}, F1, stemmer")


def _sacrebleu(name: str) -> Metric:
    """Build BLEU or chrF on the statistics that `sacrebleu.significance` resamples."""
    from sacrebleu.metrics import BLEU, CHRF

    corpus: Any = BLEU() if name == "bleu" else CHRF()
    # A single sentence may be too short for 4-grams.
    alone: Any = BLEU(effective_order=True) if name == "bleu" else corpus

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        rows = corpus._extract_corpus_statistics([output], [[text] for text in reference.texts])
        row: Sequence[float] = rows[0]
        return row

    def value_by(scorer: Any) -> Value:
        return lambda sums: (
            float(scorer._compute_score_from_stats([int(one) for one in sums]).score) / 100
        )

    statistics("a", Reference(("a",)))  # the signature includes the number of references
    return Metric(
        name, statistics, value_by(corpus), value_by(alone), signature=str(corpus.get_signature())
    )


def _word_errors(name: str) -> Metric:
    import jiwer

    def errors(output: str, text: str) -> tuple[float, float]:
        if not text.split():
            return len(output.split()), 0
        done = jiwer.process_words(text, output)
        return done.substitutions + done.deletions + done.insertions, len(text.split())

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        return min(errors(output, text) for text in reference.texts)

    return Metric(
        name, statistics, _less_errors, needs=(1, "the references have no words"), signature="jiwer"
    )


def _normalized(answer: str) -> list[str]:
    """Split an answer into words as SQuAD does (Rajpurkar et al. 2016).

    Words are in lower case, without punctuation and articles.
    """
    return _ARTICLES.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _squad_f1(output: str, reference: str) -> float:
    ours = _normalized(output)
    theirs = _normalized(reference)
    if not ours or not theirs:
        return ours == theirs
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


# Pronunciations: words separated by `|`, phonemes separated by spaces.


class Errors(NamedTuple):
    """Number of errors against a reference.

    Attributes:
        phoneme_edits: Edit distance between the phonemes of both.
        phonemes: Number of phonemes of the reference.
        wrong_words: Number of words with an error.
        words: Number of words of the reference.
    """

    phoneme_edits: int
    phonemes: int
    wrong_words: int
    words: int


def errors(text: str, references: Sequence[Sequence[str]]) -> Errors:
    """Count the errors of `text` against the pronunciations of each word.

    A word counts against its nearest pronunciation, as in published rates. If the number of words
    differs, phonemes count against the first pronunciations, and whole words are aligned.
    """
    from rapidfuzz.distance import Levenshtein

    words = [word.split() for word in text.split("|")]
    if len(words) == len(references):
        nearest = [
            min((Levenshtein.distance(word, other.split()), len(other.split())) for other in known)
            for word, known in zip(words, references, strict=True)
        ]
        edits, phonemes = (sum(column) for column in zip(*nearest, strict=True))
        return Errors(edits, phonemes, sum(edit > 0 for edit, _ in nearest), len(words))
    first = [tuple(known[0].split()) for known in references]
    found = [tuple(word) for word in words]
    flat = [phoneme for word in first for phoneme in word]
    edits = Levenshtein.distance([phoneme for word in found for phoneme in word], flat)
    return Errors(edits, len(flat), min(len(first), Levenshtein.distance(found, first)), len(first))


def _pronunciations(name: str) -> Metric:
    """Build per or word-acc: 1 - the rate of wrong phonemes, or of wrong words."""

    def statistics(text: str, reference: Reference) -> Sequence[float]:
        if reference.words is not None:
            found = errors(text, reference.words)
        else:
            each = (
                errors(text, [[word] for word in known.split("|")]) for known in reference.texts
            )
            found = min(each, key=lambda one: (one.phoneme_edits, one.wrong_words))
        return found[:2] if name == "per" else found[2:]

    return Metric(name, statistics, _less_errors, needs=(1, "the references have no phonemes"))


# Restoration: capital letters and punctuation that an output restores. The words of both texts are
# aligned ignoring case and punctuation. Items at words that are not aligned are wrong or missing.

# A word, with the marks inside it, or a single mark.
_PIECE = re.compile(r"\w+(?:['’+#/.-]+\w+)*|[^\w\s]")
_NEEDS = {
    "case-f1": "the references have no capital letters",
    "punct-f1": "the references have no punctuation",
}


def _restoration(name: str) -> Metric:
    """Build case-f1 or punct-f1, F1 over all sequences.

    case-f1 counts words that contain capitals, each with its exact spelling. punct-f1 counts marks,
    each with its kind and the word before it.
    """
    from rapidfuzz.distance import Levenshtein

    def pieces(text: str) -> tuple[list[str], list[tuple[int, str]]]:
        """Split a text into words in lower case, and the scored items.

        Each item has the index of its word, or -1 before the first word.
        """
        words: list[str] = []
        items: list[tuple[int, str]] = []
        for piece in _PIECE.findall(text):
            is_word = piece[0].isalnum() or piece[0] == "_"
            if is_word:
                words.append(piece.lower())
            if (is_word and piece != piece.lower()) if name == "case-f1" else not is_word:
                items.append((len(words) - 1, piece))
        return words, items

    def counts(output: str, text: str) -> tuple[float, float, float]:
        """Count the correct items, those of the output and those of the reference."""
        words, items = pieces(output)
        true_words, true_items = pieces(text)
        # Index in the reference of each aligned word. Both texts have a start, -1.
        place = {-1: -1}
        for block in Levenshtein.opcodes(words, true_words).as_matching_blocks():
            place.update({block.a + step: block.b + step for step in range(block.size)})
        ours = Counter((place.get(number, f"other {number}"), item) for number, item in items)
        theirs: Counter[tuple[int | str, str]] = Counter(true_items)
        return (ours & theirs).total(), ours.total(), theirs.total()

    def statistics(output: str, reference: Reference) -> Sequence[float]:
        return max((counts(output, text) for text in reference.texts), key=lambda found: found[0])

    return Metric(name, statistics, _f1, needs=(2, _NEEDS[name]))
