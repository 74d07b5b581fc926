"""Fixed draft lengths for tests, because the usual ones depend on measured times."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding import drafts
from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.draft_sources import NO_CANDIDATES
from runtime.decoding.drafts import NO_DRAFT, DraftPlan, Drafts


def draft_exits(patch: pytest.MonkeyPatch, most: int = 1000, plain_every: int = 0) -> None:
    """Draft up to `most` tokens of the exit at each step, whatever they cost.

    Every `plain_every`-th step drafts nothing (0: no such step). No step drafts candidates.
    """
    count = 0

    def plan(self: Drafts, response: object, room: int, sequences: int = 1) -> DraftPlan:
        nonlocal count
        count += 1
        nothing = room == 0 or (plain_every and count % plain_every == 0)
        return NO_DRAFT if nothing else DraftPlan(exits=min(most, room))

    patch.setattr(Drafts, "plan", plan)
    patch.setattr(Drafts, "continuation", lambda self, *args: NO_CANDIDATES)
    patch.setattr(Drafts, "_gain", 0.0)  # a draft's tokens cost nothing
    patch.setattr(Drafts, "_budget", lambda self, kind: math.inf)


class PlannedExits(Drafts):
    """Repeats given plans for drafts of the exit, for tests that drive a loop themselves.

    Args:
        plans: Maximum number of drafted tokens, and the speed relative to mode full that a draft is compared with (0:
            drafts cost nothing). Default: up to 1000 tokens at no cost.
    """

    _gain = 0.0

    def __init__(self, *plans: tuple[int, float]) -> None:
        super().__init__(CallCosts(), Acceptance())
        self._budget = lambda kind: math.inf  # type: ignore[method-assign]
        self.turns = itertools.cycle(plans or [(1000, 0.0)])

    def plan(self, response: object, most: int, sequences: int = 1) -> DraftPlan:
        length, self._gain = next(self.turns)
        return DraftPlan(exits=min(length, most)) if min(length, most) else NO_DRAFT


def draft_candidates(patch: pytest.MonkeyPatch) -> None:
    """Draft everything that a source finds, even if it does not pay."""
    patch.setattr(Drafts, "_length", lambda self, found, count: count)
    patch.setattr(drafts, "RULE", replace(drafts.RULE, grant=math.inf, longest_rest=0))
