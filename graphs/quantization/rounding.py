"""Weights rounded to 8 or 4 bits in blocks along the inputs, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphs.quantization.pieces import pieces, relative, total

# How far the range of 4 bits is pulled in: clipping the ends of a block costs less than coarse steps for all of it.
CLIPS = (1.0, 0.92, 0.85, 0.78)
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Rounded:
    """`data`, `scales` and `zero_points` (None where they are the middle of the range) as an operator wants
    them, and the relative error |W - rounded W| / |W|. With `offsets`, as scales, there are no zero points: a value v
    stands for v * scale + offset."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    error: float
    offsets: np.ndarray | None = None


def round_8_bits(weight: np.ndarray, block: int, type_: np.dtype = FLOAT32) -> Rounded:
    """[outputs, inputs] float32 -> uint8 [outputs, blocks, block], and scales [outputs, blocks] of a type.

    A value v stands for (v - 128) * scale. The last block is filled up with zeros.
    """
    data = np.empty(_blocked(weight, block), np.uint8)
    scales = np.empty(data.shape[:2], type_)
    lost = 0.0
    for rows in pieces(weight):
        piece = in_blocks(weight[rows], block)
        scales[rows] = at_least(np.abs(piece).max(-1) / 127, type_)
        scale = scales[rows, :, None].astype(np.float32)
        steps = np.rint(piece / scale)
        data[rows] = steps + 128
        lost += total(np.square(steps * scale - piece))
    return Rounded(data, scales, None, relative(lost, weight))


def round_4_bits(weight: np.ndarray, block: int, type_: np.dtype = FLOAT32) -> Rounded:
    """[outputs, inputs] float32 -> uint8 [outputs, blocks, block / 2], scales [outputs, blocks] of a type, and packed
    zero points uint8 [outputs, (blocks + 1) // 2].

    A value v stands for (v - zero point) * scale. Of two values in a byte, the first is in the low half.
    """
    outputs, blocks, _ = _blocked(weight, block)
    values = np.empty((outputs, blocks, block), np.uint8)
    scales = np.empty((outputs, blocks), type_)
    zeros = np.empty((outputs, blocks), np.uint8)
    lost = 0.0
    for rows in pieces(weight):
        values[rows], scales[rows], zeros[rows], errors = best_range(in_blocks(weight[rows], block), type_)
        lost += total(errors)
    return joined(values, scales, zeros, relative(lost, weight))


def joined(
    values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, error: float, offsets: np.ndarray | None = None
) -> Rounded:
    """Values uint8 [outputs, blocks, block] and zero points [outputs, blocks] of 4 bits, two in a byte."""
    if zeros is not None:
        zeros = _pack(np.pad(zeros.astype(np.uint8), ((0, 0), (0, zeros.shape[1] % 2))))
    return Rounded(_pack(values), scales, zeros, error, offsets)


def side_by_side(parts: Sequence[Rounded]) -> Rounded:
    """Weights of the same inputs and blocks in 4 bits as one; their errors are not, so the largest stands for it."""
    data, scales = (np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "scales"))
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Rounded(data, scales, np.concatenate(zeros), max(part.error for part in parts))


def best_range(
    piece: np.ndarray, type_: np.dtype, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[n, blocks, block] -> uint8 values; scales, zero points and squared errors [n, blocks] of each block's best.
    `importance` [blocks, block]: of the square of each input's error; None for all the same."""
    importance = np.ones(piece.shape[1:], np.float32) if importance is None else importance
    low, high = np.minimum(piece.min(-1), 0), np.maximum(piece.max(-1), 0)
    best = _round_between(piece, low, high, type_, importance)
    for clip in CLIPS[1:]:
        found = _round_between(piece, low * np.float32(clip), high * np.float32(clip), type_, importance)
        better = found[-1] < best[-1]
        for chosen, candidate in zip(best, found, strict=True):
            chosen[better] = candidate[better]
    return best


def _round_between(
    piece: np.ndarray, low: np.ndarray, high: np.ndarray, type_: np.dtype, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """16 even steps from `low` to `high` [n, blocks], then the scale that fits the values best (least squares)."""
    scale = at_least((high - low) / 15, FLOAT32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    values = np.clip(np.rint(piece / scale[..., None]) + zero[..., None], 0, 15)
    steps = values - zero[..., None]
    weighted = steps * importance
    power = (weighted * steps).sum(-1)
    fitted = np.where(power > 0, (weighted * piece).sum(-1) / np.where(power > 0, power, 1), scale)
    fitted = at_least(fitted.astype(np.float32), type_)
    errors = (np.square(steps * fitted[..., None].astype(np.float32) - piece) * importance).sum(-1)
    return values.astype(np.uint8), fitted, zero.astype(np.uint8), errors


def values_of(rounded: Rounded) -> np.ndarray:
    """What `rounded` of 4 bits stands for, float32 [outputs, blocks * block]."""
    assert rounded.zero_points is not None
    values, zeros = unpacked(rounded.data).astype(np.float32), unpacked(rounded.zero_points)[:, : rounded.data.shape[1]]
    found: np.ndarray = (values - zeros[..., None]) * rounded.scales[..., None].astype(np.float32)
    return found.reshape(len(values), -1)


def unpacked(data: np.ndarray) -> np.ndarray:
    """Two values a byte, the low one first -> one a byte along the last axis."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def _pack(values: np.ndarray) -> np.ndarray:
    """Pairs of 4-bit values along the last axis in one byte, the first in the low half."""
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def _blocked(weight: np.ndarray, block: int) -> tuple[int, int, int]:
    outputs, inputs = weight.shape
    return outputs, -(-inputs // block), block


def in_blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """[n, inputs] -> [n, blocks, block], the last block filled up with zeros."""
    count, blocks, _ = _blocked(rows, block)
    padded = np.zeros((count, blocks * block), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(count, blocks, block)


def at_least(exact: np.ndarray, type_: np.dtype) -> np.ndarray:
    """Float32 scales as the least numbers of a type that are not smaller, so that no value leaves its range; 1 for 0,
    the scale of weights that are all 0, which would be divided by."""
    found = np.where(exact > 0, exact, 1).astype(type_)
    above = np.nextafter(found, np.array(np.inf, type_))
    return np.where(found.astype(np.float32) < exact, above, found)
