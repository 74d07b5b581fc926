"""The linear start of an exit's adapter, against a least-squares solution of numpy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freeexport.training.exit_adapter import Adapter, begin_linear, low_rank
from freeexport.training.teacher_states import TeacherStates

WIDTH, ROWS, EPSILON = 6, 5000, 1e-6


def teacher_states(shallow: np.ndarray, deep: np.ndarray) -> TeacherStates:
    both = np.stack([shallow, deep], 1)
    scales = np.abs(both).max(-1).astype(np.float32)
    rows = len(both)
    return TeacherStates((both / scales[..., None]).astype(np.float16), scales, np.zeros(rows), np.array([0, rows]))


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


@pytest.mark.parametrize("rank", [2 * WIDTH, 2 * WIDTH + 3])
def test_a_linear_relation_is_found_whole(rank: int) -> None:
    random = np.random.default_rng(0)
    shallow = random.normal(size=(ROWS, WIDTH))
    shallow *= np.sqrt(WIDTH) / np.linalg.norm(shallow, axis=-1, keepdims=True)
    turn = np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]  # keeps lengths, as the map's targets do
    deep = 3 * shallow @ turn.T
    adapter = Adapter(WIDTH, rank, EPSILON)
    begin_linear(adapter, teacher_states(shallow, deep), np.ones(WIDTH))
    with torch.no_grad():
        said = adapter(torch.from_numpy(shallow).float()).numpy()
    assert np.abs(said - deep).max() < 0.02  # states are kept in float16, and the ridge draws a little to zero


def test_fewer_ranks_keep_what_the_norm_shows() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(ROWS, WIDTH)) @ random.normal(size=(WIDTH, WIDTH))
    y = x @ random.normal(size=(WIDTH, WIDTH)) + random.normal(size=(ROWS, WIDTH))
    weight = np.array([5.0, 0.01, 1.0, 1.0, -2.0, 1.0])
    square, product = x.T @ x / ROWS, y.T @ x / ROWS
    ridge = square + 1e-3 * np.trace(square) / WIDTH * np.eye(WIDTH)
    best = np.linalg.solve(ridge, product.T).T

    def error(candidate: np.ndarray) -> float:
        """Of the map, in the metric of what it is fed and of what the norm shows."""
        gap = weight[:, None] * (best - candidate)
        return float(np.trace(gap @ ridge @ gap.T))

    inward, outward = low_rank(square, product, weight, 2)
    values = np.linalg.svd(weight[:, None] * best @ np.linalg.cholesky(ridge), compute_uv=False)
    assert inward.shape == (2, WIDTH)
    assert error(outward @ inward) == pytest.approx((values[2:] ** 2).sum(), rel=1e-6)


def test_one_unit_is_too_few_and_adds_nothing() -> None:
    adapter = Adapter(WIDTH, 1, EPSILON)
    random = np.random.default_rng(2)
    begin_linear(adapter, teacher_states(*random.normal(size=(2, 50, WIDTH))), np.ones(WIDTH))
    hidden = torch.randn(4, WIDTH)
    assert torch.equal(adapter(hidden), hidden)
