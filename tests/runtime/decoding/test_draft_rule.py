"""The rule of drafts: simulated text, acceptance and costs in, speed against mode full out."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import tries

from runtime.adaptation.call_costs import CallCosts
from runtime.bundle.costs import NEUTRAL, Costs
from runtime.decoding.calls import Prediction
from runtime.decoding.draft_acceptance import LearnedDrafts
from runtime.decoding.draft_rule import RULE
from runtime.decoding.draft_sources import Candidates, agreeing
from runtime.decoding.drafts import NO_DRAFT, DraftPlan, Drafts, Outcome

ROOM = 15


class Machine(NamedTuple):
    """Milliseconds: a shallow step, its head, a deep pass, a further row of each pass, what is outside the engines."""

    step: float
    head: float
    deep: float
    further: float
    outside: float = 0.0

    @property
    def costs(self) -> Costs:
        """As a bundle that was converted on it records them: those of a deep pass."""
        deep = {rows: self.deep * (1 + (rows - 1) * self.further / (self.step + self.deep)) for rows in (1, 16)}
        return Costs(self.step + self.head, self.step, deep)


# Measured on AVX2: SmolLM2-135M in fp32 with its exit after layer 10 of 30, and in int8; the model of the demo. Rows of
# 4 bits on a processor where they are dearest.
MACHINES = {
    "smollm2-fp32": Machine(4.6, 4.9, 12.0, 0.6, 0.2),
    "smollm2-int8": Machine(2.4, 1.0, 6.0, 0.75, 0.2),
    "demo": Machine(0.098, 0.005, 0.31, 0.055, 0.03),
    "expensive rows": Machine(3.0, 1.0, 7.0, 4.0),
    "int4": Machine(0.05, 0.3, 3.2, 0.2, 0.1),
}
each_machine = pytest.mark.parametrize("name", MACHINES)
RIGHT, WRONG = 1, 0
SURE, UNSURE = 0.97, 0.05  # confidences


class Text:
    """A lookup as DraftSources has it: at a token it begins to match with the chance `found`, after `agrees` tokens
    that did, and each further token is right with the chance `right`."""

    def __init__(self, found: float, right: float, seed: int = 0, agrees: int = 3) -> None:
        self.chance, self.found_share, self.right, self.begins = random.Random(seed), found, right, agrees
        self.run: int | None = None  # right tokens that a match still has
        self.agrees = 0
        self.context: list[int] = []
        self.own = None

    def follow(self, tokens: list[int]) -> list[int]:
        final = tokens[len(self.context) :]
        self.context += final
        if self.run is not None:
            going = len(final) <= self.run
            self.run, self.agrees = (self.run - len(final), self.agrees + len(final)) if going else (None, 0)
        return final

    def found(self, most: int, rate: object) -> list[Candidates]:
        if self.run is None and self.chance.random() < self.found_share:
            self.run, self.agrees = 0, self.begins
            while self.chance.random() < self.right and self.run < 1000:
                self.run += 1
        tokens = [] if self.run is None else ([RIGHT] * self.run + [WRONG])[:most]
        return [agreeing("lookup", self.agrees, tokens)]


class Output:
    """A response of so many tokens."""

    def __init__(self, limit: int) -> None:
        self.tokens: list[int] = []
        self.limit = limit

    def within(self, tokens: list[int]) -> list[int]:
        return tokens[: self.limit - len(self.tokens)]


class Request:
    """A simulated request: `speed` over mode full, and the `plans` that were made. `exits`: the chance that the exit is
    sure, and that it is then right; else it is wrong. `noise`, how much longer a call may take."""

    def __init__(
        self,
        machine: Machine,
        learned: LearnedDrafts,
        tokens: int,
        text: Text | None = None,
        exits: tuple[float, float] | None = None,
        noise: float = 0.0,
        seed: int = 0,
        costs: CallCosts | None = None,
        python: float = 0.0,
        without_exit: CallCosts | None = None,
    ) -> None:
        self.python = python
        self.machine, self.noise, self.chance = machine, noise, random.Random(seed)
        self.sure, self.kept = exits or (0.0, 0.0)
        self.plans: list[tuple[int, DraftPlan]] = []
        sources: Any = text
        self.now = 0.0
        acceptance = learned.acceptance(0.5, False)
        self.drafts = Drafts(costs or learned.costs, acceptance, sources, exits is not None, without_exit)
        self.drafts.clock = lambda: self.now  # type: ignore[method-assign]
        output, spent = Output(tokens), 0.0
        while len(output.tokens) < tokens:
            made, seconds = self.one_pass(output)
            output.tokens += [RIGHT] * made
            spent += seconds
        full = machine.step + machine.deep + machine.outside
        self.spent = spent
        self.speed = tokens * (full + noise / 2 * (machine.step + machine.deep)) / spent

    def one_pass(self, output: Any) -> tuple[int, float]:
        left = output.limit - len(output.tokens)
        plan = self.drafts.plan(output, ROOM)
        self.plans.append((len(output.tokens), plan))
        rows, confidences, right, drafted = 1, list[float | None](), list[bool](), 0
        if plan.tokens:
            drafted = len(plan.tokens)
            rows = drafted + (drafted < left)
        elif plan is not NO_DRAFT:
            chain, most = self.drafts.exit_draft(0.0), min(plan.exits, left)
            while drafted < most and (not drafted or chain.continues()):
                sure = self.chance.random() < self.sure
                right.append(sure and self.chance.random() < self.kept)
                confidences.append(SURE if sure else UNSURE)
                if not chain(Prediction(RIGHT, confidences[-1])):
                    break
                drafted += 1
            rows = drafted + (drafted < left)
            confidences += [None] * (rows - len(confidences))
        heads = len(confidences) - confidences.count(None)
        share = self.machine.step / (self.machine.step + self.machine.deep)
        further = (rows - 1) * self.machine.further
        if plan.tokens:
            shallow = self.noisy(self.machine.step + share * further)
            deep = self.noisy(self.machine.deep + (1 - share) * further)
        else:
            # Python between the calls is a part of what the loop measures.
            shallow = self.noisy(rows * self.machine.step + heads * self.machine.head) + self.python * heads
            deep = self.noisy(self.machine.deep + further)
        seconds = shallow + deep + self.machine.outside
        self.now += seconds
        if plan is NO_DRAFT:
            self.drafts.observe_plain(shallow, deep, shared=False)
            return 1, seconds
        kept = 0
        while kept < drafted and (plan.tokens[kept] == RIGHT if plan.tokens else right[kept]):
            kept += 1
        made = min(kept + 1, left)
        agreed = len(right) > drafted and kept == drafted and right[drafted]
        self.drafts.observe(plan, Outcome(rows, drafted, kept, made, tuple(confidences), agreed), shallow, deep, False)
        return made, seconds

    def noisy(self, seconds: float) -> float:
        return seconds * (1 + self.noise * self.chance.random())

    @property
    def drafted(self) -> list[int]:
        """Tokens before each draft of candidates."""
        return [place for place, plan in self.plans if plan.tokens]


def learned_by(base: Costs = NEUTRAL) -> LearnedDrafts:
    return LearnedDrafts(CallCosts(base))


# Free writing


@each_machine
@pytest.mark.parametrize(("found", "right"), [(0.08, 0.6), (0.1, 0.5), (0.1, 0.2), (0.03, 0.0), (0.0, 0.0)])
def test_free_writing_is_never_slower_than_0_97_of_full(name: str, found: float, right: float) -> None:
    """In texts of SmolLM2 3 to 8 % of the tokens begin a match of three, whose tokens are right 6 times in 10."""
    for seed in range(5):
        learned = learned_by()
        for number in range(4):
            text = Text(found, right, seed * 100 + number)
            assert Request(MACHINES[name], learned, 128, text, noise=0.1, seed=seed).speed > 0.97


@given(
    name=st.sampled_from(sorted(MACHINES)),
    texts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(2, 5)), min_size=1, max_size=3),
    tokens=st.integers(100, 200),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(name="expensive rows", texts=[(1.0, 0.125, 2)], tokens=100, known=False, seed=1)
@example(name="expensive rows", texts=[(1.0, 0.0, 3)] * 3, tokens=100, known=True, seed=0)
@example(name="expensive rows", texts=[(1.0, 1.0, 3), (1.0, 0.4, 5)], tokens=100, known=True, seed=0)
@tries(50)
def test_no_text_whatever_matches_in_it_is_much_slower_than_full(
    name: str, texts: list[tuple[float, float, int]], tokens: int, known: bool, seed: int
) -> None:
    """Adversarial text too, after whatever other requests have taught. Costs that are not known of a processor with
    expensive rows take some drafts to learn."""
    learned = learned_by(MACHINES[name].costs if known else NEUTRAL)
    for found, right, agrees in texts:
        text = Text(found, right, seed, agrees)
        least = 0.95 if known or name != "expensive rows" else 0.9
        assert Request(MACHINES[name], learned, tokens, text).speed > least


@given(
    name=st.sampled_from(sorted(MACHINES)),
    chances=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
@tries(40)
def test_an_exit_that_is_seldom_right_costs_little(name: str, chances: list[tuple[float, float]], seed: int) -> None:
    learned = learned_by()
    for sure, kept in chances:
        assert Request(MACHINES[name], learned, 200, exits=(sure, kept), seed=seed).speed > 0.95


# A miss


@each_machine
def test_a_miss_never_ends_drafting(name: str) -> None:
    """After 100 tokens in which every match was wrong, a text that repeats is drafted within ten tokens."""
    learned = learned_by()
    text = Text(1.0, 0.0)
    request = Request(MACHINES[name], learned, 100, text)
    text.run, text.right = 400, 1.0
    output = Output(500)
    output.tokens = [RIGHT] * 100
    request.plans.clear()
    while len(output.tokens) < 200:
        output.tokens += [RIGHT] * request.one_pass(output)[0]
    assert request.drafted[0] < 110
    assert len(request.plans) < 40


@each_machine
def test_no_request_inherits_a_refusal(name: str) -> None:
    """Whatever was wrong in requests before, the first match of three tokens is drafted."""
    learned = learned_by()
    for seed in range(50):
        Request(MACHINES[name], learned, 100, Text(1.0, 0.0, seed))
    after = Request(MACHINES[name], learned, 40, Text(1.0, 1.0))
    assert after.drafted[0] == 0
    assert after.speed > (1.3 if name == "expensive rows" else 2.0)


# What pays


@pytest.mark.parametrize(
    ("name", "right", "least"),
    [("smollm2-fp32", 0.95, 3.0), ("smollm2-int8", 0.95, 2.5), ("demo", 0.95, 2.0), ("expensive rows", 0.95, 1.4)],
)
def test_text_that_is_repeated_pays_in_the_first_request_too(name: str, right: float, least: float) -> None:
    speeds = [Request(MACHINES[name], learned_by(), 60, Text(1.0, right, seed), noise=0.2).speed for seed in range(16)]
    assert sorted(speeds)[8] > least
    assert min(speeds) > 1 + (least - 1) / 3


@pytest.mark.parametrize(
    ("name", "kept", "least"), [("smollm2-fp32", 0.95, 1.15), ("smollm2-int8", 0.9, 1.2), ("demo", 0.8, 1.25)]
)
def test_an_exit_that_is_right_pays(name: str, kept: float, least: float) -> None:
    learned = learned_by()
    for seed in range(3):
        Request(MACHINES[name], learned, 64, exits=(1.0, kept), seed=seed)
    assert Request(MACHINES[name], learned, 400, exits=(0.95, kept), noise=0.1).speed > least


def test_a_draft_goes_on_as_far_as_tokens_of_such_confidence_were_right() -> None:
    """A low confidence that was always right is drafted, a high one that never was is not; and a threshold is kept."""
    machine = MACHINES["smollm2-int8"]
    learned = learned_by(machine.costs)
    drafts = Drafts(learned.costs, learned.acceptance(0.0, False))
    for confidence, right in ((0.25, True), (0.85, False)) * 40:
        outcome = Outcome(2 if right else 1, int(right), int(right), 1 + right, (confidence, None)[: 1 + right])
        drafts.observe(DraftPlan(exits=1), outcome, machine.step + machine.head, machine.deep, shared=False)

    def drafted(threshold: float, *confidences: float) -> list[bool]:
        chain = drafts.exit_draft(threshold)
        return [chain(Prediction(RIGHT, confidence)) for confidence in confidences]

    assert drafted(0.0, 0.25, 0.25, 0.25) == [True, True, True]
    assert drafted(0.0, 0.25, 0.85) == [True, False]
    assert drafted(0.0, *[0.55] * 4)[-1] is False  # as likely wrong as right: not four times
    assert drafted(0.3, 0.25) == [False]


@each_machine
@pytest.mark.parametrize(
    ("own", "kept", "found"), [(0.6, 0.5, 0.3), (0.3, 0.3, 0.0), (0.1, 0.97, 0.1), (0.02, 0.9, 0.0)]
)
def test_an_exits_own_layers_are_read_by_the_requests_that_they_make_faster(
    name: str, own: float, kept: float, found: float
) -> None:
    """`own`: what its layers cost, of a shallow step."""
    machine = MACHINES[name]
    with_own = machine._replace(step=machine.step * (1 + own))

    def spent(way: bool | None) -> float:
        learned, total = learned_by(machine.costs), 0.0
        saving = learned.acceptance(0.5, False).saving
        for number in range(120):
            exits = saving.next() if way is None else way
            text = Text(found, 0.8, seed=number)
            costs = learned.costs if exits else learned.costs_without_exit
            chances = (0.8, kept) if exits else None
            layers = with_own if exits else machine
            without = learned.costs_without_exit
            request = Request(layers, learned, 50, text, chances, 0.1, number, costs, without_exit=without)
            total += request.spent
        return total

    ways = spent(False), spent(True)
    # What turns at first and tries later cost, of a way that is slower.
    assert spent(None) < min(ways) + 0.1 * (max(ways) - min(ways)) + 0.02 * min(ways)


def test_an_exit_that_saves_a_tenth_is_found_and_kept_although_requests_differ_in_speed() -> None:
    """By up to a factor of 2, by the load of the machine. The share of text that repeats differs, too."""
    machine = MACHINES["int4"]
    learned = learned_by(machine.costs)
    saving = learned.acceptance(0.5, False).saving
    chance = random.Random(5)
    ways = []
    for number in range(100):
        ways.append(saving.next())
        load = chance.uniform(1, 2)
        layers = Machine(*(load * part for part in machine))
        costs, chances = learned.costs_without_exit, None
        if ways[-1]:
            layers, costs, chances = layers._replace(step=3 * layers.step), learned.costs, (0.9, 0.6)
        text = Text(chance.uniform(0, 0.5), 0.8, seed=number)
        without = learned.costs_without_exit
        Request(layers, learned, 60, text, chances, 0.1, number, costs, without_exit=without)
    assert ways[RULE.alternating :].count(False) <= 3


def test_a_draft_is_as_long_as_its_rows_are_worth() -> None:
    """On some processors a pass of two rows costs as much as one, and the third row is expensive."""
    machine = MACHINES["int4"]
    learned = learned_by(machine.costs)
    for rows, seconds in ((1, 3.2), (2, 3.2), (3, 4.7), (4, 4.8)):
        for _ in range(4):
            learned.costs.observe("pass", rows, seconds)
            learned.costs.observe("step", 1, 0.05)
            learned.costs.observe("head", 1, 0.35)
    drafts = Drafts(learned.costs, learned.acceptance(0.5, False))
    chain = drafts.exit_draft(0.0)
    assert [chain(Prediction(RIGHT, 0.25)) for _ in range(2)] == [True, False]
    assert drafts.exit_draft(0.0).extension([0.9, 0.3]) == 1
    assert drafts.exit_draft(0.0).extension([0.9, 0.6, 0.6]) == 3


# An exit beside text


def spent_with_and_without_exit(
    kept: float, taught: float, found: float, right: float, tokens: int, python: float, seed: int
) -> tuple[float, float]:
    """Time of a request with text drafts and an exit, and with text drafts alone, in tokens of mode full.

    Both follow 12 requests in which the exit was right with the chance `taught`. `python` is outside the engines, in ms
    of each step of the exit.
    """
    machine = MACHINES["int4"]
    spent = []
    for exits in ((0.9, kept), None):
        learned = learned_by(machine.costs)
        for number in range(12):
            before = (0.9, taught) if exits else None
            Request(machine, learned, 100, Text(found, right, number), before, seed=number, python=python)
        request = Request(machine, learned, tokens, Text(found, right, seed), exits, seed=seed, python=python)
        spent.append(request.spent / (machine.step + machine.deep + machine.outside))
    return spent[0], spent[1]


@pytest.mark.parametrize("kept", [0.0, 0.4])
@pytest.mark.parametrize(("found", "right"), [(0.0, 0.0), (0.1, 0.6), (0.5, 0.8)])
def test_an_exit_that_fails_in_one_request_loses_little_of_what_text_saves(
    kept: float, found: float, right: float
) -> None:
    """However good it was before: its grant, and the draft that exceeds it. What the text saves is not its to lose."""
    tokens = 200
    grant = RULE.grant + RULE.grant_share * tokens
    pairs = [spent_with_and_without_exit(kept, 0.9, found, right, tokens, 0.4, seed) for seed in range(6)]
    losses = [with_exit - without for with_exit, without in pairs]
    assert sum(losses) / len(losses) < grant + 2
    assert max(losses) < grant + 7


def test_a_stale_price_of_a_token_does_not_shorten_drafts_of_the_exit() -> None:
    """A first token that is slow, for example because memory is bound, raises the price until it is measured again."""
    learned = LearnedDrafts(CallCosts(MACHINES["demo"].costs))
    acceptance = learned.acceptance(0.0, False)
    for kind in ("step", "pass"):
        for _ in range(2):  # the first is not counted
            learned.costs.observe(kind, 1, 4.0)
    drafts = Drafts(learned.costs, acceptance)
    expensive = drafts._token_seconds
    for _ in range(RULE.recent):
        acceptance.observe_pass(4, 2.0)
    for kind in ("step", "pass"):
        for _ in range(100):
            learned.costs.observe(kind, 1, 0.4)
    assert drafts._token_seconds < expensive / 2
    assert drafts._gain / drafts._token_seconds == pytest.approx(2.0)  # tokens per second, as measured
