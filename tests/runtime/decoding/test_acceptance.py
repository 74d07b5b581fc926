"""Measured acceptance of drafts, and the choice between requests with and without an exit's own layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.acceptance import (
    ALTERNATING,
    MAX_SETTINGS,
    RETRY,
    Acceptance,
    ExitChoice,
    LearnedDrafts,
    Trust,
)
from runtime.decoding.text_index import LEVELS, ORDERS


@given(st.floats(0, 1), st.floats(0, 1))
def test_estimate_is_used_until_acceptance_is_measured(probability: float, other: float) -> None:
    acceptance = Acceptance()
    evidence = acceptance.of_estimate("own", probability)
    assert acceptance.rate(evidence) == pytest.approx(probability, abs=0.051)
    if probability < other:
        assert acceptance.rate(evidence) <= acceptance.rate(acceptance.of_estimate("own", other))
    for _ in range(200):
        acceptance.of(evidence).observe(0.25)
    assert acceptance.rate(evidence) == pytest.approx(0.25, abs=0.02)
    assert acceptance.of_estimate("exit", probability) != evidence


def test_initial_rates_increase_with_phrase_length_and_share() -> None:
    acceptance = Acceptance()
    for order in range(len(ORDERS)):
        shares = [acceptance.rate(("lookup", order * LEVELS + share)) for share in range(LEVELS)]
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] < 1
    by_order = [acceptance.rate(("lookup", order * LEVELS + 4)) for order in range(len(ORDERS))]
    assert by_order == sorted(by_order)
    assert acceptance.rate(("predicted", 8)) > acceptance.rate(("predicted", 0))


def test_rate_follows_recent_observations() -> None:
    rate = Acceptance().of(("own", 0))
    for _ in range(1000):
        rate.observe(1.0)
    for _ in range(200):
        rate.observe(0.0)
    assert rate.value < 0.1


def test_trust_falls_after_a_few_misses_and_recovers() -> None:
    trust = Trust()
    assert trust.value == 1.0
    for _ in range(12):
        trust.observe(0.9, False)
    assert trust.value < 0.6
    for _ in range(300):
        trust.observe(0.9, True)
    assert trust.value == 1.0


def test_settings_are_measured_separately_and_the_oldest_is_dropped() -> None:
    learned = LearnedDrafts(CallCosts())
    first = learned.acceptance(0.0, False)
    assert learned.acceptance(0.0, False) is first
    assert learned.acceptance(0.0, True) is not first
    for number in range(MAX_SETTINGS):
        learned.acceptance(1.0 + number, False)
    assert learned.acceptance(0.0, False) is not first


# An exit's own layers


def chosen(choice: ExitChoice, speed_of: Callable[[bool], float], requests: int) -> list[bool]:
    """Return the choices of requests of 100 tokens at the speed of their choice."""
    made = []
    for _ in range(requests):
        exits = choice.next()
        made.append(exits)
        for _ in range(50):
            choice.observe(exits, 2, 2 / speed_of(exits))
    return made


@pytest.mark.parametrize("faster", [True, False])
def test_faster_choice_is_used_after_both_are_tried(faster: bool) -> None:
    choice = ExitChoice()
    made = chosen(choice, lambda exits: 2.0 if exits == faster else 1.9, ALTERNATING + 10 * RETRY)
    assert made[:ALTERNATING] == [True, False] * (ALTERNATING // 2)
    assert made[ALTERNATING:].count(not faster) == 10


def test_choice_follows_recent_requests() -> None:
    choice = ExitChoice()
    chosen(choice, lambda exits: 2.0 if exits else 1.0, 40)
    made = chosen(choice, lambda exits: 1.0 if exits else 2.0, 200)
    assert made[-20:].count(False) >= 18


def test_choices_alternate_without_measurements() -> None:
    choice = ExitChoice()
    assert [choice.next() for _ in range(10)] == [True, False] * 5
