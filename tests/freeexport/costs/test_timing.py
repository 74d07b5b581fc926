"""The one loop that times: whose turn it is, what is not repeated, and how busy others were."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from freeexport.costs.timing import interleave, speeds_by_round


def test_settings_alternate_in_varying_order() -> None:
    order: list[tuple[str, int]] = []

    def decode(setting: str, prompt: int) -> str:
        order.append((setting, prompt))
        return f"{setting}{prompt}"

    turns = list(interleave("abc", [1, 2], 3, decode))
    assert [(turn.round, turn.prompt, turn.runs) for turn in turns] == [
        (turn, place, [f"{name}{prompt}" for name in "abc"]) for turn in range(3) for place, prompt in enumerate((1, 2))
    ]
    assert order[:3] == [("a", 1), ("b", 1), ("c", 1)]  # warms up
    timed = [name for name, _ in order[3:]]
    blocks = ["".join(timed[start : start + 3]) for start in range(0, len(timed), 3)]
    assert all(sorted(block) == list("abc") for block in blocks)
    assert len(set(blocks[::2])) > 1
    assert blocks[1::2] == [block[::-1] for block in blocks[::2]]  # so each is as often before another as after it
    before = {name: {first for first, second in pairwise(timed) if second == name} for name in "abc"}
    assert all(len(firsts) > 1 for firsts in before.values())


def test_finished_turns_are_not_repeated() -> None:
    calls: list[tuple[str, int]] = []

    def decode(setting: str, prompt: int) -> None:
        calls.append((setting, prompt))

    left = list(interleave("ab", [5, 6], 2, decode, done=lambda turn, prompt: turn == 0, warm_up=0))
    assert [(turn.round, turn.prompt) for turn in left] == [(1, 0), (1, 1)]
    assert sorted(calls[:2]) == [("a", 5), ("b", 5)]
    assert sorted(calls[2:]) == [("a", 6), ("b", 6)]
    calls.clear()
    assert not list(interleave("ab", [5], 1, decode, done=lambda turn, prompt: True))
    assert not calls  # nothing to measure, nothing to warm up


def test_setting_without_tokens_has_no_speed() -> None:
    assert np.isnan(speeds_by_round([0], [1], 1, lambda setting, prompt: (0, 0.0))[0, 0])
