"""Sources of drafts: what each proposes, and the error for a caller's source that returns something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from draft_plans import PlannedDrafts
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries
from recording_engine import DEEP_TOKEN, LENGTH, alone, decoded, prompt_of
from test_decode import decoder_of, drafted, full

from runtime.decoding.acceptance import Acceptance
from runtime.decoding.draft_sources import MAX_CHECKED, MAX_INDEXED, MIN_REACH, Own, Predicted, Proposal, TextSource
from runtime.decoding.loops import Policy
from runtime.decoding.phrases import PhraseTable
from runtime.decoding.text_index import TextMemory
from runtime.errors import OptionError

VOCAB = 4
MB = 1_000_000
tokens = st.integers(0, VOCAB - 1)
texts = st.lists(tokens, max_size=40)


def proposed(source: Any, drafted: Sequence[int] = (), max_tokens: int = 15) -> list[int]:
    """Return the tokens of a proposal, after checking that it fits its tokens."""
    found: Proposal = source.propose(drafted, max_tokens)
    assert len(found.tokens) == len(found.probabilities) == len(found.evidence) <= max_tokens
    assert all(0 <= probability <= 1 for probability in found.probabilities)
    return found.tokens


# TextSource


@given(texts, texts, texts, texts, st.integers(1, 15))
def test_text_proposals_do_not_depend_on_how_tokens_arrive(
    prompt: list[int], output: list[int], drafted: list[int], remembered: list[int], max_tokens: int
) -> None:
    memory = TextMemory(VOCAB, MB)
    memory.keep("a", [], remembered)
    sources = [
        TextSource(Acceptance(), VOCAB, [prompt], memory, "a", [PhraseTable.build([remembered])]) for _ in range(2)
    ]
    sources[0].follow(output)
    for token in output:
        sources[1].follow([token])
    found = proposed(sources[0], drafted, max_tokens)
    assert found == proposed(sources[1], drafted, max_tokens)
    # Each token followed the one before it in some text.
    before = [*prompt, *output, *drafted][-1:]
    for token in found:
        pair = [*before, token]
        places = ([*prompt, *output], remembered)
        assert not before or any(text[at : at + 2] == pair for text in places for at in range(len(text)))
        before = [token]


def test_repeated_text_is_proposed_until_it_becomes_unlikely() -> None:
    acceptance = Acceptance()
    source = TextSource(acceptance, 1000, [[*range(100), *range(8)]])
    found = source.propose((), 90)
    assert found.source == "lookup"
    assert found.tokens == list(range(8, 8 + len(found.tokens)))
    assert np.prod(found.probabilities) <= MIN_REACH < np.prod(found.probabilities[:-1])
    for _ in range(50):  # now such tokens are known to be accepted
        for evidence in found.evidence:
            acceptance.of(evidence).observe(1.0)
    assert proposed(source, max_tokens=90) == list(range(8, 98))
    assert proposed(source, drafted=[8, 9, 10], max_tokens=5) == [11, 12, 13, 14, 15]


def test_source_with_the_higher_acceptance_rate_continues() -> None:
    acceptance = Acceptance()
    memory = TextMemory(100, MB)
    memory.keep(None, [], [1, 2, 3, 4, 50, 51, 52])
    source = TextSource(acceptance, 100, [[1, 2, 3, 4, 60, 61, 62, 1, 2, 3, 4]], memory)
    first, second = (source.propose((), 1) for _ in range(2))
    assert first == second
    for _ in range(30):
        acceptance.of(first.evidence[0]).observe(0.0)
    other = source.propose((), 1)
    assert {first.source, other.source} == {"lookup", "memory"}
    assert {first.tokens[0], other.tokens[0]} == {50, 60}


def test_phrase_table_is_used_if_request_and_memory_have_no_match() -> None:
    memory = TextMemory(100, MB)
    memory.keep(None, [], [1, 2, 3, 4] * 3)
    table = PhraseTable.build([[7, 8, 9, 10]] * 3 + [[3, 30]])
    found = TextSource(Acceptance(), 100, [[5, 7]], memory, phrases=[table]).propose((), 8)
    assert (found.source, found.tokens) == ("phrases", [8, 9, 10])
    found = TextSource(Acceptance(), 100, [[2, 3]], memory, phrases=[table]).propose((), 1)
    assert (found.source, found.tokens) == ("memory", [4])


@given(texts, texts, st.integers(1, 15))
def test_proposals_for_a_user_do_not_depend_on_outputs_of_others(
    prompt: list[int], text: list[int], max_tokens: int
) -> None:
    alone, shared = (TextMemory(VOCAB, MB) for _ in range(2))
    for memory in (alone, shared):
        memory.keep("a", [], prompt[::-1])
    shared.keep("b", [], text)
    shared.keep(None, [], text)
    found = [
        TextSource(Acceptance(), VOCAB, [prompt], memory, "a").propose((), max_tokens) for memory in (alone, shared)
    ]
    assert found[0] == found[1]


def test_only_the_newest_tokens_of_a_long_text_are_indexed() -> None:
    text = list(range(3 * MAX_INDEXED))
    source = TextSource(Acceptance(), 1 << 16, [text[: 2 * MAX_INDEXED]])
    source.follow(text[2 * MAX_INDEXED :])
    assert proposed(source, text[-100:-50], 3) == text[-50:-47]
    assert proposed(source, text[-MAX_INDEXED // 2 : -MAX_INDEXED // 2 + 20], 1)
    assert proposed(source, text[100:110], 1) == []


# A predicted output


def test_predicted_output_is_realigned_after_changes_insertions_and_deletions() -> None:
    predicted = list(range(100, 140))
    output = [*predicted[:6], 7, *predicted[7:12], 8, 9, *predicted[12:20], *predicted[25:]]
    source = Predicted(Acceptance(), predicted)
    right = 0
    for token in output:
        right += proposed(source, max_tokens=1) == [token]
        source.follow([token])
    # Wrong are the three new tokens, the first one after each change of the length, and the one after the deletion.
    assert right >= len(output) - 7
    assert proposed(source) == []
    # It is found again after a long insertion. It proposes its start for an output that is another.
    source = Predicted(Acceptance(), range(100, 200))
    source.follow([*range(100, 110), *range(1000, 1200)])
    assert proposed(source, drafted=[110, 111], max_tokens=3) == [112, 113, 114]
    source.follow([110, 111])
    assert proposed(source, max_tokens=3) == [112, 113, 114]


def test_unrelated_predicted_output_is_considered_unlikely() -> None:
    acceptance = Acceptance()
    source = Predicted(acceptance, [1, 2, 3])
    source.follow(range(10, 200))
    assert proposed(source, max_tokens=4) == []
    source = Predicted(acceptance, range(100))
    likely = source.propose((), 1).probabilities[0]
    source.follow([0, 1, 2])
    assert source.propose((), 1).probabilities[0] > likely


# The caller's source


def own(returned: Any) -> Own:
    return Own(Acceptance(), lambda ids: returned, [1], VOCAB)


@pytest.mark.parametrize(
    "returned",
    [
        *(None, 5, "12", b"12", {1: 2}, [1, VOCAB], [-1], [1.0], [True], np.zeros((1, 2), np.int64), [[1]], [2**70]),
        *((None, [0.5]), ([VOCAB], [0.5]), ("1", [0.5]), ([1], [0.5], [2])),
    ],
    ids=repr,
)
def test_draft_source_returning_other_than_token_ids_is_refused_with_the_value(returned: Any) -> None:
    with pytest.raises(OptionError, match=r"draft_source returned .*; return a list of token ids"):
        own(returned).propose((), 15)


@pytest.mark.parametrize("returned", [[1, 2, VOCAB], (1, 2, "3"), [1, 2, -1], np.array([1, 2, VOCAB])], ids=repr)
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_token_ids_beyond_the_pass_limit_are_validated_too(returned: Any, max_tokens: int) -> None:
    with pytest.raises(OptionError, match=r"draft_source returned .*; return a list of token ids"):
        own(returned).propose((), max_tokens)


@pytest.mark.parametrize(
    "probabilities",
    [
        *([0.5], [], 0.5, "ab", [0.5, 1.1], [0.5, -0.1], [0.5, float("nan")], [0.5, None], [0.5, "1"], [0.5, True]),
        *(np.array([0.5, 2.0]), np.full((1, 2), 0.5), {0: 0.5, 1: 0.5}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("max_tokens", [1, 15])
def test_invalid_probabilities_are_refused_with_their_value(probabilities: Any, max_tokens: int) -> None:
    with pytest.raises(OptionError, match=r"draft_source returned probabilities .*; return one from 0 to 1 for each"):
        own(([1, 2], probabilities)).propose((), max_tokens)


@pytest.mark.parametrize(
    "returned", [[2] * 10_000, ([2] * 10_000, [0.5] * 10_000), np.full(1000, 2), [*[2] * MAX_CHECKED, "not checked"]]
)
def test_proposals_are_truncated_to_the_pass_limit(returned: Any) -> None:
    assert proposed(own(returned)) == [2] * 15


@pytest.mark.parametrize("returned", [[], (), np.array([]), ([], []), ([], [0.5]), (np.array([], int), np.array([]))])
def test_draft_source_can_return_nothing(returned: Any) -> None:
    assert proposed(own(returned)) == []


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_probabilities_of_a_draft_source_are_corrected_by_acceptance(kind: Callable[[Any], Any]) -> None:
    acceptance = Acceptance()
    source = Own(acceptance, lambda ids: (kind([1, 2, 1]), kind([0.9, 0.3, 0.92])), [1], VOCAB)
    found = source.propose((), 15)
    assert found.tokens == [1, 2, 1]
    assert found.probabilities == pytest.approx([0.9, 0.3, 0.9], abs=0.06)
    for _ in range(30):
        acceptance.of(found.evidence[0]).observe(0.0)
    first, second, third = source.propose((), 15).probabilities
    assert first == third < 0.2 < second


def test_pair_of_token_ids_is_not_read_as_tokens_with_probabilities() -> None:
    assert proposed(own((1, 2))) == [1, 2]
    assert proposed(own((np.int64(1), np.int64(0)))) == [1, 0]


def test_draft_source_receives_final_and_drafted_tokens() -> None:
    read = list[list[int]]()
    source = Own(Acceptance(), lambda ids: read.append(ids.tolist()) or [], [1, 2], VOCAB)
    source.propose((), 5)
    source.follow([3])
    source.propose([0, 1], 5)
    assert read == [[1, 2], [1, 2, 3, 0, 1]]


# Through the loop


@given(
    plans=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), min_size=1, max_size=20),
    right=st.lists(st.booleans(), min_size=1, max_size=LENGTH),
    trace=st.lists(st.sampled_from((0.2, 0.9)), min_size=LENGTH, max_size=LENGTH),
    agrees=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    max_pending=st.integers(1, 9),
    limit=st.integers(1, 40),
    kind=st.sampled_from(["own", "predicted"]),
)
@tries(80)
def test_drafts_from_text_and_exit_give_the_tokens_of_full(
    plans: list[tuple[int, int]],
    right: list[bool],
    trace: list[float],
    agrees: list[bool],
    max_pending: int,
    limit: int,
    kind: str,
) -> None:
    """TextSource are right at some positions, and continue drafts of the exit."""
    prompt = prompt_of(3)
    whole, _, _ = decoder_of(trace, max_pending, agrees=agrees)
    wanted = [step.id for _, step in zip(range(limit), full(whole, prompt), strict=False)]
    text = [token if right[at % len(right)] else 1 for at, token in enumerate(wanted)]
    acceptance = Acceptance()
    source: Any = Predicted(acceptance, text)
    if kind == "own":
        source = Own(acceptance, lambda ids: text[len(ids) - 3 :], prompt.tolist(), DEEP_TOKEN + LENGTH)
    decoder, shallow, deep = decoder_of(trace, max_pending, agrees=agrees)
    drafts = PlannedDrafts(*plans, sources=[source], acceptance=acceptance)
    loop = alone(decoded(decoder, prompt, limit, drafts, Policy(max_pending=max_pending)))
    steps = drafted(loop, decoder, shallow, deep, prompt)
    assert [step.id for step in steps] == wanted
    assert max(deep.calls[1:], default=1) <= max_pending
    counted = decoder.stats.drafts
    assert sum(counts.accepted for counts in counted.values()) <= len(steps)
    assert sum(step.exited for step in steps) == decoder.stats.exits
    if limit > 2 and max_pending > 1 and all(right) and all(text for text, _ in plans):
        assert counted[kind].accepted == counted[kind].proposed > 0


@pytest.mark.parametrize("exits", [0, 2])
def test_text_extends_an_exit_draft_in_the_same_pass(exits: int) -> None:
    """The exit is confident of some tokens, then not. The text goes on to the end of the request."""
    trace = [*[0.9] * (3 + exits), *[0.2] * LENGTH]
    prompt = prompt_of(3)
    whole, _, _ = decoder_of(trace, agrees=[True] * LENGTH)
    wanted = [step.id for _, step in zip(range(9), full(whole, prompt), strict=False)]
    decoder, _, deep = decoder_of(trace, agrees=[True] * LENGTH)
    acceptance = Acceptance()
    drafts = PlannedDrafts((0, 100), sources=[Predicted(acceptance, wanted)], acceptance=acceptance)
    steps = list(alone(decoded(decoder, prompt, 9, drafts)))
    assert [step.id for step in steps] == wanted
    assert deep.calls == [3, 8]
    counts = {name: (counts.proposed, counts.accepted) for name, counts in decoder.stats.drafts.items()}
    assert counts.pop("exit", (0, 0)) == (exits, exits)
    assert counts == {"predicted": (8 - exits, 8 - exits)}


def test_text_draft_takes_one_shallow_and_one_deep_call() -> None:
    decoder, shallow, deep = decoder_of([1.0] * LENGTH)
    prompt = prompt_of(3)
    wanted = [DEEP_TOKEN + place for place in range(2, 2 + 17)]
    acceptance = Acceptance()
    drafts = PlannedDrafts((7, 0), sources=[Predicted(acceptance, wanted)], acceptance=acceptance)
    assert [step.id for step in alone(decoded(decoder, prompt, 17, drafts))] == wanted
    assert shallow.calls == deep.calls == [3, 8, 8]
    assert (shallow.heads[1:], deep.heads[1:]) == ([0, 0], [8, 8])
    assert (decoder.stats.drafts["predicted"].mean_accepted, decoder.stats.exits) == (7.0, 0)
