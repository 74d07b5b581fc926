"""Weights that have 4 bits already, as those of a GGUF file in Q4_0, Q4_1 or Q4_K, though a checkpoint reads as floats:
rounding them again would lose twice."""

from __future__ import annotations

import numpy as np

from graphs.quantization.pieces import pieces, relative, total
from graphs.quantization.rounding import Rounded, joined

# How far a value may be from its step, in steps: bfloat16 moves it so far, and chance puts no 32 values there.
TOLERANCE = 1 / 16
MOST_STEPS = 15
# Outputs that are looked at first: most weights are on no grid.
FIRST = 4


def on_grid(weight: np.ndarray, block: int, type_: np.dtype, offsets: bool) -> Rounded | None:
    """A weight [outputs, inputs] whose blocks have at most 16 evenly spaced values each, as these, in the form of
    `round_4_bits`; None for any other. Where 0 is none of these values, its blocks have `offsets` of `type_`; if these
    may not be, the weight is as any other."""
    outputs, inputs = weight.shape
    if inputs % block or _steps(weight[:FIRST].reshape(-1, block)) is None:
        return None
    blocks = inputs // block
    values = np.empty((outputs, blocks, block), np.uint8)
    scales, starts = np.empty((outputs, blocks), np.float32), np.empty((outputs, blocks), np.float32)
    for rows in pieces(weight):
        found = _steps(weight[rows].reshape(-1, block))
        if found is None:
            return None
        for whole, part in zip((values, scales, starts), found, strict=True):
            whole[rows] = part.reshape(whole[rows].shape)
    zeros = np.rint(-starts / scales)
    meets_zero = np.abs(starts + zeros * scales) <= TOLERANCE * scales
    rounded_scales = scales.astype(type_)
    if meets_zero.all() and zeros.min() >= 0 and zeros.max() <= MOST_STEPS:
        error = _error(weight, values, rounded_scales, -zeros * rounded_scales.astype(np.float32))
        return joined(values, rounded_scales, zeros, error)
    if not offsets:
        return None
    rounded_starts = starts.astype(type_)
    error = _error(weight, values, rounded_scales, rounded_starts.astype(np.float32))
    return joined(values, rounded_scales, None, error, rounded_starts)


def _steps(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Blocks float32 [n, block] as steps uint8 [n, block] of a spacing [n] from a start [n]; None if one has none."""
    low, high = blocks.min(-1), blocks.max(-1)
    if not np.isfinite(high - low).all():
        return None
    (left,) = np.nonzero(high > low)
    # Blocks of one value: 0 is the other end of one step.
    values = np.repeat((low > 0).astype(np.uint8)[:, None], blocks.shape[1], axis=1)
    spacing = np.where(low == 0, 1, np.abs(low)).astype(np.float32)
    low = np.where(high > low, low, np.minimum(low, 0))
    for count in range(MOST_STEPS, 0, -1):
        between = (high[left] - low[left]) / count
        steps = (blocks[left] - low[left, None]) / between[:, None]
        nearest = np.rint(steps)
        good = np.abs(steps - nearest).max(-1, initial=0) <= TOLERANCE
        values[left[good]], spacing[left[good]] = nearest[good], between[good]
        left = left[~good]
        if not len(left):
            return values, spacing, low
    return None


def _error(weight: np.ndarray, values: np.ndarray, scales: np.ndarray, starts: np.ndarray) -> float:
    """|W - values * scales - starts| / |W|."""
    lost = 0.0
    for rows in pieces(weight):
        kept = values[rows] * scales[rows, :, None].astype(np.float32) + starts[rows, :, None]
        lost += total(np.square(kept.reshape(weight[rows].shape) - weight[rows]))
    return relative(lost, weight)
