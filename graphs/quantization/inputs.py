"""Rounds weights to 4 bits so that a layer's outputs change least on given inputs.

GPTQ (Frantar et al. 2022), followed by coordinate descent on scales and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphs.quantization.rounding import (
    FLOAT32,
    Rounded,
    at_least,
    best_range,
    in_blocks,
    join_rounded,
    relative,
    row_chunks,
    total,
)

# Share of the inputs' mean square that is added to each, for inputs that the sample does not have.
DAMPING = 0.01
# Alternations between fitting scales and values. The second lowers errors by 1 to 2 %.
ROUNDS = 2
# Inputs whose errors are propagated to the others in one product.
STRIP = 64


@dataclass
class _Grid:
    """A rounded weight, transposed to [inputs, outputs].

    Attributes:
        steps: Values as steps from their zero points, float32 [inputs, outputs].
        scales: float32 [blocks, outputs].
        zeros: Zero points, float32 [blocks, outputs].
    """

    steps: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def block(self) -> int:
        return len(self.steps) // len(self.scales)

    @property
    def weights(self) -> np.ndarray:
        return self.steps * np.repeat(self.scales, self.block, axis=0)

    def nearest(self, row: int, wanted: np.ndarray) -> np.ndarray:
        """Return the allowed steps [outputs] of an input that are nearest to `wanted`, in steps."""
        zero = self.zeros[row // self.block]
        steps: np.ndarray = np.clip(np.rint(wanted), -zero, 15 - zero)
        return steps

    def keep(self, outputs: np.ndarray, other: _Grid) -> None:
        """Copy the outputs selected by a mask from another grid."""
        self.steps[:, outputs] = other.steps[:, outputs]
        self.scales[:, outputs] = other.scales[:, outputs]
        self.zeros[:, outputs] = other.zeros[:, outputs]


def round_4_bits_for(
    weight: np.ndarray, moments: np.ndarray, block: int, type_: np.dtype = FLOAT32
) -> Rounded:
    """Round a weight to 4 bits with a small error in the layer's outputs, rather than in the
    weight.

    The summed squared error over the given inputs is at most that of `round_4_bits`, for every
    output.

    Args:
        weight: float32 [outputs, inputs].
        moments: Sum of x x^T over the inputs x of the layer, [inputs, inputs]. A share of the mean
            square is added to the diagonal.
        block: Inputs that share a scale.
        type_: Type of the scales.

    Returns:
        The weight in the form of `round_4_bits`.
    """
    count = -(-weight.shape[1] // block) * block
    damped = np.zeros((count, count))
    damped[: len(moments), : len(moments)] = moments
    damped[np.diag_indices(count)] += max(DAMPING * float(np.diag(moments).mean()), 1e-12)
    order = np.argsort(-np.diag(damped), kind="stable")
    spread = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T.astype(np.float32)
    known = damped.astype(np.float32)
    parts = []
    lost = 0.0
    for rows in row_chunks(weight):
        target = np.ascontiguousarray(in_blocks(weight[rows], block).reshape(-1, count).T)
        grid = _rounded(target, known, spread, order, block, type_)
        lost += total(np.square(grid.weights - target))
        parts.append((grid.steps + np.repeat(grid.zeros, block, axis=0), grid.scales, grid.zeros))
    values, scales, zeros = (np.concatenate(part, axis=1).T for part in zip(*parts, strict=True))
    return join_rounded(
        values.astype(np.uint8).reshape(len(weight), -1, block),
        scales.astype(type_),
        zeros,
        relative(lost, weight),
    )


def _rounded(
    target: np.ndarray,
    moments: np.ndarray,
    spread: np.ndarray,
    order: np.ndarray,
    block: int,
    type_: np.dtype,
) -> _Grid:
    plain = _in_best_range(target, np.ones(len(target), np.float32), block, type_)
    grid = _in_best_range(target, np.diag(moments), block, type_)
    _pass_on(grid, target, spread, order)
    grid.keep(_losses(plain, target, moments) < _losses(grid, target, moments), plain)
    for _ in range(ROUNDS):
        _fit_scales(grid, target, moments, type_)
        _descend(grid, target, moments)
    grid.keep(_losses(plain, target, moments) < _losses(grid, target, moments), plain)
    return grid


def _in_best_range(
    target: np.ndarray, importance: np.ndarray, block: int, type_: np.dtype
) -> _Grid:
    rows = target.T.reshape(target.shape[1], -1, block)
    values, scales, zeros, _ = best_range(rows, type_, importance.reshape(-1, block))
    steps = values.astype(np.float32) - zeros[..., None]
    whole = (
        np.ascontiguousarray(part.reshape(len(rows), -1).T)
        for part in (steps, scales.astype(np.float32), zeros.astype(np.float32))
    )
    return _Grid(*whole)


def _losses(grid: _Grid, target: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Return the squared error of each output, summed over the inputs: float32 [outputs]."""
    wrong = grid.weights - target
    losses: np.ndarray = np.einsum("io,io->o", moments @ wrong, wrong)
    return losses


