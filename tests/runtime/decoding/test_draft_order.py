"""Which drafts a request makes first, those from the text or the exit's: chosen by measured speeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles
from draft_plans import draft_texts

from runtime import Session
from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.draft_acceptance import Acceptance, DraftOrder
from runtime.decoding.draft_rule import RULE
from runtime.decoding.drafts import Drafts


def observed(order: DraftOrder, speed_of: Callable[[bool], float], requests: int) -> list[bool]:
    """Let requests of 100 tokens run at the speed of their order, and return the orders."""
    chosen = []
    for _ in range(requests):
        first = order.next()
        chosen.append(first)
        for _ in range(50):
            order.observe(first, 2, 2 / speed_of(first))
    return chosen


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_order_is_used_after_both_were_tried(faster: bool) -> None:
    chosen = observed(DraftOrder(), lambda first: 2.0 if first == faster else 1.9, 6 + 160)
    assert chosen[:6] == [False, True] * 3
    early = (RULE.early_tokens - 300) // 100 + 1
    assert chosen[6:].index(not faster) == 1  # the eighth request
    assert early < chosen[6:].count(not faster) < early + 160 // RULE.retry
    assert chosen[-64:].count(not faster) == 64 // RULE.retry


def test_a_wrong_first_impression_is_soon_corrected() -> None:
    order = DraftOrder()
    for _ in range(RULE.alternating):
        first = order.next()
        order.observe(first, 100, 100 / (1.0 if first else 1.1))
    corrected = observed(order, lambda first: 1.2 if first else 1.0, 30)
    assert corrected[-4:].count(True) >= 3


def test_the_order_follows_the_newest_requests() -> None:
    order = DraftOrder()
    assert observed(order, lambda first: 2.0 if first else 1.0, 41)[-1]
    changed = observed(order, lambda first: 1.0 if first else 2.0, 200)
    assert changed[-20:].count(False) >= 18


def test_without_measurements_the_text_is_first() -> None:
    order = DraftOrder()
    assert [order.next() for _ in range(RULE.alternating + 5)][RULE.alternating :] == [False] * 5


def test_passes_that_share_calls_are_not_compared() -> None:
    costs = CallCosts()
    for kind in ("step", "pass"):
        costs.observe(kind, 1, 0.001)
    for exit_first, shared, tokens in ((True, False, 1.0), (True, True, 0.0), (None, False, 0.0)):
        acceptance = Acceptance()
        drafts = Drafts(costs, acceptance, exit_first=exit_first)
        drafts.observe_plain(0.001, 0.001, shared)
        assert sum(acceptance.order._tokens.values()) == tokens


def test_both_orders_give_the_tokens_of_full(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_texts(monkeypatch)
    orders: list[bool] = []
    chosen = DraftOrder.next

    def recorded(order: DraftOrder) -> bool:
        orders.append(chosen(order))
        return orders[-1]

    monkeypatch.setattr(DraftOrder, "next", recorded)
    prompt = np.arange(5, 25)
    with Session(bundle(BY_NAME["llama-tied"], 1), threads=1) as session:
        full = session.generate(prompt, mode="full", max_new_tokens=40, ignore_eos=True)
        for options in ({}, {}, {"predicted_output": [1, 2, 3]}, {"drafts": "exit"}, {"drafts": "phrases"}):
            ours = session.generate(prompt, mode="lossless", max_new_tokens=40, ignore_eos=True, **options)
            assert ours.token_ids == full.token_ids
    assert orders == [False, True]  # a given text is first, and the others have one kind of draft
