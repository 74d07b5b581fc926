"""Metrics of outputs, by hand and by the libraries that published figures use."""

from __future__ import annotations

import numpy as np
import pytest

from freeexport.task_metrics import NAMES, Errors, MetricError, Reference, check_name, errors, metric_of, scores
from runtime.errors import OptionError


def texts(*given: str) -> list[Reference]:
    return [Reference((text,)) for text in given]


def corpus(name: str, outputs: list[str], references: list[Reference]) -> float:
    metric = metric_of(name)
    return metric.of(metric.table(outputs, references))


@pytest.mark.parametrize("metric", NAMES)
def test_equal_texts_score_1_and_different_texts_near_0(metric: str) -> None:
    values = scores(metric, ["B, c d e.", "q r s t", "", "x"], texts("B, c d e.", "E f, g h", "X.", ""))
    assert values[0] == 1
    assert (values[1:] <= 0.05).all()
    assert (values.dtype == np.bool_) == (metric == "exact")


@pytest.mark.parametrize(
    ("metric", "output", "reference", "score"),
    [
        ("wer", "one two four", "one two three", 2 / 3),
        ("wer", "one two three four five six seven", "one", 0),  # more errors than words are no less than none right
        ("per", "K AE T | D AO", "K AE T | D AO G", 5 / 6),
        ("word-acc", "K AE T | D AO", "K AE T | D AO G", 1 / 2),
        ("rouge-1", "d c b x", "b c d e", 0.75),
        ("rouge-2", "b c d x", "b c d e", 2 / 3),
        ("rouge-l", "b c d e", "b x d e", 0.75),
        ("rouge-l", "she was running", "she was runs", 1),  # the same stem
        ("rouge-lsum", "b c\nd e", "d e\nb c", 1),  # lines in any order
        ("exact", " same\n", "same", 1),
        ("squad-em", "The Eiffel Tower!", "eiffel tower", 1),
        ("squad-f1", "the tall tower", "eiffel tower", 0.5),
        ("case-f1", "Debian has gnu tools", "Debian has GNU tools", 2 / 3),
        ("case-f1", "so Debian Has GNU tools", "Debian has GNU tools", 0.8),  # a word more moves no other
        ("punct-f1", "first second, third", "First, second, third.", 0.5),
        ("punct-f1", "first, second; third", "First, second, third.", 0.4),
        ("punct-f1", "it's a state-of-the-art test.", "It's a state-of-the-art test.", 1),
    ],
)
def test_scores_match_hand_computed_values(metric: str, output: str, reference: str, score: float) -> None:
    assert scores(metric, [output], texts(reference))[0] == pytest.approx(score)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_closer_texts_score_higher(metric: str) -> None:
    reference = "the quick brown fox jumps over the dog"
    near, far = scores(metric, ["the quick brown fox jumps over a dog", "the slow fox sat"], texts(reference) * 2)
    assert 0 < far < near < 1


def test_corpus_bleu_and_chrf_match_the_library() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    outputs = ["the quick brown fox jumps over a dog", "a cat sat on the mat", "no"]
    references = ["the quick brown fox jumps over the dog", "the cat sat on the mat today", "yes"]
    for name, library in (("bleu", corpus_bleu), ("chrf", corpus_chrf)):
        assert corpus(name, outputs, texts(*references)) == pytest.approx(library(outputs, [references]).score / 100)
    assert "nrefs:1" in metric_of("bleu").signature
    assert "tok:13a" in metric_of("bleu").signature


def test_nearest_of_several_references_counts() -> None:
    several = [Reference(("paris", "the city of light"))]
    for name in ("exact", "squad-em", "squad-f1", "rouge-l", "wer", "chrf"):
        assert scores(name, ["the city of light"], several)[0] == 1
        assert corpus(name, ["the city of light"], several) == 1


def half(output: str, reference: str) -> float:
    return 0.5 if output else float("nan")


def test_metric_can_be_a_function_given_by_name() -> None:
    name = f"{__name__}:half"
    assert corpus(name, ["x", "y"], texts("y", "y")) == 0.5
    with pytest.raises(MetricError, match="gave nan; it must return a number from 0 to 1"):
        corpus(name, [""], texts("y"))


@pytest.mark.parametrize("name", ["rouge", "no_such_module:function", "json:no_such_function", "a b:c", ":x", "x:"])
def test_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(OptionError, match=r"is no metric|can import"):
        metric_of(name)


@pytest.mark.parametrize(
    ("name", "why"), [("case-f1", "no capital letters"), ("punct-f1", "no punctuation"), ("per", "no phonemes")]
)
def test_metric_that_does_not_fit_the_references_is_refused(name: str, why: str) -> None:
    check_name(name)
    with pytest.raises(MetricError, match=why):
        metric_of(name).table(["Some text."], texts("" if name == "per" else "lower case"))


@pytest.mark.parametrize("given", [3, [], [3], [["a"], []], [["a"], "b"], "text"])
def test_references_that_are_neither_texts_nor_lists_are_refused(given: object) -> None:
    with pytest.raises(OptionError, match="line 7: 'references'"):
        Reference.of("target", given, "line 7")


def test_references_are_alternatives_of_a_line_or_of_its_words() -> None:
    assert Reference.of("a", ["b", "a"], "") == Reference(("a", "b"))
    assert Reference.of(None, [["a", "b"], ["c"]], "") == Reference(("a | c",), (("a", "b"), ("c",)))
    assert Reference.of(None, None, "") is None


def test_line_is_exact_if_every_word_is_one_of_its_alternatives() -> None:
    words = [Reference.of("A | C", [["A", "B B"], ["C"]], "")] * 3
    assert scores("exact", ["B B | C", "A|C", "C | A"], [one for one in words if one]).tolist() == [True, True, False]


TOMATO = ["T AH M EY T OW", "T AH M AA T OW"]
HI = ["HH AY"]


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("HH AY", [HI], Errors(0, 2, 0, 1)),
        ("HH EY", [HI], Errors(1, 2, 1, 1)),
        ("", [HI], Errors(2, 2, 1, 1)),
        ("T AH M AA T OW", [TOMATO], Errors(0, 6, 0, 1)),
        ("T AH M AA T", [TOMATO], Errors(1, 6, 1, 1)),
        ("HH AY | T AH M AA T OW", [HI, TOMATO], Errors(0, 8, 0, 2)),
        # Words in the wrong places are wrong, though all phonemes are there.
        ("T AH M EY T OW | HH AY", [HI, TOMATO], Errors(12, 8, 2, 2)),
        # A word left out: its phonemes are missing, and the others still count.
        ("T AH M EY T OW", [HI, TOMATO], Errors(2, 8, 1, 2)),
        ("HH AY | HH AY | T AH M EY T OW", [HI, TOMATO], Errors(2, 8, 1, 2)),
    ],
)
def test_error_counts_match_hand_computed_values(text: str, references: list[list[str]], expected: Errors) -> None:
    assert errors(text, references) == expected


def test_rates_are_over_all_phonemes_and_all_words() -> None:
    outputs = ["HH EY", "T AH M EY T OW"]
    references = [Reference(("HH AY",), (tuple(HI),)), Reference(("T AH M AA T OW", "T AH M EY T OW"))]
    assert metric_of("per").of(metric_of("per").table(outputs, references)) == pytest.approx(7 / 8)
    assert metric_of("word-acc").of(metric_of("word-acc").table(outputs, references)) == 1 / 2
    assert corpus("wer", ["one two", "x"], texts("one two three four", "one")) == pytest.approx(1 - 3 / 5)