def _pass_on(grid: _Grid, target: np.ndarray, spread: np.ndarray, order: np.ndarray) -> None:
    """Round inputs in `order`, and let the remaining inputs compensate each error (GPTQ).

    `spread` is the upper Cholesky factor of the inverse of the moments, in that order.
    """
    left = target[order]
    for start in range(0, len(left), STRIP):
        stop = min(start + STRIP, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for place in range(start, stop):
            row = order[place]
            scale = grid.scales[row // grid.block]
            grid.steps[row] = grid.nearest(row, left[place] / scale)
            errors[place - start] = (left[place] - grid.steps[row] * scale) / spread[place, place]
            left[place + 1 : stop] -= spread[place, place + 1 : stop, None] * errors[place - start]
        left[stop:] -= spread[start:stop, stop:].T @ errors


def _fit_scales(grid: _Grid, target: np.ndarray, moments: np.ndarray, type_: np.dtype) -> None:
    """Fit all scales of an output by least squares.

    An output whose error grows keeps its scales.
    """
    blocks, outputs = grid.scales.shape
    steps = grid.steps.reshape(blocks, -1, outputs)
    products = np.empty((outputs, blocks, blocks))
    for number in range(blocks):
        read = moments[:, number * grid.block : (number + 1) * grid.block] @ steps[number]
        products[:, number] = np.einsum("bio,bio->ob", read.reshape(steps.shape), steps)
    wanted = np.einsum("bio,bio->ob", (moments @ target).reshape(steps.shape), steps)
    # A ridge keeps the scales of blocks of zeros.
    ridge = 1e-4 * products.diagonal(axis1=1, axis2=2).mean(1) + 1e-12
    products[:, np.arange(blocks), np.arange(blocks)] += ridge[:, None]
    right = wanted.astype(np.float64) + ridge[:, None] * grid.scales.T
    fitted = np.linalg.solve(products, right[..., None])[..., 0].T
    usable = np.where(fitted > 0, fitted, grid.scales).astype(np.float32)
    other = _Grid(grid.steps, at_least(usable, type_).astype(np.float32), grid.zeros)
    better = _losses(other, target, moments) < _losses(grid, target, moments)
    grid.scales[:, better] = other.scales[:, better]


def _descend(grid: _Grid, target: np.ndarray, moments: np.ndarray) -> None:
    """Set each value in turn to its optimum, given all other values (coordinate descent)."""
    slopes = moments @ (target - grid.weights)
    for start in range(0, len(target), STRIP):
        stop = min(start + STRIP, len(target))
        changes = np.empty((stop - start, target.shape[1]), np.float32)
        for row in range(start, stop):
            scale = grid.scales[row // grid.block]
            best = grid.nearest(row, grid.steps[row] + slopes[row] / (moments[row, row] * scale))
            changes[row - start] = (grid.steps[row] - best) * scale
            grid.steps[row] = best
            slopes[start:stop] += moments[start:stop, row, None] * changes[row - start]
        slopes[stop:] += moments[stop:, start:stop] @ changes
