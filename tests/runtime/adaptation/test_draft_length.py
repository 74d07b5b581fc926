"""The length of drafts: simulated acceptance and costs in, speed against mode full out."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import (
    GRANT,
    GRANT_SHARE,
    MOST_SAVED,
    MOST_THRESHOLDS,
    OVERDRAFT,
    DraftLength,
    DraftLengths,
    DraftOutcome,
)
from runtime.bundle.costs import NEUTRAL, Costs

MANY = 16


def new_pace(base: Costs = NEUTRAL) -> DraftLength:
    return DraftLength(CallCosts(base))


def speedup(pace: DraftLength, length: int) -> float:
    return list(pace.speedups(length))[-1]


class Machine:
    """Costs in seconds and chances: what a session would see. `deep(k)` = `first` + (k - 1) `further`; `outside` the
    engines for each pass."""

    def __init__(
        self,
        sure: float,
        kept: float,
        bare: float = 3.0,
        head: float = 1.0,
        first: float = 10.0,
        further: float = 1.0,
        outside: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.sure, self.kept = sure, kept
        self.bare, self.head, self.first, self.further, self.outside = bare, head, first, further, outside
        self.noise, self.chance = noise, random.Random(seed)
        self.lengths: Counter[int] = Counter()

    @property
    def full(self) -> float:
        """Seconds of a token in mode full."""
        return self.bare + self.first + self.outside

    def run(self, pace: DraftLength, tokens: int) -> float:
        """Decode; returns the speed as a multiple of mode full on the same machine."""
        done = seconds = 0.0
        while done < tokens:
            more, spent = self.one_pass(pace, MANY)
            done, seconds = done + more, seconds + spent
        return done * self.full / seconds

    def request(self, pace: DraftLength, tokens: int) -> float:
        """Seconds of a request of so many tokens after the first; no draft goes beyond its end."""
        left, seconds = tokens, 0.0
        while left:
            more, spent = self.one_pass(pace, left)
            left, seconds = left - more, seconds + spent
        return seconds

    def one_pass(self, pace: DraftLength, left: int) -> tuple[int, float]:
        """The tokens that it made final, of at most `left`, and its seconds."""
        most, probe = pace.plan(MANY - 1)
        self.lengths[most] += 1
        drafts = 0
        while drafts < min(most, left) and self.chance.random() < self.sure:
            drafts += 1
        ends = drafts == left
        rows = drafts + (not ends)
        asked = rows if drafts < most else drafts + probe
        shallow = self._noisy(rows * self.bare + asked * self.head)
        deep = self._noisy(self.first + (rows - 1) * self.further)
        kept = 0
        while kept < drafts and self.chance.random() < self.kept:
            kept += 1
        tokens = min(kept + 1, left)
        if asked:
            pace.observe_costs(asked, rows, shallow, deep, tokens)
            pace.observe_drafts(self._verdicts(drafts, kept, not ends and drafts < most, probe))
        else:
            pace.observe_plain(shallow, deep)
        return tokens, shallow + deep + self.outside

    def _verdicts(self, drafts: int, kept: int, stopped: bool, probe: bool) -> list[DraftOutcome]:
        verdicts = [DraftOutcome(True, row < kept) for row in range(min(drafts, kept + 1))]
        if kept == drafts and probe:
            sure = self.chance.random() < self.sure
            verdicts.append(DraftOutcome(sure, sure and self.chance.random() < self.kept))
        elif kept == drafts and stopped:
            verdicts.append(DraftOutcome(False, False))
        return verdicts

    def _noisy(self, seconds: float) -> float:
        return seconds * (1 + self.noise * self.chance.random())


# Milliseconds, measured: SmolLM2-135M in fp32 with its exit after layer 10 of 30, and in int8; the model of the demo.
MACHINES = {
    "smollm2-fp32": {"bare": 4.6, "head": 4.9, "first": 12.0, "further": 0.45, "outside": 0.2},
    "smollm2-int8": {"bare": 2.4, "head": 1.0, "first": 6.0, "further": 0.55, "outside": 0.2},
    "demo": {"bare": 0.098, "head": 0.005, "first": 0.31, "further": 0.04, "outside": 0.03},
}


def short_requests(name: str, sure: float, kept: float, sessions: int = 40, requests: int = 8) -> tuple[float, float]:
    """Speed of the first requests of sessions, and of those that follow, of 32 tokens each."""
    first = later = full = 0.0
    for seed in range(sessions):
        machine, pace = Machine(sure, kept, noise=0.1, seed=seed, **MACHINES[name]), new_pace()
        slower = 1 + machine.noise / 2
        spent = [machine.request(pace, 31) for _ in range(requests)]
        full += 31 * (slower * (machine.full - machine.outside) + machine.outside)
        first, later = first + spent[0], later + sum(spent[1:]) / (requests - 1)
    return full / first, full / later


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(("sure", "kept"), [(1, 0), (1, 0.3), (1, 0.5), (1, 0.6), (1, 0.7), (0.6, 0.8), (0.3, 0)])
def test_short_requests_are_never_slower_than_0_98_of_full(name: str, sure: float, kept: float) -> None:
    first, later = short_requests(name, sure, kept)
    assert first > 0.98
    assert later > 0.985


@pytest.mark.parametrize(
    ("name", "kept", "least"), [("smollm2-fp32", 0.95, 1.15), ("smollm2-int8", 0.9, 1.25), ("demo", 0.8, 1.3)]
)
def test_good_drafts_pay_in_short_requests_too(name: str, kept: float, least: float) -> None:
    first, later = short_requests(name, 1.0, kept)
    assert first > 0.99
    assert later > least


@given(
    sure=st.floats(0, 1),
    kept=st.floats(0, 1),
    head=st.floats(0.1, 5),
    bare=st.floats(1, 10),
    further=st.floats(0, 10),
    change=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_session_never_loses_more_than_is_granted_and_one_draft(
    sure: float, kept: float, head: float, bare: float, further: float, change: float, seed: int
) -> None:
    """At no moment, whatever was won before and wherever the share of right drafts changes."""
    machine = Machine(sure, kept, bare, head, further=further, seed=seed)
    pace = new_pace(Costs(bare + head, bare, {1: 10.0, 2: 10 + further}))
    one_draft = (2 * bare + head + 10 + further) / machine.full - 1
    done = seconds = 0.0
    for turn in range(600):
        if turn == 300:
            machine.kept = change
        more, spent = machine.one_pass(pace, MANY)
        done, seconds = done + more, seconds + spent
        lost = seconds / machine.full - done
        assert lost < GRANT + GRANT_SHARE * done + max(OVERDRAFT, one_draft) + 1e-6


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
    pace = new_pace()
    machine.run(pace, 200)  # what a session learns once
    assert machine.run(pace, 2000) > 0.98


@pytest.mark.parametrize(("kept", "least"), [(0.8, 1.2), (0.9, 1.4), (1.0, 1.7)])
def test_good_drafts_pay(kept: float, least: float) -> None:
    machine = Machine(0.9, kept, bare=3, head=1, first=8, further=0.5)
    pace = new_pace()
    machine.run(pace, 200)
    assert machine.run(pace, 3000) > least


def test_hiccups_do_not_change_the_mind() -> None:
    calm, noisy = Machine(0.9, 0.9), Machine(0.9, 0.9, noise=0.3)
    # The noise makes everything 15 % slower on average.
    assert noisy.run(new_pace(), 2000) > 0.95 / 1.15 * calm.run(new_pace(), 2000)
    pace = new_pace()
    calm.run(pace, 500)
    pace.observe_costs(0, 1, 1e3, 1e3, 1)
    assert calm.run(pace, 300) > 1.2


def test_a_change_of_acceptance_is_noticed_in_both_directions() -> None:
    pace = new_pace()
    assert Machine(0.9, 0.95).run(pace, 1000) > 1.3
    assert Machine(0.9, 0.02).run(pace, 3000) > 0.96
    assert Machine(0.9, 0.95).run(pace, 20_000) > 1.2


def test_the_length_is_the_best_of_all_lengths() -> None:
    machine, pace = Machine(0.9, 0.8), new_pace()
    machine.run(pace, 3000)
    machine.lengths.clear()
    adapted = machine.run(pace, 5000)
    fixed = []
    for length in range(MANY):
        other, same = Machine(0.9, 0.8, seed=1), new_pace()
        same.plan = lambda most, length=length: (length, False)  # type: ignore[method-assign,misc]
        fixed.append(other.run(same, 5000))
    assert adapted > 0.97 * max(fixed)


def test_a_length_never_exceeds_what_is_asked() -> None:
    machine, pace = Machine(1.0, 1.0), new_pace()
    machine.run(pace, 500)
    assert pace.plan(MANY - 1)[0] > 3
    assert pace.plan(2)[0] == 2
    assert pace.plan(0) == (0, False)


def asks(machine: Machine, pace: DraftLength, tokens: int) -> list[bool]:
    """Of each pass over so many tokens, whether the shallow head was asked."""
    asked, plan = [], pace.plan
    with pytest.MonkeyPatch.context() as patch:

        def planned(most: int) -> tuple[int, bool]:
            length, probe = plan(most)
            asked.append(length > 0 or probe)
            return length, probe

        patch.setattr(pace, "plan", planned)
        machine.run(pace, tokens)
    return asked


def test_rows_are_asked_as_far_as_is_granted_where_none_is_sure() -> None:
    asked = asks(Machine(0.0, 0.0), new_pace(), 200)
    assert asked[:4] == [False, True, False, True]
    # The head is a 13th of a token: 0.3 tokens for 4 rows, and then 0.75 % of what follows.
    assert 4 <= sum(asked) < 20


def test_a_head_that_costs_nothing_is_asked_rarely_too() -> None:
    """Asking takes time outside the engines."""
    machine, pace = Machine(0.0, 0.0, head=0.0), new_pace()
    machine.run(pace, 200)
    assert sum(asks(machine, pace, 320)) <= 20


def test_recorded_costs_give_the_shape_and_measured_ones_the_size() -> None:
    recorded = Costs(4.0, 3.0, {1: 10.0, 4: 16.0})
    pace = new_pace(recorded)
    for _ in range(50):
        pace.observe_costs(1, 1, 8e-3, 20e-3, 1)
        pace.observe_costs(0, 1, 6e-3, 20e-3, 1)
    # Twice the recorded costs: drafts of up to three look as they would there.
    for length in range(4):
        assert speedup(pace, length) == pytest.approx(speedup(new_pace(recorded), length), rel=1e-3)


def test_the_predicted_speedup_is_the_simulated_one() -> None:
    for length in (0, 1, 3, 7):
        machine, pace = Machine(0.8, 0.7, seed=length), new_pace()
        pace.plan = lambda most, length=length: (length, False)  # type: ignore[method-assign,misc]
        measured = machine.run(pace, 20_000)
        known = new_pace(Costs(4, 3, {1: 10, 16: 25}))
        known.sure.value, known.kept.value = 0.8, 0.7
        assert speedup(known, length) == pytest.approx(measured, rel=0.02)


def test_calls_that_others_share_have_costs_of_their_own() -> None:
    """Alone drafts pay; in calls of eight sequences a deep row costs as much as another pass, and they do not."""
    alone, crowded = Machine(0.9, 0.9), Machine(0.9, 0.9, first=10, further=10)
    pace = new_pace()
    assert alone.run(pace, 500) > 1.3
    assert crowded.run(pace.among(8), 3000) > 0.98
    assert pace.among(8) is pace.among(5)
    assert pace.among(8) is not pace.among(4)
    assert pace.among(1) is pace
    assert alone.run(pace, 500) > 1.3


def test_what_drafts_have_lost_keeps_them_away_until_it_is_made_up_for() -> None:
    machine, pace = Machine(1.0, 1.0), new_pace()
    machine.run(pace, 1000)
    drafting = pace.plan(MANY - 1)[0]
    assert drafting > 3
    for _ in range(3):
        pace.observe_costs(drafting, drafting + 1, drafting * 4.0 + 3.0, 14.0, 1)
    assert pace.plan(MANY - 1)[0] == 0
    for _ in range(5000):
        pace.observe_plain(3.0, 10.0)
    # Of one token, until more is won again.
    assert pace.plan(MANY - 1)[0] == 1


def test_savings_are_kept_up_to_a_limit() -> None:
    pace = new_pace()
    assert Machine(1.0, 1.0).run(pace, 20_000) > 1.3
    machine, done, seconds = Machine(1.0, 0.0), 0.0, 0.0
    for _ in range(300):
        more, spent = machine.one_pass(pace, MANY)
        done, seconds = done + more, seconds + spent
    one_draft = (MANY * (3.0 + 1.0) + 25.0) / machine.full
    assert seconds / machine.full - done < MOST_SAVED + GRANT + GRANT_SHARE * done + one_draft


def longer(pace: DraftLength) -> float:
    """What drafts of one token are expected to gain."""
    return speedup(pace, 1)


def test_requests_of_one_threshold_share_what_they_have_seen_and_all_share_costs() -> None:
    learned = DraftLengths(CallCosts(Costs(0.002, 0.001, {1: 0.008, 8: 0.012})))
    pace = learned.of(0.5, False)
    assert learned.of(0.5, False) is pace
    assert learned.of(0.5, True) is not pace
    other = learned.of(0.6, False)
    pace.observe_costs(1, 1, 0.004, 0.010, 1)
    pace.observe_drafts([DraftOutcome(True, True)])
    assert longer(other) < longer(pace)
    assert learned.costs.step(True) == 0.004
    assert learned.costs.deep_pass(1) == 0.010


def test_only_so_many_thresholds_are_remembered() -> None:
    learned = DraftLengths(CallCosts())
    first = learned.of(0.0, False)
    for number in range(1, MOST_THRESHOLDS):
        learned.of(number / 100, False)
    assert learned.of(0.0, False) is first
    learned.of(0.99, False)
    assert learned.of(0.0, False) is not first
