"""The threshold rule of FREE's authors: its fit, what it learns from requests, and in sessions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles
from manifest_case import MANIFEST
from scipy.stats import beta
from traces import mixed

from runtime import OptionError, Session
from runtime.adaptation.adaptive_threshold import AdaptiveThreshold
from tools.paper.threshold import (
    FIRST_THRESHOLD,
    GRID,
    MAX_REFITS,
    Moments,
    PaperSession,
    PaperThreshold,
    paper_choice,
    paper_threshold,
)


def authors(confidence: np.ndarray, agrees: np.ndarray) -> float:
    """The rule written out: weighted moments of nearly one-hot responsibilities, densities, ten thresholds."""
    inside = np.clip(confidence, 1e-4, 1 - 1e-4)
    shapes = []
    for label in (False, True):
        weight = np.where(agrees == label, 0.2, 1e-4)
        mean = np.average(inside, weights=weight)
        variance = np.average((inside - mean) ** 2, weights=weight)
        a = mean * (mean * (1 - mean) / variance - 1)
        shapes.append((a, a * (1 - mean) / mean))
    grid = np.linspace(0.3, 0.9, 10)
    best = int(np.argmax([a / (a + b) for a, b in shapes]))
    density, other = (beta.pdf(grid, *shapes[number]) for number in (best, 1 - best))
    passing = int((density / (density + other) > 0.4).sum())
    return float(grid[min(max(0, 10 - passing), 9)])


@pytest.mark.parametrize("seed", range(6))
def test_papers_rule_equals_the_authors_implementation(seed: int) -> None:
    traces = mixed(20, 20, seed, agree=0.3 + 0.1 * seed)
    agreeing, others = (Moments.of(traces.confidence[traces.agrees == agrees]) for agrees in (True, False))
    expected = authors(traces.confidence.astype(np.float64), traces.agrees)
    assert paper_threshold(agreeing, others) == pytest.approx(expected)
    choice = paper_choice(traces)
    assert choice.threshold == pytest.approx(expected)
    assert choice.mixture is not None


def test_papers_rule_gives_a_threshold_for_any_input() -> None:
    nothing, same, some = Moments(), Moments.of(np.full(50, 0.7)), Moments.of(np.linspace(0.1, 0.9, 30))
    assert paper_threshold(nothing, nothing) == paper_threshold(same, nothing) == GRID[-1]
    # Without tokens of a class, both fits are the same.
    assert paper_threshold(some, nothing) == paper_threshold(nothing, some) == GRID[0]
    assert paper_threshold(Moments.of(np.array([0.0, 1.0])), some) in GRID


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


def test_each_request_refits_to_all_labels_at_most_300_times() -> None:
    random, adaptive = np.random.default_rng(2), PaperThreshold(MANIFEST)
    assert adaptive.threshold == FIRST_THRESHOLD
    early = adaptive.begin()
    adaptive.complete(adaptive.begin())  # without labels it teaches nothing
    assert adaptive.state()["refits"] == 0
    seen: list[tuple[float, bool]] = []
    for number in range(MAX_REFITS):
        seen += teach(adaptive, random)
        if number < 20 or number == MAX_REFITS - 1:
            classes = [Moments.of(np.array([c for c, agrees in seen if agrees == label])) for label in (True, False)]
            assert adaptive.threshold == paper_threshold(*classes)
    assert GRID[0] < adaptive.threshold < GRID[-1]
    assert early.threshold == FIRST_THRESHOLD != adaptive.threshold
    last = adaptive.state()
    for _ in range(50):  # all of it wrong, far up
        request = adaptive.begin()
        assert not request.learns
        request.label([(0.95, False)] * 100)
        adaptive.complete(request)
    assert adaptive.state() == last


def test_papers_rule_exits_despite_low_agreement_and_the_default_rule_does_not() -> None:
    """An untrained exit, as SmolLM2's after layer 10: the likelihood ratio leaves out that 4 % of the tokens agree."""
    wrong = {}
    for rule in (AdaptiveThreshold(MANIFEST, None, 4000), PaperThreshold(MANIFEST)):
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
def test_mismatched_state_of_the_papers_rule_is_refused(change: dict[str, Any], problem: str) -> None:
    state = {**PaperThreshold(MANIFEST).state(), **change}
    with pytest.raises(OptionError, match=problem):
        PaperThreshold(MANIFEST, state)


def test_session_adapts_by_the_papers_rule_and_continues_from_its_state(bundle: Bundles) -> None:
    path = bundle(BY_NAME["t5-deep-decoder"])
    options: dict[str, Any] = {"mode": "free", "drafts": "exit", "max_new_tokens": 16, "ignore_eos": True}
    with PaperSession(path, slots=1) as session:
        assert session.threshold == FIRST_THRESHOLD
        for prompt in PROMPTS[:3]:
            session.generate(list(prompt), **options)
        state = json.loads(json.dumps(session.adaptive_state()))
        expected = session.generate(list(PROMPTS[0]), **options).token_ids
    with PaperSession(path, state=state, slots=1) as session:
        assert session.generate(list(PROMPTS[0]), **options).token_ids == expected
    with PaperSession(path, state=state | {"threshold": 0.0}, slots=1) as session:
        session.generate(list(PROMPTS[0]), **options)
        taught = session.adaptive_state()
    assert taught["refits"] == state["refits"] + 1
    assert any(np.isclose(taught["threshold"], GRID))
    with pytest.raises(OptionError, match="start without a state"):
        Session(path, threshold="adaptive", adaptive_state=state)


def test_pass_without_pending_tokens_gives_no_labels() -> None:
    labels = PaperThreshold(MANIFEST).begin()
    labels.label([(0.2, True)])
    assert labels.labelled == []
    labels.label([(0.95, True), (0.2, False)])
    assert len(labels.labelled) == 2
