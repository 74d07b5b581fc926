"""The one loop that times: whose turn it is, what is not repeated, and how busy others were."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest

from freeexport.measure.timing import interleave, load_note, other_load, speeds


def test_settings_take_turns_and_none_always_follows_the_same_other() -> None:
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
    assert blocks[1::2] == [block[::-1] for block in blocks[::2]]  # so each is as often before another as behind it
    before = {name: {first for first, second in pairwise(timed) if second == name} for name in "abc"}
    assert all(len(firsts) > 1 for firsts in before.values())


def test_turns_that_are_done_are_not_repeated() -> None:
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


def test_a_setting_without_tokens_has_no_speed() -> None:
    assert np.isnan(speeds([0], [1], 1, lambda setting, prompt: (0, 0.0))[0, 0])


@pytest.mark.parametrize(("cores", "noted"), [(0.0, False), (0.1, False), (1.2, True)])
def test_a_busy_machine_is_noted(cores: float, noted: bool) -> None:
    assert ("kept 1.2 cores busy" in load_note(cores)) == noted


def test_own_work_and_that_of_children_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from freeexport.measure import timing

    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    others = iter([100.0, 101.5])
    monkeypatch.setattr(timing, "_SHORTEST", 0.0)
    monkeypatch.setattr(timing, "_busy_seconds", lambda: next(others))
    with other_load() as load:
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", spin], check=True)
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        elapsed = time.monotonic() - began
    # Of 1.5 busy seconds, at least 0.5 were this process's and its child's.
    assert 0 < load.cores <= 1.02 / elapsed
