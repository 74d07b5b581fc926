"""An exit's own parameters: a norm, and a small adapter between the exit layer and the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import nn

from freeexport.training.teacher_states import TeacherStates


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon), in float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


class Adapter(nn.Module):
    """h + up(silu(down(norm(h)))); nothing is added until `up` is set or trained."""

    def __init__(self, width: int, rank: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(torch.ones(width), epsilon)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.down.weight, std=width**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.up(nn.functional.silu(self.down(self.norm(hidden))))
        return hidden + added


class Exit(nn.Module):
    """`norm` begins as the final norm's `norm_weight` [d]; no adapter where `rank` is 0."""

    def __init__(self, norm_weight: torch.Tensor, epsilon: float, rank: int) -> None:
        super().__init__()
        self.adapter = Adapter(len(norm_weight), rank, epsilon) if rank else None
        self.norm = RMSNorm(norm_weight, epsilon)

    def adapted(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, d] -> [N, d]: what stands in for the last layer's hidden state."""
        return hidden if self.adapter is None else self.adapter(hidden)


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
