"""Tables of phrases: what they count, how they are searched, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.phrases import ENTRY, MAX_ENTRIES, PhraseTable, _ngrams, misfit
from runtime.decoding.text_index import LEVELS, LONGEST, ORDERS

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=6)


def followers(texts: list[list[int]], ngram: list[int]) -> Counter[int]:
    """Count what followed an n-gram, by reading the texts."""
    size = len(ngram)
    places = ((text, place) for text in texts for place in range(size, len(text)))
    return Counter(text[place] for text, place in places if text[place - size : place] == ngram)


@given(TEXTS, st.lists(st.integers(0, 4), max_size=6))
def test_table_predicts_the_most_frequent_token_after_the_longest_known_phrase(
    texts: list[list[int]], newest: list[int]
) -> None:
    found = PhraseTable.build(texts).expected(newest)
    for number, order in reversed([*enumerate(ORDERS)]):
        counts = followers(texts, newest[-order:]) if order <= len(newest) else Counter[int]()
        if counts:
            assert found is not None
            most = max(counts.values())
            assert counts[found.token] == most
            assert found.level == number * LEVELS + LEVELS * most // (counts.total() + 1)
            return
    assert found is None


def test_table_keeps_the_most_often_correct_phrases() -> None:
    texts = [[1, 2]] * 5 + [[3, 4]] * 3 + [[5, 6]]
    table = PhraseTable.build(texts, max_entries=2)
    assert [table.expected([token]) is not None for token in (1, 3, 5)] == [True, True, False]
    assert misfit(table.entries, 7) is None


@given(TEXTS, st.integers(1, 8))
def test_phrases_that_gain_least_over_shorter_ones_are_dropped_first(texts: list[list[int]], most: int) -> None:
    """A phrase gains the tokens that it gets right and the next shorter phrase does not."""
    whole = PhraseTable.build(texts)
    kept = PhraseTable.build(texts, most)
    gains = {}
    for ngram in {tuple(text[at - size : at]) for text in texts for size in ORDERS for at in range(size, len(text))}:
        counts = followers(texts, [*ngram])
        shorter = [size for size in ORDERS if size < len(ngram)]
        found = whole.expected(ngram)
        other = whole.expected(ngram[-shorter[-1] :]) if shorter else None
        assert found is not None
        tokens = np.array(ngram, np.uint64)
        (hashed,) = _ngrams(tokens, np.array([len(ngram)]), len(ngram)).tolist()
        gains[hashed] = counts[found.token] - (0 if other is None else counts[other.token])
    chosen = sorted((gains[ngram] for ngram in kept.entries["ngram"].tolist()), reverse=True)
    assert chosen == sorted(gains.values(), reverse=True)[:most]


@pytest.mark.parametrize("vocab", [500, 1 << 18])
def test_long_text_is_predicted_from_its_own_table(vocab: int) -> None:
    text = np.random.default_rng(0).integers(0, vocab, 5000).tolist()
    table = PhraseTable.build([text])
    found = [table.expected(text[place - LONGEST : place]) for place in range(LONGEST, len(text))]
    assert [one.token for one in found if one is not None] == text[LONGEST:]


def table_of(*entries: tuple[int, int, int]) -> np.ndarray:
    return np.array([*entries], ENTRY)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (np.zeros(3), "is no table of phrases"),
        (table_of((1, 2, 3)).reshape(1, 1), "is no table of phrases"),
        (np.zeros(MAX_ENTRIES + 1, ENTRY), "at most 4,000,000 are read"),
        (table_of((1, 10, 3)), "has token 10, outside of 0 to 9"),
        (table_of((1, 2, 24)), "has level 24, outside of 0 to 23"),
        (table_of((2, 2, 3), (1, 2, 3)), "its phrases are not in order"),
        (table_of((2, 2, 3), (2, 2, 3)), "its phrases are not in order"),
    ],
)
def test_array_that_is_not_a_table_is_refused_with_the_reason(entries: np.ndarray, reason: str) -> None:
    assert reason in str(misfit(entries, 10))


def test_empty_table_predicts_nothing() -> None:
    assert PhraseTable.build([]).expected([1, 2]) is None
    assert misfit(table_of(), 10) is None
    assert PhraseTable.build([[1], []]).expected([1]) is None
