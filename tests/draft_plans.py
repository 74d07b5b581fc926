"""Drafts as tests want them: what is drafted otherwise depends on costs, which are a matter of timing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding import draft_rule
from runtime.decoding.draft_rule import NO_DRAFT, Acceptance, DraftPlan, Drafts


def draft_exits(patch: pytest.MonkeyPatch, most: int = 1000, plain_every: int = 0) -> None:
    """Draft up to `most` tokens of the exit at each step, whatever they cost, none at every `plain_every`-th, and no
    candidates."""
    count = 0

    def plan(self: Drafts, response: object, room: int, sequences: int = 1) -> DraftPlan:
        nonlocal count
        count += 1
        nothing = room == 0 or (plain_every and count % plain_every == 0)
        return NO_DRAFT if nothing else DraftPlan(exits=min(most, room))

    patch.setattr(Drafts, "plan", plan)
    patch.setattr(Drafts, "_gain", 0.0)  # a draft's tokens cost nothing


class PlannedExits(Drafts):
    """Drafts of the exit as they are given, over and over, for loops that are driven by hand: how many tokens, at most,
    and how many others are made in the time of one, which is what a drafted one costs."""

    _gain = 0.0

    def __init__(self, *plans: tuple[int, float]) -> None:
        super().__init__(CallCosts(), Acceptance())
        self.turns = itertools.cycle(plans or [(1000, 0.0)])

    def plan(self, response: object, most: int, sequences: int = 1) -> DraftPlan:
        length, self._gain = next(self.turns)
        return DraftPlan(exits=min(length, most)) if min(length, most) else NO_DRAFT


def draft_candidates(patch: pytest.MonkeyPatch) -> None:
    """Draft whatever a source finds, whether it pays or not."""
    patch.setattr(Drafts, "_length", lambda self, source, agrees, count: count)
    patch.setattr(draft_rule, "RULE", replace(draft_rule.RULE, grant=math.inf))
