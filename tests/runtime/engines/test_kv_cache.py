"""Caches of decoders and cross-attention while sequences come and go, and memory that closed sessions left."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from manifest_case import MANIFEST
from profiles import tries

from runtime.engines.kv_cache import CROSS_STEP, MAX_DOUBLED, MIN_DOUBLED, CrossCache, KVCache, check_memory
from runtime.errors import CapacityError

LAYERS, KV_HEADS, HEAD_DIM = range(2, 4), 2, 3
SLOTS = st.integers(0, 2)


def cache_of(rows: int = 8, slots: int = 3) -> KVCache:
    return KVCache(LAYERS, slots, KV_HEADS, rows, HEAD_DIM, np.float32)


class Ledger(RuleBasedStateMachine):
    """A cache beside a list a slot of what was written at each position."""

    @initialize(rows=st.integers(1, 12))
    def begin(self, rows: int) -> None:
        self.cache = cache_of(rows)
        self.expected: list[list[float]] = [[], [], []]
        self.written = 0.0

    @rule(slot=SLOTS, count=st.integers(0, 5))
    def extend(self, slot: int, count: int) -> None:
        """As an engine does: rows behind the valid ones are written first, then counted."""
        length = len(self.expected[slot])
        fits = length + count <= self.cache.rows
        new = [self.written + step for step in range(min(count, self.cache.rows - length))]
        for _, view in self.cache.slot(slot):
            view[0, :, length : length + len(new)] = np.array(new, np.float32)[:, None]
        self.written += count
        if fits:
            self.cache.extend(slot, count)
            self.expected[slot] += new
        else:
            with pytest.raises(CapacityError, match=f"{length + count} positions .* {self.cache.rows} rows"):
                self.cache.extend(slot, count)

    @rule(slot=SLOTS, length=st.integers(0, 14))
    def trim(self, slot: int, length: int) -> None:
        self.cache.trim(slot, length)
        del self.expected[slot][length:]

    @rule(source=SLOTS, copy=SLOTS)
    def copy_rows(self, source: int, copy: int) -> None:
        self.cache.copy_rows(source, copy)
        self.expected[copy] = list(self.expected[source])

    @rule(source=SLOTS, copy=SLOTS, first=st.integers(0, 8), count=st.integers(1, 4))
    def read_and_write(self, source: int, copy: int, first: int, count: int) -> None:
        """Valid rows of one slot become the last of another, which holds those before them."""
        if first + count > len(self.expected[source]) or first > len(self.expected[copy]):
            return
        rows = self.cache.read(source, first, count, own=False)
        assert rows.nbytes == count * self.cache.row_bytes(own=False)
        self.cache.write(copy, first, rows, own=False)
        self.expected[copy] = self.expected[copy][:first] + self.expected[source][first : first + count]

    @invariant()
    def valid_rows_are_those_of_the_ledger(self) -> None:
        for slot, expected in enumerate(self.expected):
            assert self.cache.lengths[slot] == len(expected)
            for _, view in self.cache.slot(slot):
                for head in range(KV_HEADS):
                    assert view[0, head, : len(expected), -1].tolist() == expected


Ledger.TestCase.settings = tries(50, stateful_step_count=20)
TestLedger = Ledger.TestCase


def test_read_copies_the_rows_of_model_layers_or_exit_layers() -> None:
    cache = KVCache((0, "exit.0", "exit.1"), 1, KV_HEADS, 8, HEAD_DIM, np.float32)
    for number, array in enumerate(cache.arrays.values()):
        array[:] = number
    models, own = (cache.read(0, 2, 3, kind) for kind in (False, True))
    for array in cache.arrays.values():
        array[:] = 9
    assert [rows[:, 0, 0, 0].tolist() for rows in (models, own)] == [[0, 1], [2, 3, 4, 5]]
    assert [cache.row_bytes(kind) for kind in (False, True)] == [4 * KV_HEADS * HEAD_DIM * count for count in (2, 4)]
    cache.write(0, 2, models, own=False)
    assert [array[0, 0, 2, 0] for array in cache.arrays.values()] == [0, 1, 9, 9, 9, 9]
    cache.write(0, 2, own, own=True)
    assert [array[0, 0, 2, 0] for array in cache.arrays.values()] == [0, 1, 2, 3, 4, 5]
    assert cache.lengths.tolist() == [5]


def test_lengths_are_int32_and_updated_in_place() -> None:
    cache = cache_of()
    # An engine binds this memory once.
    counter = cache.lengths[1:2]
    cache.extend(1, 5)
    assert counter.dtype == np.int32
    assert counter.tolist() == [5]
    cache.trim(1, 2)
    assert counter.tolist() == [2]


def prompt_of(length: int) -> dict[str, np.ndarray]:
    shape = (1, 2, length, 4)
    return {"cross.0.key": np.ones(shape, np.float32), "cross_lengths": np.array([length], np.int32)}


def test_cross_cache_shrinks_after_a_long_prompt_leaves() -> None:
    cache = CrossCache(3)
    cache.place(0, prompt_of(3))
    cache.place(1, prompt_of(MAX_DOUBLED + 1))
    assert cache.rows(0, 3)["cross.0.key"].shape[2] == MAX_DOUBLED + CROSS_STEP
    cache.forget(1)
    cache.place(2, prompt_of(5))
    rows = cache.rows(0, 3)
    assert rows["cross.0.key"].shape[2] == MIN_DOUBLED
    np.testing.assert_array_equal(rows["cross_lengths"], [3, 1, 5])


def test_cross_arrays_are_reused_for_prompts_up_to_the_widest() -> None:
    cache = CrossCache(1)
    for length, version in ((3, 1), (MIN_DOUBLED, 1), (MIN_DOUBLED + 1, 2), (9, 2), (MAX_DOUBLED, 3), (1, 3)):
        cache.place(0, prompt_of(length))
        cache.forget(0)
        assert (cache.version, cache.rows(0, 1)["cross_lengths"].tolist()) == (version, [length])


STATM = Path("/proc/self/statm")


def resident() -> int:
    """Megabytes."""
    return int(STATM.read_text().split()[1]) * 4096 // 1_000_000


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_below_used_memory_is_returned_to_the_system() -> None:
    freed = [bytes(5000) for _ in range(20_000)]
    kept = [bytes(5000) for _ in range(100)]  # above it in the heap, which therefore cannot shrink by itself
    freed.clear()
    before = resident()
    check_memory(MANIFEST, capacity=64, slots=1)
    assert resident() < before - 50
    assert len(kept) == 100
