"""The store of prefixes beside a slow model of it: bound, order of eviction, and what is found."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from profiles import tries

from runtime.engines.prefix_store import PrefixStore, hashes

# Few tokens, so that chains often begin alike; a chain of the machine below is what a text was read as, block by block.
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
SIZES = st.integers(1, 4)

Text = tuple[int, ...]


def chain_of(text: Text) -> list[bytes]:
    return [repr(text[: end + 1]).encode() for end in range(len(text))]


class Ledger(RuleBasedStateMachine):
    """`stored`: text -> its entry, its size, and when it was used last; what is longer counts as used before."""

    @initialize(limit=st.integers(0, 12))
    def begin(self, limit: int) -> None:
        self.store = PrefixStore(limit)
        self.limit, self.now = limit, 0
        self.stored: dict[Text, tuple[object, int, int]] = {}

    @rule(text=TEXTS, size=SIZES)
    def keep(self, text: Text, size: int) -> None:
        made: list[int] = []
        entries = [object() for _ in text]

        def make(number: int) -> object:
            made.append(number)
            return entries[number]

        self.store.keep(chain_of(text), make, size)
        expected = []
        for number in range(len(text)):
            begin = text[: number + 1]
            if begin in self.stored:
                continue
            others = sorted(
                (key for key in self.stored if text[: len(key)] != key), key=lambda key: self.stored[key][2]
            )
            while sum(each for _, each, _ in self.stored.values()) + size > self.limit and others:
                del self.stored[others.pop(0)]
            if sum(each for _, each, _ in self.stored.values()) + size > self.limit:
                break
            self.stored[begin] = entries[number], size, 0
            expected.append(number)
        assert made == expected
        self._use(text)

    @rule(text=TEXTS)
    def find(self, text: Text) -> None:
        expected = []
        while len(expected) < len(text) and text[: len(expected) + 1] in self.stored:
            expected.append(self.stored[text[: len(expected) + 1]][0])
        found = self.store.find(chain_of(text))
        assert len(found) == len(expected)
        assert all(one is other for one, other in zip(found, expected, strict=True))
        self._use(text[: len(found)])

    def _use(self, text: Text) -> None:
        for end in range(len(text), 0, -1):
            if text[:end] in self.stored:
                entry, size, _ = self.stored[text[:end]]
                self.now += 1
                self.stored[text[:end]] = entry, size, self.now

    @invariant()
    def it_holds_what_the_ledger_does_within_the_limit(self) -> None:
        assert self.store.used == sum(size for _, size, _ in self.stored.values()) <= self.limit
        assert len(self.store) == len(self.stored)

    @invariant()
    def nothing_is_stored_without_its_beginning(self) -> None:
        assert all(len(text) == 1 or text[:-1] in self.stored for text in self.stored)


Ledger.TestCase.settings = tries(60, stateful_step_count=30)
TestLedger = Ledger.TestCase


def test_entry_whose_creation_fails_is_not_counted() -> None:
    store = PrefixStore(10)
    with suppress(ZeroDivisionError):
        store.keep([b"a", b"b"], lambda number: 1 // (1 - number), 4)
    assert (store.used, len(store), store.find([b"a", b"b"])) == (4, 1, [1])


SALTS = st.one_of(st.none(), st.sampled_from(["a", "None", "\udc80", "0"]))
TOKENS = st.lists(st.integers(0, 1), max_size=12)


@given(TOKENS, TOKENS, SALTS, SALTS, st.booleans(), st.booleans())
def test_keys_are_equal_exactly_if_tokens_salt_and_exit_layers_are(
    one: list[int], other: list[int], salt: str | None, salt2: str | None, exits: bool, exits2: bool
) -> None:
    block = 3
    ours = hashes(np.array(one, np.int64), block, salt, exits)
    theirs = hashes(np.array(other, np.int64), block, salt2, exits2)
    assert len(ours) == len(one) // block
    for place, key in enumerate(ours):
        for place2, key2 in enumerate(theirs):
            end, end2 = (place + 1) * block, (place2 + 1) * block
            alike = (one[:end], salt, exits) == (other[:end2], salt2, exits2)
            assert (key == key2) == alike
