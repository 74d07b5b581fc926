"""The memory of outputs, against counting all of the texts that it should hold."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from runtime.decoding.draft_acceptance import Acceptance
from runtime.decoding.draft_memory import LEVELS, MOST_BYTES, ORDERS, TextMemory
from runtime.decoding.draft_sources import DraftSources

VOCAB = 4
tokens = st.integers(0, VOCAB - 1)
texts = st.lists(tokens, max_size=30)
MB = 1_000_000


def counted(memory: TextMemory, texts: list[list[int]], newest: list[int]) -> tuple[set[int], int] | None:
    """The most frequent tokens after the longest n-gram, and the level of their share, by brute force."""
    for number, order in reversed([*enumerate(ORDERS)]):
        if order > len(newest):
            continue
        found = Counter(
            text[place]
            for text in texts
            for place in range(order, len(text))
            if text[place - order : place] == newest[-order:]
        )
        if found:
            most = max(found.values())
            share = LEVELS * most // (found.total() + 1)
            return {token for token, count in found.items() if count == most}, number * LEVELS + share
    return None


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), texts), max_size=12), st.integers(30, 40))
@tries(30)
def test_it_expects_what_followed_most_often_in_the_texts_of_the_same_user(
    kept: list[tuple[str | None, list[int]]], room: int
) -> None:
    """Also after old texts were dropped, whole and in order; and the limit always holds."""
    memory = TextMemory(VOCAB, 2500 + room * MOST_BYTES)
    held = deque[tuple[str | None, list[int]]]()
    for salt, text in kept:
        memory.keep(salt, [], text)
        assert memory.used <= memory.limit
        if text:
            held.append((salt, text))
        while len(held) > len(memory):
            held.popleft()
    for salt in ("a", "b", None):
        own = [text for user, text in held if user == salt]
        for newest in ([], [0], [1, 0], [0, 1, 2, 3], [1, 1, 1, 1]):
            found = memory.expected(salt, newest)
            wanted = counted(memory, own, newest)
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                assert found.token in wanted[0]
                assert found.level == wanted[1]


def test_nothing_of_dropped_texts_is_left() -> None:
    memory = TextMemory(1000, 1 * MB)
    chance = random.Random(0)
    for _ in range(60):
        memory.keep(chance.choice("abc"), [], [chance.randrange(1000) for _ in range(chance.randrange(200))])
        assert memory.used <= memory.limit
    assert 1 < len(memory) < 60
    while len(memory):
        memory._drop_oldest()
    assert memory.used == 0
    assert memory._indexes == {}


@pytest.mark.parametrize("vocab", [8, 300, 100_000])
def test_the_limit_bounds_what_python_allocates(vocab: int) -> None:
    chance = random.Random(vocab)
    memory = TextMemory(vocab, MB)
    tracemalloc.start()
    try:
        for _ in range(20):
            memory.keep(None, [], [chance.randrange(vocab) for _ in range(200)])
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert allocated <= memory.used <= memory.limit
    assert vocab == 8 or memory.used < 2.5 * allocated


def test_the_start_of_an_output_is_expected_after_the_end_of_its_prompt() -> None:
    memory = TextMemory(VOCAB, MB)
    memory.keep(None, [3, 3, 3, 0, 1], [2, 3])
    found = memory.expected(None, [3, 0, 1])
    assert found is not None
    assert found.token == 2
    assert memory.expected(None, [0]) is None  # the prompt itself is not counted


def test_the_most_frequent_continuation_is_drafted_not_the_latest() -> None:
    memory = TextMemory(100, MB)
    for text in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 9, 9]):
        memory.keep(None, [], text)
    memory.keep("other", [], [1, 2, 3, 7, 7] * 9)
    sources = DraftSources(100, [1, 2, 3], memory=memory)
    (found,) = sources.found(15, Acceptance().rate)
    assert (found.source, found.tokens) == ("memory", [4, 5])


def test_a_longer_repetition_of_the_request_itself_is_drafted_instead() -> None:
    memory = TextMemory(100, MB)
    memory.keep(None, [], [50, 3, 4, 60, 3, 7])
    sources = DraftSources(100, [*range(10), *range(4)], memory=memory)
    (found,) = sources.found(4, Acceptance().rate)
    assert (found.source, found.agrees, found.tokens) == ("lookup", 4, [4, 5, 6, 7])


@given(texts, texts, st.integers(1, 15))
def test_candidates_of_a_user_do_not_depend_on_texts_of_others(prompt: list[int], text: list[int], most: int) -> None:
    alone, shared = (TextMemory(VOCAB, MB) for _ in range(2))
    for memory in (alone, shared):
        memory.keep("a", [], prompt[::-1])
    shared.keep("b", [], text)
    shared.keep(None, [], text)
    found = [
        [*DraftSources(VOCAB, prompt, memory=memory, salt="a").found(most, Acceptance().rate)]
        for memory in (alone, shared)
    ]
    assert found[0] == found[1]
    assert len(found[0][0].tokens) <= most
