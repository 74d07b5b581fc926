"""Rows of a weight that is packed for products: the values that it stands for, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_cases import packed_rows, random_case

from runtime.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)


@pytest.mark.parametrize(("outputs", "inputs", "block"), [(1, 1, 32), (16, 32, 32), (37, 95, 64), (40, 576, 64)])
def test_rows_are_the_values_that_a_weight_stands_for(outputs: int, inputs: int, block: int) -> None:
    case = random_case(np.random.default_rng(0), outputs, inputs, 8, block)
    indices = np.random.default_rng(1).permutation(outputs)
    for shape in ((-1,), (1, -1)):
        (rows,) = packed_rows(case).run(None, {"indices": indices.reshape(shape)})
        np.testing.assert_array_equal(rows, case.values[indices].reshape(*indices.reshape(shape).shape, inputs))
    assert packed_rows(case).run(None, {"indices": np.empty(0, np.int64)})[0].shape == (0, inputs)


def test_scales_next_to_nothing_are_kept() -> None:
    case = random_case(np.random.default_rng(0), 16, 32, 8)
    case.packed.scales[:] = np.float16(6e-8)  # the least there is
    (rows,) = packed_rows(case).run(None, {"indices": np.arange(16)})
    steps = np.rint(rows / np.float32(np.float16(6e-8)))
    np.testing.assert_array_equal(rows, steps * np.float32(np.float16(6e-8)))
    assert np.abs(steps).max() == 127


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_an_index_out_of_range_is_an_error(index: int) -> None:
    rows = packed_rows(random_case(np.random.default_rng(0), 20, 32, 8))
    with pytest.raises(Exception, match=f"index {index} is no row of 20"):
        rows.run(None, {"indices": np.array([0, index])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": 33}, "input 1 of PackedRows has 1024 elements, N, K and block_size want 1536"),
        ({"block_size": 48}, "no multiple of 32"),
        ({"K": 0}, "out of range"),
        ({"constant": False}, "input 1 of PackedRows is no constant"),
        ({"K": 64, "block_size": 32}, "input 1 of PackedRows has 1024 elements, N, K and block_size want 2048"),
    ],
)
def test_sizes_that_contradict_each_other_are_an_error(changes: dict[str, Any], message: str) -> None:
    case = random_case(np.random.default_rng(0), 20, 32, 8)
    with pytest.raises(Exception, match=message):
        packed_rows(case, **changes)
