"""Errors of predicted pronunciations, counted by hand."""

from __future__ import annotations

import pytest

from freeexport.metrics.metric import metric_of
from freeexport.metrics.phonemes import Errors, errors
from freeexport.metrics.reference import Reference

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
def test_errors_are_those_counted_by_hand(text: str, references: list[list[str]], expected: Errors) -> None:
    assert errors(text, references) == expected


def test_rates_are_those_of_all_phonemes_and_all_words() -> None:
    outputs = ["HH EY", "T AH M EY T OW"]
    references = [Reference(("HH AY",), (tuple(HI),)), Reference(("T AH M AA T OW", "T AH M EY T OW"))]
    assert metric_of("per").of(metric_of("per").table(outputs, references)) == pytest.approx(7 / 8)
    assert metric_of("word-acc").of(metric_of("word-acc").table(outputs, references)) == 1 / 2
