"""Answers of a decoder with and without drafts, and how often they differ."""

from __future__ import annotations

from tools.peers.equality import differences, row_of


def test_answers_and_tokens_that_differ_are_counted_with_their_first_places() -> None:
    found = differences([(1, 2, 3), (4, 5, 6), (7, 8, 9)], [(1, 2, 3), (4, 0, 0), (0, 8, 9)])
    assert found == {
        "answers": 3,
        "differing_answers": 2,
        "tokens": 9,
        "differing_tokens": 3,
        "first_differences": [1, 0],
    }


def test_a_decoder_that_differs_from_itself_is_told_from_one_whose_drafts_do() -> None:
    turns = iter([[(1, 2)], [(1, 3)]])
    row = row_of("peer", "int8", lambda: next(turns), lambda: [(1, 2)])
    assert (row["greedy_again"]["differing_answers"], row["with_drafts"]["differing_answers"]) == (1, 0)
