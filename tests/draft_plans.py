"""Drafts as tests want them: what is drafted otherwise depends on costs, which are a matter of timing."""

from __future__ import annotations

import math

import pytest

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding import drafts
from runtime.decoding.drafts import PLAIN, Acceptance, Drafts, Plan


def draft_exits(patch: pytest.MonkeyPatch, most: int = 1000, probe: bool = False, plain_every: int = 0) -> None:
    """Draft up to `most` tokens of the exit at each step, none at every `plain_every`-th, and no candidates."""
    count = 0

    def plan(self: Drafts, response: object, room: int, sequences: int = 1) -> Plan:
        nonlocal count
        count += 1
        nothing = room == 0 and not probe
        return (
            PLAIN if nothing or (plain_every and count % plain_every == 0) else Plan(exits=min(most, room), probe=probe)
        )

    patch.setattr(Drafts, "plan", plan)


class LongestExits(Drafts):
    """Drafts of the exit as long as there is room for, for loops that are driven by hand."""

    def __init__(self) -> None:
        super().__init__(CallCosts(), Acceptance())

    def plan(self, response: object, most: int, sequences: int = 1) -> Plan:
        return Plan(exits=most) if most else PLAIN


def draft_candidates(patch: pytest.MonkeyPatch) -> None:
    """Draft whatever a source finds, whether it pays or not."""
    patch.setattr(Drafts, "_length", lambda self, source, agrees, count: count)
    patch.setattr(drafts, "GRANT", math.inf)
