"""The speed of an exit's drafts follows the present costs of calls."""

from __future__ import annotations

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.costs import Costs
from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.drafts import Drafts

BASE = Costs(shallow=0.2, shallow_without_head=0.1, deep={1: 1.0, 2: 1.1})


def test_an_exit_pays_again_once_its_calls_are_as_fast_as_before() -> None:
    """Drafts were observed while passes of four rows took four times as long. Their rows still count afterwards."""
    costs = CallCosts(BASE)
    acceptance = Acceptance()
    drafts = Drafts(costs, acceptance)
    for _ in range(9):
        costs.observe("pass", 1, 1.0)
        costs.observe("step", 1, 0.1)
        costs.observe("head", 1, 0.2)
    for _ in range(100):
        acceptance.exit_drafts(1).observe(made=3, rows=4, heads=4, slowness=1.0)
    assert drafts._exit_gain > 1.01
    for _ in range(9):
        costs.observe("pass", 4, 5.2)
    assert drafts._exit_gain == 0.0
    for _ in range(40):
        costs.observe("pass", 4, 1.3)
    assert drafts._exit_gain > 1.01
