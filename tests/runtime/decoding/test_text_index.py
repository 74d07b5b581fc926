"""Indexes of n-grams against counting all texts, and the memory of outputs: its users, its limit and its time."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from runtime.decoding.text_index import LEVELS, LONGEST, MAX_TOKENS, ORDERS, TextIndex, TextMemory

VOCAB = 4
MB = 1_000_000
tokens = st.integers(0, VOCAB - 1)
texts = st.lists(st.lists(tokens, max_size=30), max_size=8)


def followers(texts: list[list[int]], newest: list[int]) -> tuple[int, list[int]]:
    """Return the longest n-gram that ends `newest`, as a place in ORDERS, and what followed it in texts, in order."""
    for number, order in reversed([*enumerate(ORDERS)]):
        found = [
            text[place]
            for text in texts
            for place in range(order, len(text))
            if len(newest) >= order and text[place - order : place] == newest[-order:]
        ]
        if found:
            return number, found
    return 0, []


def always_led(found: list[int]) -> bool:
    """Return True if the first token was, at each place, more than half of the tokens until there."""
    return all(2 * found[:count].count(found[0]) > count for count in range(1, len(found) + 1))


@given(texts, st.lists(tokens, max_size=9))
def test_index_predicts_the_token_after_the_longest_repeated_phrase(texts: list[list[int]], newest: list[int]) -> None:
    index = TextIndex(VOCAB)
    for text in texts:
        index.start()
        index.add(text)
    expected = index.expected(index.encode(newest))
    number, found = followers(texts, newest)
    if not found:
        assert expected is None
        return
    assert expected is not None
    assert expected.token in found
    assert expected.level // LEVELS == number
    if always_led(found):
        count = found.count(found[0])
        assert expected.token == found[0]
        assert expected.level % LEVELS == LEVELS * count // (len(found) + 1)


def test_index_is_nearly_as_accurate_as_exact_counts() -> None:
    """It holds one token for each phrase, so it cannot always return the most frequent one."""
    chance = random.Random(0)
    index = TextIndex(100)
    index.start()
    counts: dict[int, Counter[int]] = {}
    token = right = best = 0
    for _ in range(20_000):
        following = (7 * token + min(int(chance.expovariate(0.8)), 9)) % 100
        expected = index.expected(index.encode([token]))
        right += expected is not None and expected.token == following
        seen = counts.setdefault(token, Counter())
        best += bool(seen) and seen.most_common(1)[0][0] == following
        seen[following] += 1
        index.add([following])
        token = following
    assert right > 0.9 * best


@given(st.lists(tokens, max_size=40), st.lists(st.integers(1, 9)))
def test_text_can_be_added_in_parts(text: list[int], sizes: list[int]) -> None:
    whole = TextIndex(VOCAB)
    whole.add(text)
    parts = TextIndex(VOCAB)
    rest = list(text)
    for size in [*sizes, len(text)]:
        parts.add(rest[:size])
        rest = rest[size:]
    assert parts.used == whole.used
    for end in range(len(text) + 1):
        newest = whole.encode(text[:end])
        assert parts.expected(newest) == whole.expected(newest)


def test_counts_of_a_frequent_phrase_fit_a_byte() -> None:
    index = TextIndex(VOCAB)
    index.add([0, 1] * 1000)
    index.add([0, 2] * 100)
    expected = index.expected(index.encode([0]))
    assert expected is not None
    assert expected.token == 1


# Memory of outputs


def test_start_of_an_output_is_predicted_after_the_end_of_its_prompt() -> None:
    memory = TextMemory(VOCAB, MB)
    index = TextIndex(VOCAB)
    memory.keep(None, [3, 3, 3, 0, 1], [2, 3])
    found = memory.expected(None, index.encode([3, 0, 1]))
    assert found is not None
    assert found.token == 2
    assert memory.expected(None, index.encode([0])) is None  # the prompt itself is not remembered


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.lists(tokens, min_size=1, max_size=30)), max_size=20),
    st.integers(5_000, 80_000),
    st.lists(tokens, max_size=9),
)
@tries(50)
def test_memory_predicts_only_from_outputs_of_the_same_user(
    kept: list[tuple[str | None, list[int]]], limit: int, newest: list[int]
) -> None:
    """Also after older outputs were dropped."""
    memory = TextMemory(VOCAB, limit)
    encode = TextIndex(VOCAB).encode
    for salt, text in kept:
        memory.keep(salt, [], text)
        assert 0 <= memory.used <= limit
    for salt in ("a", "b", None):
        expected = memory.expected(salt, encode(newest))
        if expected is not None:
            size = ORDERS[expected.level // LEVELS]
            own = [text for user, text in kept if user == salt]
            wanted = [*newest[-size:], expected.token]
            assert any(text[at : at + size + 1] == wanted for text in own for at in range(len(text)))


def test_most_frequent_continuation_is_preferred_to_the_newest() -> None:
    memory = TextMemory(100, MB)
    for text in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 9, 9]):
        memory.keep(None, [], text)
    found = memory.expected(None, TextIndex(100).encode([1, 2, 3]))
    assert found is not None
    assert found.token == 4


def test_oldest_outputs_are_replaced_first() -> None:
    memory = TextMemory(1 << 16, MB)
    encode = TextIndex(1 << 16).encode
    outputs = [list(range(number, number + 50)) for number in range(0, 50_000, 50)]
    for output in outputs:
        memory.keep(None, [], output)
    found = [memory.expected(None, encode(output[:LONGEST])) is not None for output in outputs]
    assert found == sorted(found)  # the newest ones
    assert 20 < sum(found) < 500


def test_only_the_newest_tokens_of_a_long_output_are_remembered() -> None:
    memory = TextMemory(1 << 16, 32 * MB)
    encode = TextIndex(1 << 16).encode
    output = list(range(MAX_TOKENS + 100))
    memory.keep(None, [], output)
    assert memory.expected(None, encode(output[:99])) is None
    assert memory.expected(None, encode(output[:100])) is not None


@pytest.mark.parametrize(("vocab", "users"), [(8, 1), (300, 1), (100_000, 1), (300, 500)])
def test_memory_limit_bounds_python_allocations(vocab: int, users: int) -> None:
    chance = random.Random(vocab)
    limit = MB // 4
    outputs = [
        (f"user {chance.randrange(users)}", [chance.randrange(vocab) for _ in range(chance.randrange(1, 100))])
        for _ in range(150)
    ]
    tracemalloc.start()
    try:
        memory = TextMemory(vocab, limit)
        for salt, output in outputs:
            memory.keep(salt, [], output)
            assert tracemalloc.get_traced_memory()[0] <= memory.used + 2000  # the memory object itself
            assert memory.used <= limit
        allocated = tracemalloc.get_traced_memory()[0]
        memory.forget()
        assert memory.used == 0
        assert tracemalloc.get_traced_memory()[0] < 10_000
    finally:
        tracemalloc.stop()
    assert vocab == 8 or allocated > limit / 5  # the bound is not far off


@pytest.mark.parametrize("limit", [0, 1000, 10_000])
def test_limit_below_a_few_tokens_is_kept(limit: int) -> None:
    memory = TextMemory(100, limit)
    memory.keep(None, [], list(range(100)))
    memory.keep("x" * limit, [], list(range(100)))
    assert memory.used <= limit


@pytest.mark.parametrize("users", [1, 10**9])
def test_dropping_an_output_takes_constant_time(users: int) -> None:
    chance = random.Random(0)
    memory = TextMemory(1 << 16, MB)
    seconds = []
    for _ in range(4):
        began = process_time()
        for _ in range(500):
            memory.keep(str(chance.randrange(users)), [], [chance.randrange(1 << 16) for _ in range(20)])
        seconds.append(process_time() - began)
    assert min(seconds[2:]) < 3 * min(seconds[:2])
