"""Sources of drafts, against searching all of the text; and the loop that drafts them, on recorded engines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from recording_engine import DEEP_TOKEN, LENGTH, alone, decoded, prompt_of
from test_decode import decoder_of, drafted, full

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding import loops as decode
from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.draft_rule import RULE
from runtime.decoding.draft_sources import (
    GAP,
    LONGEST,
    SHORTEST,
    Candidates,
    DraftSources,
    Expected,
    Own,
    Repetition,
    agreeing,
)
from runtime.decoding.drafts import NO_DRAFT, DraftPlan, Drafts
from runtime.decoding.response import Response
from runtime.errors import OptionError

VOCAB = 4


def measured() -> CallCosts:
    """Costs that know what a token takes, without which nothing is drafted."""
    costs = CallCosts()
    for kind in ("step", "pass"):
        for _ in range(2):
            costs.observe(kind, 1, costs.seconds(kind, 1))
    return costs


class Chosen(Drafts):
    """Lengths of drafts as they are given, over and over: exits, candidates."""

    _gain = 0.0  # a draft's tokens cost nothing

    def __init__(self, sources: DraftSources, plans: list[tuple[int, int]]) -> None:
        super().__init__(measured(), Acceptance(), sources)
        self.turns, self.now = itertools.cycle(plans), plans[0]

    def plan(self, response: Response, most: int, sequences: int = 1) -> DraftPlan:
        self.now = next(self.turns)
        return super().plan(response, most, sequences)

    def _length(self, found: Candidates, count: int) -> int:
        return min(self.now[1], count)

    def _plan_exit(self, most: int) -> DraftPlan:
        length = min(self.now[0], most)
        return DraftPlan(exits=length) if length else NO_DRAFT


tokens = st.integers(0, VOCAB - 1)
texts = st.lists(tokens | st.just(GAP), max_size=80)


def searched(text: list[int], longest: int = LONGEST) -> tuple[int, int]:
    """The latest place after the longest n-gram that the text ends with, by brute force."""
    for size in range(longest, SHORTEST - 1, -1):
        newest = text[-size:]
        if len(newest) < size or GAP in newest:
            continue
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == newest and text[place] != GAP:
                return place, size
    return 0, 0


@given(texts)
def test_the_index_finds_what_a_search_of_all_the_text_finds(text: list[int]) -> None:
    index = Repetition(VOCAB)
    for count, token in enumerate(text, 1):
        index.push([token])
        assert index.repeated() == searched(text[:count])
        for size in range(LONGEST + 1):
            longer = searched(text[:count])
            assert index.repeated(longer_than=size) == (longer if longer[1] > size else (0, 0))


@given(st.lists(tokens, min_size=30, max_size=300))
def test_a_bounded_index_knows_the_newest_half_and_holds_no_more_than_it_may(text: list[int]) -> None:
    index = Repetition(VOCAB, most=20)
    for count, token in enumerate(text, 1):
        index.push([token])
        assert sum(map(len, index._places)) <= 20 * (LONGEST - SHORTEST + 1)
        place, size = index.repeated()
        assert size == 0 or text[place - size : place] == text[count - size : count]
        assert size >= searched(text[:count][-10:])[1]
    assert index.tokens == text


@given(st.lists(tokens, max_size=120), st.lists(st.integers(1, 20)), st.integers(10, 100))
def test_tokens_read_at_once_are_found_like_those_read_one_by_one(
    text: list[int], counts: list[int], most: int
) -> None:
    index = Repetition(VOCAB, most)
    known = Repetition(VOCAB, most)
    rest = iter(text)
    for count in counts:
        new = list(islice(rest, count))
        index.read(new)
        for token in new:
            known.read([token])
        assert index.tokens == known.tokens
        if len(text) < most:
            assert min(index.agrees, LONGEST) == min(known.agrees, LONGEST)
        agreeing = index.tokens[index.place - index.agrees : index.place]
        assert agreeing == index.tokens[len(index.tokens) - index.agrees :]


@given(texts)
def test_repetition_follows_the_longest_match(text: list[int]) -> None:
    sources = DraftSources(VOCAB)
    source = sources._repetition
    read: list[int] = []
    for token in text:
        if token == GAP:
            source.push([token])
            source.agrees = 0
        else:
            source.read([token])
        read.append(token)
        assert min(source.agrees, LONGEST) == searched(read)[1]
        candidates = sources._chain((), 6, Acceptance().rate).tokens
        assert GAP not in candidates
        assert bool(candidates) == bool(source.agrees)
        # What was found really stood there: the tokens that agree, then the candidates.
        whole = [*read[len(read) - source.agrees :], *candidates]
        assert not source.agrees or any(read[at : at + len(whole)] == whole for at in range(len(read)))


def test_an_expected_text_is_followed_over_changes_insertions_and_deletions() -> None:
    expected = list(range(100, 140))
    output = [*expected[:6], 7, *expected[7:12], 8, 9, *expected[12:20], *expected[25:]]
    source, right = Expected(expected), 0
    for token in output:
        right += source.candidates(1) == [token]
        source.read(token)
    # Wrong are the three new tokens, the first one after each change of the length, and what follows the deletion.
    assert right >= len(output) - 7
    assert source.candidates(5) == []
    # It is found again after a long insertion, and stands still for an output that is another.
    source, other = Expected(range(100, 200)), Expected([1, 2, 3])
    for token in [*range(100, 110), *range(1000, 1200), 110, 111]:
        source.read(token)
        other.read(token)
    assert (source.agrees, source.candidates(3)) == (2, [112, 113, 114])
    assert (other.agrees, other.candidates(4)) == (0, [])


@pytest.mark.parametrize(
    "given", [None, 5, "12", b"12", {1: 2}, [1, VOCAB], [-1], [1.0], [True], np.zeros((1, 2), np.int64), [[1]], [2**70]]
)
def test_what_is_no_list_of_token_ids_is_refused_with_its_value(given: Any) -> None:
    with pytest.raises(OptionError, match=r"draft_source returned .*; return a list of token ids"):
        Own(lambda ids: given, VOCAB).candidates([1], 15)
    # Of too many those are used that fit a pass.
    assert Own(lambda ids: [1] * 10_000, VOCAB).candidates([1], 15) == [1] * 15


@pytest.mark.parametrize("given", [[1, 2, VOCAB], (1, 2, "3"), [1, 2, -1], np.array([1, 2, VOCAB])])
def test_ids_that_do_not_fit_a_pass_are_checked_too(given: Any) -> None:
    for most in (0, 1, 2, 3):
        with pytest.raises(OptionError, match=r"draft_source returned .*; return a list of token ids"):
            Own(lambda ids: given, VOCAB).candidates([1], most)


@given(
    plans=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=20),
    right=st.lists(st.booleans(), min_size=1, max_size=LENGTH),
    agrees=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    max_pending=st.integers(1, 8),
    limit=st.integers(1, 40),
)
@tries(50)
def test_drafts_of_every_source_give_the_tokens_of_full_and_leave_only_them_in_the_caches(
    plans: list[tuple[int, int]], right: list[bool], agrees: list[bool], max_pending: int, limit: int
) -> None:
    """Candidates are right at some positions; where none is drafted, exits are."""
    prompt = prompt_of(3)
    whole, _, _ = decoder_of([1.0] * LENGTH, max_pending, agrees=agrees)
    wanted = [step.id for step in islice(full(whole, prompt), limit)]
    decoder, shallow, deep = decoder_of([1.0] * LENGTH, max_pending, agrees=agrees)

    def own(ids: np.ndarray) -> list[int]:
        place = len(ids) - len(prompt)
        return [token if right[at % len(right)] else 1 for at, token in enumerate(wanted[place:], place)]

    drafts = Chosen(DraftSources(DEEP_TOKEN + LENGTH, prompt.tolist(), own=own), plans)
    loop = alone(decoded(decode.lossless, decoder, prompt, limit, 0.5, max_pending, drafts))
    steps = drafted(loop, decoder, shallow, deep, limit, prompt)
    assert [step.id for step in steps] == wanted
    assert max(deep.calls[1:], default=1) <= max_pending
    counted = decoder.stats.drafts
    assert sum(counts.accepted for counts in counted.values()) <= len(steps)
    assert sum(counts.proposed - counts.accepted for counts in counted.values()) == decoder.stats.rejected
    if limit > 2 and max_pending > 1 and all(right) and all(plan[1] for plan in plans):
        assert counted["own"].accepted == counted["own"].proposed > 0


@given(
    confidences=st.lists(st.sampled_from((0.2, 0.9)), min_size=LENGTH, max_size=LENGTH),
    right=st.lists(st.booleans(), min_size=1, max_size=LENGTH),
    agrees=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    max_pending=st.integers(1, 9),
    limit=st.integers(1, 40),
)
@tries(50)
def test_text_after_drafts_of_the_exit_gives_the_tokens_of_full_and_leaves_only_them_in_the_caches(
    confidences: list[float], right: list[bool], agrees: list[bool], max_pending: int, limit: int
) -> None:
    prompt = prompt_of(3)
    whole, _, _ = decoder_of(confidences, max_pending, agrees=agrees)
    wanted = [step.id for step in islice(full(whole, prompt), limit)]
    decoder, shallow, deep = decoder_of(confidences, max_pending, agrees=agrees)
    predicted = [token if right[at % len(right)] else 1 for at, token in enumerate(wanted)]
    drafts = Chosen(DraftSources(DEEP_TOKEN + LENGTH, prompt.tolist(), predicted=predicted), [(100, 0)])
    loop = alone(decoded(decode.lossless, decoder, prompt, limit, 0.5, max_pending, drafts))
    steps = drafted(loop, decoder, shallow, deep, limit, prompt)
    assert [step.id for step in steps] == wanted
    assert max(deep.calls[1:], default=1) <= max_pending
    assert sum(step.exited for step in steps) == decoder.stats.exits
    counted = decoder.stats.drafts
    assert sum(counts.accepted for counts in counted.values()) <= len(steps)
    if all(right) and max_pending > 1:  # then whatever the exit stops at is read after it
        assert decoder.stats.sync_passes <= 2 + limit // max_pending + agrees[:limit].count(False) * 2


def test_a_text_goes_on_after_the_exit() -> None:
    """Sure of two tokens, then not: the expected ones are read in the same pass."""
    trace, prompt = [*[0.9] * 5, *[0.2] * LENGTH], prompt_of(3)
    whole, _, _ = decoder_of(trace, agrees=[True] * LENGTH)
    wanted = [step.id for step in islice(full(whole, prompt), 9)]
    decoder, _, deep = decoder_of(trace, agrees=[True] * LENGTH)
    sources = DraftSources(DEEP_TOKEN + LENGTH, prompt.tolist(), predicted=wanted)
    loop = alone(decoded(decode.lossless, decoder, prompt, 9, 0.5, 16, Chosen(sources, [(100, 0)])))
    steps = list(loop)
    assert [step.id for step in steps] == wanted
    assert deep.calls == [3, 8]
    assert {name: counts.outcomes for name, counts in decoder.stats.drafts.items()} == {
        "exit": {(2, 2): 1},
        "predicted": {(6, 6): 1},
    }


@given(texts, st.lists(tokens, min_size=1, max_size=7))
def test_what_follows_drafted_tokens_is_what_a_search_finds(text: list[int], drafted: list[int]) -> None:
    sources = DraftSources(VOCAB)
    sources._repetition.push(text)
    _, size, found, _ = sources._chain(drafted, 6, Acceptance().rate)
    whole = [*text, *drafted]
    for longest in range(LONGEST, max(size, SHORTEST - 1), -1):
        newest = whole[-longest:]
        if len(newest) == longest and GAP not in newest:
            assert all(text[at - longest : at] != newest or text[at] == GAP for at in range(longest, len(text)))
    if size:
        after = [*whole[len(whole) - size :], *found]
        assert any(text[at : at + len(after)] == after for at in range(len(text)))
    assert GAP not in found


def test_a_draft_is_one_shallow_call_and_one_deep_call() -> None:
    decoder, shallow, deep = decoder_of([1.0] * LENGTH)
    prompt, wanted = prompt_of(3), [DEEP_TOKEN + place for place in range(2, 2 + 17)]
    sources = DraftSources(DEEP_TOKEN + LENGTH, prompt.tolist(), predicted=wanted)
    loop = alone(decoded(decode.lossless, decoder, prompt, 17, 0.5, 16, Chosen(sources, [(0, 7)])))
    assert [step.id for step in loop] == wanted  # type: ignore[union-attr]
    assert shallow.calls == deep.calls == [3, 8, 8]
    assert (shallow.heads[1:], deep.heads[1:]) == ([0, 0], [8, 8])
    assert (decoder.stats.drafts["predicted"].mean_accepted, decoder.stats.exits) == (7.0, 0)


def test_candidates_are_drafted_in_few_numbers() -> None:
    """Calls for each number of rows are bound once."""
    drafts = Drafts(CallCosts(), Acceptance())
    assert {drafts._length(agreeing("lookup", agrees, [0] * n), n) for n in range(1, 16) for agrees in range(10)} <= {
        0,
        *RULE.lengths,
    }


def searches(drafts: Drafts, ids: Iterable[int], seconds: float) -> Iterator[tuple[bool, DraftPlan]]:
    """Plan at each token, and yield whether the text was searched, which takes `seconds`, and the plan."""
    response = Response(np.array([1]), 5000)
    now = itertools.count(0.0, seconds)
    drafts.clock = lambda: next(now)  # type: ignore[method-assign]
    for token in ids:
        response.add(token, False, None)
        drafts._looked = False
        plan = drafts.plan(response, 15)
        yield drafts._looked, plan


@given(cost=st.floats(1e-4, 0.08))
@tries(20)
def test_where_nothing_repeats_searching_costs_the_time_of_two_tokens_and_half_a_percent(cost: float) -> None:
    """Requests share what they learned, so only the first ones cost the two tokens."""
    acceptance = Acceptance()
    costs = measured()
    count = 0
    for _ in range(4):
        drafts = Drafts(costs, acceptance, DraftSources(10_000), exits=False)
        count += sum(looked for looked, _ in searches(drafts, range(500), cost * drafts._token_seconds))
    assert count * cost <= 2 + 2000 * RULE.search_share


def test_a_text_that_begins_to_repeat_is_soon_searched_at_every_token() -> None:
    costs = measured()
    drafts = Drafts(costs, Acceptance(), DraftSources(10_000), exits=False)
    found = searches(drafts, [*range(300), *range(100, 200)], 0.1 * drafts._token_seconds)
    before = [looked for looked, _ in islice(found, 300)]
    assert sum(before[-100:]) < 10
    after = [bool(plan.tokens) for _, plan in found]
    assert after.index(True) <= RULE.longest_rest
    assert all(after[RULE.longest_rest :])


@given(rest=st.integers(0, 30), at_once=st.booleans(), exits=st.booleans())
@tries(20)
def test_tokens_without_a_search_are_those_of_full(rest: int, at_once: bool, exits: bool) -> None:
    """A request that may draft from the exit plans them, too."""
    decoder, _, _ = decoder_of([0.0] * LENGTH)
    whole, _, _ = decoder_of([0.0] * LENGTH)
    decoder.alone = at_once
    drafts = Drafts(measured(), Acceptance(), DraftSources(10_000), exits)
    drafts.rest = rest
    planned = list[bool]()
    plan = drafts.plan

    def counted(*args: Any) -> DraftPlan:
        planned.append(True)
        return plan(*args)

    drafts.plan = counted  # type: ignore[method-assign]
    steps = list(islice(alone(decoded(decode.lossless, decoder, prompt_of(3), 20, 0.5, 16, drafts)), 20))
    assert [step.id for step in steps] == [step.id for step in islice(full(whole, prompt_of(3)), 20)]
    if at_once and not exits:
        assert len(planned) <= max(0, 19 - rest)
    else:
        assert planned


def test_searches_that_pay_do_not_rest() -> None:
    acceptance = Acceptance()
    drafts = Drafts(measured(), acceptance, DraftSources(10_000), exits=False)
    seconds = 0.1 * drafts._token_seconds
    for _ in range(RULE.recent):  # one draft of five in ten searches
        for _ in range(9):
            acceptance.search_saved.observe(0.0)
        acceptance.search_saved.observe(4.0)
    assert all(looked for looked, _ in islice(searches(drafts, range(30), seconds), 30))
