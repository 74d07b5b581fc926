"""Weights rounded to 8 or 4 bits, in numpy: the formats of each target, and how much each may lose.

Weights in blocks along the inputs; 4-bit weights of a checkpoint, which stay as they are; weights around zero, for
operators that widen them; and the layout of our own operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from runtime.bundle.manifest import TensorFormat

# Values rounded at once.
CHUNK = 1 << 20


def pieces(weight: np.ndarray) -> Iterator[slice]:
    """Rows in pieces of about CHUNK values."""
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))


def total(squares: np.ndarray) -> float:
    return float(squares.sum(dtype=np.float64))


def relative(lost: float, weight: np.ndarray) -> float:
    """The relative error of a weight whose squared errors sum to `lost`."""
    whole = sum(total(np.square(weight[rows])) for rows in pieces(weight))
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0


# How far the range of 4 bits is pulled in: clipping the ends of a block costs less than coarse steps for all of it.
CLIPS = (1.0, 0.92, 0.85, 0.78)
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Rounded:
    """`data`, `scales` and `zero_points` (None where they are the middle of the range) as an operator wants
    them, and the relative error |W - rounded W| / |W|. With `offsets`, as scales, there are no zero points: a value v
    stands for v * scale + offset. With `multiples`, int8 [outputs, blocks, 1 or 2], scales and offsets are those of 256
    inputs, and a block's are so many times as large."""

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    error: float
    offsets: np.ndarray | None = None
    multiples: np.ndarray | None = None


