"""Matrix products that leave the other cores to the engines."""

from __future__ import annotations

import time

import numpy as np
import pytest

from runtime.engines.matmul import MAX_MULTIPLICATIONS, product


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("shape", [(201, 80), (3, 2), (64, 1500), (1154, 64)])
def test_products_match_numpy(count: int, shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((count, shape[0]), np.float32)
    matrix = draw.standard_normal(shape, np.float32)
    found = product(rows, matrix)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows.astype(float) @ matrix, atol=1e-3)
    np.testing.assert_allclose(product(rows, matrix.T.copy().T), found, atol=1e-3)


@pytest.mark.parametrize("count", [1, 1001])
def test_threads_do_not_spin_after_a_product(count: int) -> None:
    """OpenBLAS's threads would for 0.1 s each."""
    rows = np.ones((count, 201), np.float32)
    matrix = np.ones((201, 80), np.float32)
    assert count * matrix.size > MAX_MULTIPLICATIONS or count == 1
    time.sleep(0.3)  # threads of earlier tests
    product(rows, matrix)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
