"""A linear map from the exit layer's states to the last layer's, by least squares: where an adapter's training begins.

Read through the final norm and head, such maps predict far better than the states themselves (the tuned lens: Belrose
et al. 2023, arXiv 2303.08112); there they are trained from the identity, here they are solved for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from freeexport.exit_module import Adapter
from freeexport.teacher_states import TeacherStates

_ROWS = 4096
# A share of the mean variance: keeps directions that the data hardly shows from growing large weights.
_RIDGE = 1e-3


@torch.no_grad()
def begin_linear(adapter: Adapter, states: TeacherStates, norm_weight: np.ndarray) -> None:
    """Set the adapter to the linear map of rank `rank // 2` whose outputs are nearest to the last layer's states, as
    far as the final norm's weights [d] show them. Exact, since silu(x) - silu(-x) = x: two units a rank."""
    rank = adapter.down.weight.shape[0] // 2
    if not rank:
        return
    inward, outward = low_rank(*_moments(states, adapter.norm.epsilon), norm_weight, rank)
    for weight, factor, axis in ((adapter.down.weight, inward, 0), (adapter.up.weight, outward, 1)):
        pair = torch.from_numpy(np.concatenate([factor, -factor], axis)).to(weight)
        weight.narrow(axis, 0, pair.shape[axis]).copy_(pair)


def low_rank(square: np.ndarray, product: np.ndarray, weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors [r, d], [d, r] of the map of rank r that minimises the squared error of its outputs times `weight` [d]
    (reduced-rank ridge regression). `square` [d, d] is the mean of x x', `product` [d, d] that of y x'."""
    width = len(square)
    square = square + _RIDGE * np.trace(square) / width * np.eye(width)
    whole = np.linalg.solve(square, product.T).T
    magnitude = np.maximum(np.abs(weight.astype(np.float64)), 1e-3 * np.abs(weight).max())
    root = np.linalg.cholesky(square)
    left = np.linalg.svd((magnitude[:, None] * whole) @ root)[0][:, : min(rank, width)]
    return left.T @ (magnitude[:, None] * whole), left / magnitude[:, None]


def _moments(states: TeacherStates, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Means of x x' and y x': x is a normed state of the exit layer, y what must be added to the state to get the
    direction of the last layer's, at the last layer's usual length."""
    width = states.states.shape[2]
    square, product = np.zeros((2, width, width))
    length = float(np.median(np.concatenate([_root_mean_square(piece[:, 1], 0.0) for piece in _pieces(states)])))
    for piece in _pieces(states):
        shallow, deep = piece[:, 0], piece[:, 1]
        x = shallow / _root_mean_square(shallow, epsilon)
        y = deep / _root_mean_square(deep, epsilon) * length - shallow
        square += x.T @ x
        product += y.T @ x
    return square / len(states.states), product / len(states.states)


def _pieces(states: TeacherStates) -> Iterator[np.ndarray]:
    for start in range(0, len(states.states), _ROWS):
        rows = slice(start, start + _ROWS)
        yield states.states[rows].astype(np.float64) * states.scales[rows][..., None]


def _root_mean_square(x: np.ndarray, epsilon: float) -> np.ndarray:
    return cast(np.ndarray, np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon))
