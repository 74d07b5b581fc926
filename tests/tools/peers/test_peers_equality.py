"""Outputs of a decoder with and without drafts, and how often they differ."""

from __future__ import annotations

from tools.peers.equality import differences


def test_outputs_and_tokens_that_differ_are_counted_with_their_first_places() -> None:
    found = differences([(1, 2, 3), (4, 5, 6), (7, 8, 9)], [(1, 2, 3), (4, 0, 0), (0, 8, 9)])
    assert found == {
        "outputs": 3,
        "differing_outputs": 2,
        "tokens": 9,
        "differing_tokens": 3,
        "first_differences": [1, 0],
    }
