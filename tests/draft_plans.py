"""Drafts as tests want them: what is drafted otherwise depends on costs, which are a matter of timing."""

from __future__ import annotations

import math

import pytest

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding import draft_rule
from runtime.decoding.draft_rule import PLAIN, Acceptance, Chain, Drafts, Plan


def draft_exits(patch: pytest.MonkeyPatch, most: int = 1000, plain_every: int = 0) -> None:
    """Draft up to `most` tokens of the exit at each step, whatever they cost, none at every `plain_every`-th, and no
    candidates."""
    count = 0

    def plan(self: Drafts, response: object, room: int, sequences: int = 1) -> Plan:
        nonlocal count
        count += 1
        nothing = room == 0 or (plain_every and count % plain_every == 0)
        return PLAIN if nothing else Plan(exits=min(most, room))

    patch.setattr(Drafts, "plan", plan)
    patch.setattr(Drafts, "chain", free_chain)


def free_chain(drafts: Drafts, threshold: float) -> Chain:
    """A draft whose tokens cost nothing."""
    return Chain(Acceptance(), threshold, 0.0, 0.0)


class LongestExits(Drafts):
    """Drafts of the exit as long as there is room for, for loops that are driven by hand."""

    def __init__(self) -> None:
        super().__init__(CallCosts(), Acceptance())

    chain = free_chain

    def plan(self, response: object, most: int, sequences: int = 1) -> Plan:
        return Plan(exits=most) if most else PLAIN


def draft_candidates(patch: pytest.MonkeyPatch) -> None:
    """Draft whatever a source finds, whether it pays or not."""
    patch.setattr(Drafts, "_length", lambda self, source, agrees, count: count)
    patch.setattr(draft_rule, "GRANT", math.inf)
