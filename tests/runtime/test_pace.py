"""The length of drafts: simulated acceptance and costs in, speed against mode full out."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from runtime.draft_costs import MEMORY, DraftCosts
from runtime.pace import Pace, Verdict

MANY = 16


def speedup(pace: Pace, length: int) -> float:
    return list(pace.speedups(length))[-1]


class Machine:
    """Costs in seconds and chances: what a session would see. `deep(k)` = `first` + (k - 1) `further`."""

    def __init__(
        self,
        sure: float,
        kept: float,
        bare: float = 3.0,
        head: float = 1.0,
        first: float = 10.0,
        further: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.sure, self.kept = sure, kept
        self.bare, self.head, self.first, self.further = bare, head, first, further
        self.noise, self.chance = noise, random.Random(seed)
        self.lengths: Counter[int] = Counter()

    def run(self, pace: Pace, tokens: int) -> float:
        """Decode; returns the speed as a multiple of mode full on the same machine."""
        seconds, done = 0.0, 0
        while done < tokens:
            most, probe = pace.plan(MANY - 1)
            self.lengths[most] += 1
            drafts = 0
            while drafts < most and self.chance.random() < self.sure:
                drafts += 1
            asked = drafts + (drafts < most or probe)
            rows = drafts + 1
            shallow = self._noisy(rows * self.bare + asked * self.head)
            deep = self._noisy(self.first + (rows - 1) * self.further)
            kept = 0
            while kept < drafts and self.chance.random() < self.kept:
                kept += 1
            seconds += shallow + deep
            done += kept + 1
            if not asked:
                pace.observe_plain(shallow, deep)
                continue
            pace.observe_costs(asked, rows, shallow, deep, kept + 1)
            verdicts = [Verdict(True, row < kept) for row in range(min(drafts, kept + 1))]
            if kept == drafts and drafts < most:
                verdicts.append(Verdict(False, False))
            elif kept == drafts and probe:
                sure = self.chance.random() < self.sure
                verdicts.append(Verdict(sure, sure and self.chance.random() < self.kept))
            pace.observe_drafts(verdicts)
        return done * (self.bare + self.first) / seconds

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self.noise * self.chance.random())


@given(
    sure=st.floats(0, 1),
    kept=st.floats(0, 1),
    head=st.floats(0.1, 5),
    bare=st.floats(1, 10),
    further=st.floats(0, 10),
    seed=st.integers(0, 1000),
)
@example(sure=1.0, kept=0.75, head=1.0, bare=1.0, further=6.0, seed=0)  # a dear head, drafts that just do not pay
@hypothesis_settings(max_examples=40, deadline=None)
def test_drafting_never_costs_more_than_two_percent(
    sure: float, kept: float, head: float, bare: float, further: float, seed: int
) -> None:
    machine = Machine(sure, kept, bare, head, further=further, seed=seed)
    pace = Pace(MANY, {})
    machine.run(pace, 200)  # what a session learns once
    assert machine.run(pace, 2000) > 0.98


@pytest.mark.parametrize(("kept", "least"), [(0.8, 1.2), (0.9, 1.4), (1.0, 1.7)])
def test_good_drafts_pay(kept: float, least: float) -> None:
    machine = Machine(0.9, kept, bare=3, head=1, first=8, further=0.5)
    pace = Pace(MANY, {})
    machine.run(pace, 200)
    assert machine.run(pace, 3000) > least


def test_hiccups_do_not_change_the_mind() -> None:
    calm, noisy = Machine(0.9, 0.9), Machine(0.9, 0.9, noise=0.3)
    # The noise makes everything 15 % slower on average.
    assert noisy.run(Pace(MANY, {}), 2000) > 0.95 / 1.15 * calm.run(Pace(MANY, {}), 2000)
    pace = Pace(MANY, {})
    calm.run(pace, 500)
    pace.observe_costs(0, 1, 1e3, 1e3, 1)
    assert calm.run(pace, 300) > 1.2


def test_a_change_of_acceptance_is_noticed_in_both_directions() -> None:
    pace = Pace(MANY, {})
    assert Machine(0.9, 0.95).run(pace, 1000) > 1.3
    assert Machine(0.9, 0.02).run(pace, 3000) > 0.96
    assert Machine(0.9, 0.95).run(pace, 20_000) > 1.2


def test_the_length_is_the_best_of_all_lengths() -> None:
    machine, pace = Machine(0.9, 0.8), Pace(MANY, {})
    machine.run(pace, 3000)
    machine.lengths.clear()
    adapted = machine.run(pace, 5000)
    fixed = []
    for length in range(MANY):
        other, same = Machine(0.9, 0.8, seed=1), Pace(MANY, {})
        same.plan = lambda most, length=length: (length, False)  # type: ignore[method-assign,misc]
        fixed.append(other.run(same, 5000))
    assert adapted > 0.97 * max(fixed)


def test_a_length_never_exceeds_what_is_asked() -> None:
    machine, pace = Machine(1.0, 1.0), Pace(MANY, {})
    machine.run(pace, 500)
    assert pace.plan(MANY - 1)[0] > 3
    assert pace.plan(2)[0] == 2
    assert pace.plan(0) == (0, False)


def test_the_first_rows_are_asked_and_nothing_is_drafted_before_anything_is_known() -> None:
    pace = Pace(MANY, {})
    for _ in range(8):
        assert pace.plan(MANY - 1) == (0, True)
        pace.observe_costs(1, 1, 4.0, 10.0, 1)
        pace.observe_drafts([Verdict(False, False)])
        if pace.plan(MANY - 1) == (0, False):
            pace.observe_plain(3.0, 10.0)
    plans = [pace.plan(MANY - 1) for _ in range(100)]
    assert {length for length, _ in plans} == {0}
    assert sum(probe for _, probe in plans) < 10


def test_a_head_that_costs_nothing_is_asked_rarely_too() -> None:
    """Asking takes time outside the engines."""
    machine, pace = Machine(0.0, 0.0, head=0.0), Pace(MANY, {})
    machine.run(pace, 200)
    assert sum(pace.plan(MANY - 1)[1] for _ in range(320)) <= 20


def test_recorded_costs_give_the_shape_and_measured_ones_the_size() -> None:
    recorded = {"shallow_ms": 4.0, "shallow_without_head_ms": 3.0, "deep_1_ms": 10.0, "deep_4_ms": 16.0}
    pace = Pace(8, recorded)
    for _ in range(50):
        pace.observe_costs(1, 1, 8e-3, 20e-3, 1)
        pace.observe_costs(0, 1, 6e-3, 20e-3, 1)
    # Twice the recorded costs: drafts of up to three look as they would there.
    for length in range(4):
        assert speedup(pace, length) == pytest.approx(speedup(Pace(8, recorded), length), rel=1e-3)


def test_the_predicted_speedup_is_the_simulated_one() -> None:
    for length in (0, 1, 3, 7):
        machine, pace = Machine(0.8, 0.7, seed=length), Pace(MANY, {})
        pace.plan = lambda most, length=length: (length, False)  # type: ignore[method-assign,misc]
        measured = machine.run(pace, 20_000)
        known = Pace(MANY, {"shallow_ms": 4, "shallow_without_head_ms": 3, "deep_1_ms": 10, "deep_16_ms": 25})
        known._sure.value, known._kept.value = 0.8, 0.7
        assert speedup(known, length) == pytest.approx(measured, rel=0.02)


def test_calls_that_others_share_have_costs_of_their_own() -> None:
    """Alone drafts pay; in calls of eight sequences a deep row costs as much as another pass, and they do not."""
    alone, crowded = Machine(0.9, 0.9), Machine(0.9, 0.9, first=10, further=10)
    pace = Pace(MANY, {})
    assert alone.run(pace, 500) > 1.3
    assert crowded.run(pace.among(8), 3000) > 0.98
    assert pace.among(8) is pace.among(5)
    assert pace.among(8) is not pace.among(4)
    assert pace.among(1) is pace
    assert alone.run(pace, 500) > 1.3


def test_a_cost_not_seen_for_long_is_forgotten() -> None:
    """It may have been measured while others kept the machine busy."""
    costs = DraftCosts(8, {"shallow_without_head_ms": 1.0, "deep_1_ms": 10.0, "deep_8_ms": 17.0})
    for _ in range(20):
        costs.observe(0, 1, 1.0, 10.0)
    costs.observe(4, 4, 5.0, 100.0)
    costs.observe(0, 1, 1.0, 10.0)
    assert costs[4] == 26.0  # what passes for a hiccup counts no more than twice
    for _ in range(MEMORY):
        costs.observe(0, 1, 1.0, 10.0)
    assert costs[4] == pytest.approx(13.0)


def test_what_drafts_have_lost_keeps_them_away_until_it_is_made_up_for() -> None:
    machine, pace = Machine(1.0, 1.0), Pace(MANY, {})
    machine.run(pace, 1000)
    drafting = pace.plan(MANY - 1)[0]
    assert drafting > 3
    for _ in range(3):
        pace.observe_costs(drafting, drafting + 1, drafting * 4.0 + 3.0, 14.0, 1)
    assert pace.plan(MANY - 1)[0] == 0
    for _ in range(5000):
        pace.observe_plain(3.0, 10.0)
    assert pace.plan(MANY - 1)[0] == drafting
