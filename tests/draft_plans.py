"""Fixed drafts for tests, because those of the rule depend on measured times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.acceptance import Acceptance
from runtime.decoding.draft_sources import NO_PROPOSAL, DraftSource
from runtime.decoding.drafts import NO_DRAFT, DraftPlan, Drafts
from runtime.decoding.response import Response


def draft_exits(patch: pytest.MonkeyPatch, most: int = 1000, plain_every: int = 0) -> None:
    """Draft up to `most` tokens of the exit at each step, even if it does not pay. TextSource draft nothing.

    Every `plain_every`-th step drafts nothing (0: no such step).
    """
    count = 0

    def plan(self: Drafts, response: object, room: int, sequences: int = 1) -> DraftPlan:
        nonlocal count
        count += 1
        nothing = room == 0 or (plain_every and count % plain_every == 0)
        return NO_DRAFT if nothing else DraftPlan(exits=min(most, room))

    patch.setattr(Drafts, "plan", plan)
    patch.setattr(Drafts, "continuation", lambda self, *args: NO_PROPOSAL)
    patch.setattr(Drafts, "_pace", 0.0)  # a draft costs nothing


def draft_texts(patch: pytest.MonkeyPatch) -> None:
    """Draft everything that a text proposes, even if it does not pay."""

    def length(self: Drafts, probabilities: Sequence[float]) -> tuple[int, float]:
        return len(probabilities), 1000 + sum(probabilities) if probabilities else -math.inf

    patch.setattr(Drafts, "_length", length)
    patch.setattr(Drafts, "_count_search", lambda self, gain: None)  # search at every token
    patch.setattr(CallCosts, "measured", lambda self, kind, rows: True)


def measured() -> CallCosts:
    """Return costs with measurements of mode full, without which nothing is drafted."""
    costs = CallCosts()
    for kind in ("step", "pass"):
        for _ in range(2):  # the first is ignored
            costs.observe(kind, 1, costs.seconds(kind, 1))  # type: ignore[arg-type]
    return costs


class PlannedDrafts(Drafts):
    """Repeats plans, for tests that run a loop themselves.

    Args:
        plans: Maximum number of drafted tokens of a text, and of the exit if no text proposes any. Default: up to 1000
            of the exit.
        sources: Sources of texts, which share `acceptance`.
        threshold: Confidence above which a prediction of the exit is drafted.
    """

    _pace = 0.0  # a draft costs nothing

    def __init__(
        self,
        *plans: tuple[int, int],
        sources: Sequence[DraftSource] = (),
        threshold: float = 0.5,
        acceptance: Acceptance | None = None,
    ) -> None:
        super().__init__(measured(), acceptance or Acceptance(), sources, threshold=threshold)
        self._turns = itertools.cycle(plans or [(0, 1000)])
        self._text_length = 0

    def plan(self, response: Response, room: int, sequences: int = 1) -> DraftPlan:
        self._text_length, exits = next(self._turns)
        plan = super().plan(response, room, sequences)
        exits = min(exits, room)
        return DraftPlan(exits=exits) if exits and not plan.proposal.tokens else plan

    def _length(self, probabilities: Sequence[float]) -> tuple[int, float]:
        length = min(self._text_length, len(probabilities))
        return length, 1000 + length if length else -math.inf

    def _tries_exit(self, least: float) -> bool:
        return False
