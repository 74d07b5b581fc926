"""Caches that cross-attention reads, while sequences come and go."""

from __future__ import annotations

import numpy as np

from runtime.engines.cross_cache import STEP, CrossCache


def prompt(length: int) -> dict[str, np.ndarray]:
    shape = (1, 2, length, 4)
    return {"cross.0.key": np.ones(shape, np.float32), "cross_lengths": np.array([length], np.int32)}


def test_no_length_is_beyond_the_arrays_once_a_long_prompt_has_left() -> None:
    cache = CrossCache(3)
    cache.place(0, prompt(3))
    cache.place(1, prompt(3 * STEP))
    assert cache.rows({"0"}, 0, 3)["cross.0.key"].shape[2] == 3 * STEP
    cache.forget(1)
    cache.place(2, prompt(5))
    rows = cache.rows({"0"}, 0, 3)
    assert rows["cross.0.key"].shape[2] == STEP
    np.testing.assert_array_equal(rows["cross_lengths"], [3, 1, 5])
