from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from freeexport.calibration.metrics import Metric, scores


@pytest.mark.parametrize("metric", get_args(Metric))
def test_equal_texts_score_1_and_unlike_ones_near_0(metric: Metric) -> None:
    values = scores(metric, ["a b c d", "q r s t", "", "x"], ["a b c d", "e f g h", "x", ""])
    assert values[0] == 1
    assert (values[1:] <= 0.05).all()
    assert (values.dtype == np.bool_) == (metric == "exact")


@pytest.mark.parametrize(
    ("metric", "output", "reference", "score"),
    [
        ("wer", "one two four", "one two three", 2 / 3),
        ("wer", "one two three four five six seven", "one", 0),  # more errors than words are no less than none right
        ("per", "K AE T | D AO", "K AE T | D AO G", 5 / 6),
        ("rouge-l", "a b c d", "a x c d", 0.75),
        ("exact", " same\n", "same", 1),
    ],
)
def test_scores_are_those_worked_out_by_hand(metric: Metric, output: str, reference: str, score: float) -> None:
    assert scores(metric, [output], [reference])[0] == pytest.approx(score)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_closer_texts_score_higher(metric: Metric) -> None:
    reference = "the quick brown fox jumps over the dog"
    near, far = scores(metric, ["the quick brown fox jumps over a dog", "the slow fox sat"], [reference] * 2)
    assert 0 < far < near < 1
