"""Weights rounded around zero, for operators that widen them: int8 and fp8 by row, int4 in blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from graphs.quantization.pieces import pieces, relative, total
from graphs.quantization.rounding import CLIPS, Rounded, at_least
from runtime.bundle.precision import TensorFormat

# The type and the largest value of each format.
TYPES: dict[TensorFormat, tuple[np.dtype, int]] = {
    "int8": (np.dtype(np.int8), 127),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448),
}
INT4 = np.dtype(ml_dtypes.int4)


def round_rows(weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> Rounded:
    """[outputs, inputs] float32 -> the same in int8 or float8_e4m3fn, and scales [outputs] of type `scales`."""
    kind, peak = TYPES[format_]
    data, steps = np.empty(weight.shape, kind), at_least(np.abs(weight).max(axis=1) / peak, scales)
    lost = 0.0
    for rows in pieces(weight):
        scale = steps[rows, None].astype(np.float32)
        values = weight[rows] / scale
        data[rows] = np.rint(values) if kind == np.int8 else values
        lost += total(np.square(data[rows].astype(np.float32) * scale - weight[rows]))
    return Rounded(data, steps, None, relative(lost, weight))


def round_blocks(weight: np.ndarray, block: int, scales: np.dtype) -> Rounded:
    """[outputs, inputs] float32 -> the same in int4, and scales [outputs, inputs / block] of type `scales`."""
    data, lost = np.empty(weight.shape, INT4), 0.0
    steps = np.empty((len(weight), weight.shape[1] // block), scales)
    for rows in pieces(weight):
        piece = weight[rows].reshape(-1, steps.shape[1], block)
        values, steps[rows], errors = _best_clip(piece, scales)
        data[rows] = values.reshape(len(piece), -1)
        lost += total(errors)
    return Rounded(data, steps, None, relative(lost, weight))


def _best_clip(piece: np.ndarray, type_: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, blocks, block] -> values -8..7; scales and squared errors [n, blocks] of each block's best range."""
    peak = np.abs(piece).max(-1)
    # -8 has no counterpart: of the two ends, the larger one may reach it.
    best = _round(piece, peak / 7, type_)
    for end in (7.5, *(7 / clip for clip in CLIPS[1:])):
        found = _round(piece, peak / np.float32(end), type_)
        better = found[-1] < best[-1]
        for chosen, candidate in zip(best, found, strict=True):
            chosen[better] = candidate[better]
    return best


def _round(piece: np.ndarray, scale: np.ndarray, type_: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Even steps of `scale` [n, blocks], then the scale that fits the values best (least squares)."""
    values = np.clip(np.rint(piece / np.where(scale > 0, scale, 1)[..., None]), -8, 7)
    power = np.square(values).sum(-1)
    fitted = np.where(power > 0, (values * piece).sum(-1) / np.maximum(power, 1), 1)
    steps = at_least(fitted.astype(np.float32), type_)
    errors = np.square(values * steps[..., None].astype(np.float32) - piece).sum(-1)
    return values.astype(INT4), steps, errors