def round_8_bits(weight: np.ndarray, block: int, type_: np.dtype = FLOAT32) -> Rounded:
    """[outputs, inputs] float32 -> uint8 [outputs, blocks, block], and scales [outputs, blocks] of a type. A value v
    stands for (v - 128) * scale. The last block is filled up with zeros."""
    data = np.empty((len(weight), -(-weight.shape[1] // block), block), np.uint8)
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
    zero points uint8 [outputs, (blocks + 1) // 2]. A value v stands for (v - zero point) * scale. Of two values in a
    byte, the first is in the low half."""
    values = np.empty((len(weight), -(-weight.shape[1] // block), block), np.uint8)
    scales, zeros = np.empty(values.shape[:2], type_), np.empty(values.shape[:2], np.uint8)
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
    """Weights of the same inputs, blocks and form as one; their errors are not, so the largest stands for it."""

    def joined_by(name: str) -> np.ndarray | None:
        return None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])

    whole = {name: joined_by(name) for name in ("data", "scales", "zero_points", "offsets", "multiples")}
    return Rounded(**whole, error=max(part.error for part in parts))  # type: ignore[arg-type]


def best_range(
    piece: np.ndarray, type_: np.dtype, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[n, blocks, block] -> uint8 values; scales, zero points and squared errors [n, blocks] of each block's best.
    `importance` [blocks, block]: of the square of each input's error; None for all the same."""
    importance = np.ones(piece.shape[1:], np.float32) if importance is None else importance
    low, high = np.minimum(piece.min(-1), 0), np.maximum(piece.max(-1), 0)
    best = _round_between(piece, low, high, type_, importance)
    for clip in CLIPS[1:]:
        _keep_better(best, _round_between(piece, low * np.float32(clip), high * np.float32(clip), type_, importance))
    return best


def _keep_better(best: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
    """Take over the blocks whose errors, the last array, are smaller."""
    better = found[-1] < best[-1]
    for chosen, candidate in zip(best, found, strict=True):
        chosen[better] = candidate[better]


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
    """Dequantize `rounded` of 4 bits: float32 [outputs, blocks * block]."""
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


def in_blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """[n, inputs] -> [n, blocks, block], the last block filled up with zeros."""
    padded = np.pad(np.asarray(rows, np.float32), ((0, 0), (0, -rows.shape[1] % block)))
    return padded.reshape(len(rows), -1, block)


def at_least(exact: np.ndarray, type_: np.dtype) -> np.ndarray:
    """Float32 scales as the least numbers of a type that are not smaller, so that no value leaves its range; 1 for 0,
    the scale of weights that are all 0, which would be divided by."""
    found = np.where(exact > 0, exact, 1).astype(type_)
    above = np.nextafter(found, np.array(np.inf, type_))
    return np.where(found.astype(np.float32) < exact, above, found)


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
        _keep_better(best, _round(piece, peak / np.float32(end), type_))
    return best


def _round(piece: np.ndarray, scale: np.ndarray, type_: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Even steps of `scale` [n, blocks], then the scale that fits the values best (least squares)."""
    values = np.clip(np.rint(piece / np.where(scale > 0, scale, 1)[..., None]), -8, 7)
    power = np.square(values).sum(-1)
    fitted = np.where(power > 0, (values * piece).sum(-1) / np.maximum(power, 1), 1)
    steps = at_least(fitted.astype(np.float32), type_)
    errors = np.square(values * steps[..., None].astype(np.float32) - piece).sum(-1)
    return values.astype(INT4), steps, errors


# 4 bits come in blocks of 32, or larger ones where a weight bears it: 16 would take half as long again.
BLOCK, LARGER_BLOCKS, EASY = 32, (64, 128), 0.06


@dataclass(frozen=True)
class IntegerScheme:
    """For operators that read weights in blocks. `blocks`: of 8 bits the largest that divides the inputs, else 32;
    fewer scales are faster, and lose hardly more (docs/precision.md). `offsets`: of 4 bits they read those too.
    `limits`: relative errors of a weight above which it gets the `higher` format, or stays as it is where there is
    none. Weights that are spread like a bell lose 0.078 in 4 bits and 0.008 in 8; outliers cost more."""

    blocks: tuple[int, ...] = (128, 64)
    offsets: bool = False
    limits: ClassVar[Mapping[TensorFormat, float]] = {"int4": 0.12, "int8-block": 0.03}
    higher: ClassVar[Mapping[TensorFormat, TensorFormat]] = {"int4": "int8-block"}

    def round(self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> tuple[Rounded, int]:
        """[outputs, inputs] float32 in a format, with scales of that type; and how many inputs share one, 0 for all."""
        if format_ == "int8-block":
            block = next((size for size in self.blocks if weight.shape[1] % size == 0), BLOCK)
            return round_8_bits(weight, block, scales), block
        if (kept := on_grid(weight, BLOCK, scales, self.offsets)) is not None:
            return kept, BLOCK
        rounded, block = round_4_bits(weight, BLOCK, scales), BLOCK
        for larger in LARGER_BLOCKS:
            if rounded.error > EASY:
                break
            candidate = round_4_bits(weight, larger, scales)
            if candidate.error <= EASY:
                rounded, block = candidate, larger
        return rounded, block

    def keeps(self, weight: np.ndarray, scales: np.dtype) -> bool:
        """Whether a weight has 4 bits already, which `round` leaves as they are."""
        return on_grid(weight, BLOCK, scales, self.offsets) is not None


class SymmetricScheme:
    """For weights that a graph widens before a product: DequantizeLinear, without zero points, which TensorRT does not
    take. A bell loses 0.10 in 4 bits, 0.026 in fp8, 0.008 in 8 bits."""

    limits: ClassVar[Mapping[TensorFormat, float]] = {"int4": 0.15, "fp8": 0.05, "int8": 0.03}
    higher: ClassVar[Mapping[TensorFormat, TensorFormat]] = {"int4": "int8"}
    # The largest block that divides the inputs: TensorRT takes no part of one.
    blocks = (64, 32)

    def round(self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> tuple[Rounded, int]:
        """See IntegerScheme."""
        if format_ != "int4":
            return round_rows(weight, format_, scales), 0
        block = next((size for size in self.blocks if weight.shape[1] % size == 0), 0)
        if not block:
            nothing = np.empty(0, np.int8)
            return Rounded(nothing, nothing, None, error=1.0), 0
        return round_blocks(weight, block, scales), block

    def keeps(self, weight: np.ndarray, scales: np.dtype) -> bool:
        return False


Scheme = IntegerScheme | SymmetricScheme
