"""How many candidates are drafted: simulated text and costs in, speed against mode full out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from runtime.adaptation.call_costs import CallCosts
from runtime.adaptation.draft_length import DraftLength, DraftLengths

MOST = 15
# Seconds of the first row of both decoders and of a further one, measured: SmolLM2-135M in fp32 and in int8, the demo's
# model; and a machine on which rows cost most, those of 4 bits.
MACHINES = {"smollm2-fp32": (16.8, 0.6), "smollm2-int8": (8.6, 0.75), "demo": (0.44, 0.055), "dear rows": (10.0, 4.0)}


class Text:
    """Candidates are there with the chance `found`, and right with the chance `right`. `call`: seconds of a source's
    code."""

    def __init__(
        self, name: str, found: float, right: float, seed: int = 0, noise: float = 0.0, call: float = 0.0
    ) -> None:
        self.first, self.further = MACHINES[name]
        self.found, self.right, self.call, self.noise = found, right, call, noise
        self.chance = random.Random(seed)
        self.drafts = self.calls = 0

    def seconds(self, rows: int) -> tuple[float, float]:
        """Of the shallow and of the deep call."""
        seconds = (self.first + (rows - 1) * self.further) * (1 + self.noise * self.chance.random())
        return seconds / 3, seconds * 2 / 3

    def request(self, pace: DraftLength, tokens: int) -> float:
        """Its speed as a multiple of mode full, over so many tokens."""
        pace.begin()
        left, spent, agrees = tokens, 0.0, 0
        while left > 0:
            agrees = agrees or (2 if self.chance.random() < self.found else 0)
            source, count = ("own", MOST) if self.call else ("lookup", MOST if agrees else 0)
            if self.call and pace.plan_call():
                pace.observe_call(self.call)
                spent, self.calls = spent + self.call, self.calls + 1
            elif self.call:
                count = 0
            drafted = pace.plan_candidates(source, 0 if self.call else agrees, min(count, left))
            self.drafts += drafted > 0
            shallow, deep = self.seconds(drafted + 1)
            kept = 0
            while kept < min(count, left - 1) and self.chance.random() < self.right:
                kept += 1
            for place in range(min(kept, drafted)):
                pace.observe_candidate(source, (0 if self.call else agrees) + place, True)
            if kept <= drafted and count:
                pace.observe_candidate(source, (0 if self.call else agrees) + kept, False)
            elif count:
                pace.observe_candidate(source, (0 if self.call else agrees) + drafted, True)
            made = min(kept, drafted) + 1
            if drafted:
                pace.observe_costs(0, drafted + 1, shallow, deep, made, drafted + 1)
            else:
                pace.observe_plain(shallow, deep)
            agrees = agrees + made if kept > drafted and agrees else 0
            left, spent = left - made, spent + shallow + deep
        return (tokens - left) * self.first * (1 + self.noise / 2) / spent


@given(
    name=st.sampled_from(sorted(MACHINES)),
    texts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6),
    length=st.integers(64, 400),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_request_of_64_tokens_is_much_slower_than_full(
    name: str, texts: list[tuple[float, float]], length: int, seed: int
) -> None:
    """Whatever the requests before it have saved or learned. The aim is 0.98; 0.973 was found where rows are dear."""
    pace = DraftLength(CallCosts())
    Text(name, 0, 0, seed).request(pace, 64)  # what a token costs
    for found, right in texts:
        assert Text(name, found, right, seed).request(pace, length) > 0.95


def test_a_draft_of_more_rows_than_were_measured_is_affordable_if_they_are_dear() -> None:
    """Two rows had been seen once, and what four would cost was guessed from them: too little."""
    pace = DraftLength(CallCosts())
    for found in (0.0, 0.0, 0.125):
        assert Text("dear rows", found, 0.0, 600).request(pace, 64) > 0.98


@pytest.mark.parametrize("name", MACHINES)
def test_text_that_stops_repeating_costs_no_more_than_two_percent(name: str) -> None:
    for seed in range(20):
        pace = DraftLength(CallCosts())
        Text(name, 1.0, 0.98, seed, noise=0.1).request(pace, 500)
        assert Text(name, 1.0, 0.0, seed).request(pace, 64) > 0.98


@pytest.mark.parametrize(
    ("name", "right", "least"),
    [("smollm2-fp32", 0.9, 3.0), ("smollm2-int8", 0.9, 2.5), ("demo", 0.9, 2.0), ("smollm2-int8", 0.5, 1.3)],
)
def test_text_that_is_repeated_pays(name: str, right: float, least: float) -> None:
    text, pace = Text(name, 1.0, right, noise=0.1), DraftLength(CallCosts())
    assert text.request(pace, 400) > least


def test_nothing_is_drafted_where_rows_are_dear() -> None:
    text, pace = Text("dear rows", 1.0, 0.02), DraftLength(CallCosts())
    text.request(pace, 300)
    text.drafts = 0
    text.request(pace, 300)
    assert text.drafts == 0


def test_candidates_are_judged_without_being_drafted() -> None:
    """Wrong ones end drafting; right ones, of which nothing is drafted, begin it again."""
    pace = DraftLength(CallCosts())
    Text("smollm2-fp32", 0, 0).request(pace, 20)
    for _ in range(60):
        pace.observe_candidate("lookup", 2, False)
    assert pace.plan_candidates("lookup", 2, MOST) == 0
    assert pace.plan_candidates("lookup", 5, MOST) == 0  # one token without a draft first
    assert pace.plan_candidates("lookup", 5, MOST) > 0
    for _ in range(60):
        pace.observe_candidate("lookup", 2, True)
    assert pace.plan_candidates("lookup", 2, MOST) > 0
    assert pace.plan_candidates("lookup", 2, 0) == 0


def test_a_source_that_takes_long_is_called_rarely_and_a_fast_one_for_every_draft() -> None:
    fast, slow = Text("smollm2-fp32", 1.0, 0.9, call=0.05), Text("smollm2-fp32", 1.0, 0.9, call=400.0)
    assert fast.request(DraftLength(CallCosts()), 400) > 2.5
    pace = DraftLength(CallCosts())
    slow.request(pace, 400)
    assert slow.calls == 1
    wrong = Text("smollm2-fp32", 1.0, 0.0, call=0.5)
    assert wrong.request(DraftLength(CallCosts()), 640) > 0.98


def test_requests_that_draft_from_other_sources_learn_apart() -> None:
    learned = DraftLengths(CallCosts())
    assert learned.of(0.5, False, "auto") is learned.of(0.5, False, "auto")
    assert learned.of(0.5, False, "auto") is not learned.of(0.5, False, "auto, predicted_output")
