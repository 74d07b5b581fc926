"""The adaptive threshold of FREE's authors, request by request; its rule is tested with those of calibration."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, PROMPTS, Bundles
from manifest_case import MANIFEST

from runtime import OptionError, Session
from runtime.adaptation.adaptive_threshold import (
    FIRST_THRESHOLD,
    GRID,
    MOST_REFITS,
    AdaptiveThreshold,
    Moments,
    PaperThreshold,
    paper_threshold,
)

T5 = next(case for case in CASES if case.name == "t5-deep-decoder")


def teach(adaptive: PaperThreshold, random: np.random.Generator, labels: int = 12) -> list[tuple[float, bool]]:
    """A request: some labelled tokens, and some left over."""
    agrees = random.random(labels) < 0.7
    confidence = np.where(agrees, random.beta(4, 1, labels), random.beta(2, 3, labels))
    request = adaptive.begin()
    seen = list(zip(confidence.tolist(), agrees.tolist(), strict=True))
    request.label(seen)
    assert not request.leave([0.99] * 5)  # never an audit, and what is left over teaches nothing
    adaptive.complete(request)
    return seen


def test_each_request_refits_to_all_labels_so_far_and_300_times_at_most() -> None:
    random, adaptive = np.random.default_rng(2), PaperThreshold(MANIFEST, None)
    assert adaptive.threshold == FIRST_THRESHOLD
    seen: list[tuple[float, bool]] = []
    for number in range(MOST_REFITS):
        seen += teach(adaptive, random)
        if number < 20 or number == MOST_REFITS - 1:
            classes = [Moments.of(np.array([c for c, agrees in seen if agrees == label])) for label in (True, False)]
            assert adaptive.threshold == paper_threshold(*classes)
    assert GRID[0] < adaptive.threshold < GRID[-1]
    last = adaptive.state()
    for _ in range(50):  # all of it wrong, far up
        request = adaptive.begin()
        assert not request.learns
        request.label([(0.95, False)] * 100)
        adaptive.complete(request)
    assert adaptive.state() == last


def test_where_little_agrees_it_exits_all_the_same_and_the_default_rule_does_not() -> None:
    """An untrained exit, as SmolLM2's after layer 10: the likelihood ratio leaves out that 4 % of the tokens agree."""
    wrong = {}
    for rule in (AdaptiveThreshold(MANIFEST, None, 4000), PaperThreshold(MANIFEST, None)):
        random, errors, tokens = np.random.default_rng(1), 0, 0
        for number in range(200):
            agrees = random.random(60) < 0.045
            confidence = np.where(agrees, random.beta(1.1, 3.2, 60), random.beta(0.95, 1.3, 60))
            request, stack = rule.begin(), list[tuple[float, bool]]()
            for row in zip(confidence.tolist(), agrees.tolist(), strict=True):
                stack.append(row)
                if row[0] > request.threshold and len(stack) < 16:
                    errors += (not row[1]) and number > 50
                    continue
                request.label(stack)
                stack = []
            tokens += 60 * (number > 50)
            rule.complete(request)
        wrong[type(rule)] = errors / tokens
    assert wrong[AdaptiveThreshold] < 0.01
    assert wrong[PaperThreshold] > 0.4


@pytest.mark.parametrize("confidence", [math.nan, math.inf])
def test_a_confidence_that_is_no_number_teaches_nothing(confidence: float) -> None:
    ones = [PaperThreshold(MANIFEST, None) for _ in range(2)]
    for adaptive, more in zip(ones, ([], [(confidence, True)]), strict=True):
        request = adaptive.begin()
        request.label([(0.9, True), (0.8, True), (0.3, False), (0.5, False), *more])
        adaptive.complete(request)
    assert ones[0].threshold == ones[1].threshold


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source_sha256": "12" * 32}, "source_sha256 is"),
        ({"exit_layer": 99}, "exit_layer is 99"),
        ({"refits": -1}, "refits = -1 is out of range"),
        ({"threshold": 1.5}, "threshold = 1.5 is out of range"),
        ({"threshold": math.nan}, "threshold"),
        ({"agree": [1.0, 2.0]}, "sums that no tokens have"),
        ({"agree": [1.0, math.inf, 2.0]}, "agree"),
        ({"disagree": "x"}, "disagree"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict[str, Any], problem: str) -> None:
    state = {**PaperThreshold(MANIFEST, None).state(), **change}
    with pytest.raises(OptionError, match=problem):
        PaperThreshold(MANIFEST, None, state)


def test_a_session_adapts_by_the_papers_rule_and_continues_from_its_state(bundle: Bundles) -> None:
    options: dict[str, Any] = {"threshold": "adaptive", "adaptive_rule": "paper", "slots": 1}
    asked: dict[str, Any] = {"mode": "free", "max_new_tokens": 16, "ignore_eos": True}
    with Session(bundle(T5), **options) as session:
        for prompt in PROMPTS[:3]:
            session.generate(list(prompt), **asked)
        state = json.loads(json.dumps(session.adaptive_state()))
        assert state["refits"] == 3
        assert any(np.isclose(state["threshold"], GRID))
        expected = session.generate(list(PROMPTS[0]), **asked).token_ids
    with Session(bundle(T5), **options, adaptive_state=state) as session:
        assert session.generate(list(PROMPTS[0]), **asked).token_ids == expected
    # A state of the other rule.
    with pytest.raises(OptionError, match="start without a state"):
        Session(bundle(T5), threshold="adaptive", adaptive_state=state)
    with pytest.raises(OptionError, match="adaptive_rule"):
        Session(bundle(T5), threshold="adaptive", adaptive_rule="moments")  # type: ignore[arg-type]
