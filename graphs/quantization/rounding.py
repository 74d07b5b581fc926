"""Rounds weights to 8 or 4 bits in numpy.

Holds the formats of each target and their error limits: blocks along the inputs, 4-bit weights of a
checkpoint that stay unchanged, and symmetric formats for operators that widen weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from runtime.bundle.quantization import TensorFormat

# Number of values rounded at once.
CHUNK = 1 << 20


def row_chunks(weight: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK values each."""
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        yield slice(start, min(start + rows, len(weight)))


def total(squares: np.ndarray) -> float:
    return float(squares.sum(dtype=np.float64))


def relative(lost: float, weight: np.ndarray) -> float:
    """Return the relative error of a weight whose squared errors sum to `lost`."""
    whole = sum(total(np.square(weight[rows])) for rows in row_chunks(weight))
    return float(np.sqrt(lost / whole)) if whole > 0 else 0.0


# Factors by which the range of 4 bits is clipped. Clipping a block's extremes often costs less than
# coarser steps for all its values.
CLIPS = (1.0, 0.92, 0.85, 0.78)
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        data: Values.
        scales: A value v stands for (v - zero point) * scale.
        zero_points: None for the middle of the range.
        error: Relative error |W - rounded W| / |W|.
        offsets: If given, a value v stands for v * scale + offset, and there are no zero points.
        multiples: int8 [outputs, blocks, 1 or 2]. If given, scales and offsets are shared by 256
            inputs, and each block multiplies them by its own integers.
    """

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    error: float
    offsets: np.ndarray | None = None
    multiples: np.ndarray | None = None


def round_8_bits(weight: np.ndarray, block: int, type_: np.dtype = FLOAT32) -> Rounded:
    """Round float32 [outputs, inputs] to 8 bits in blocks.

    Returns uint8 [outputs, blocks, block] and scales [outputs, blocks] of type `type_`. A value v
    stands for (v - 128) * scale. The last block is padded with zeros.
    """
    data = np.empty((len(weight), -(-weight.shape[1] // block), block), np.uint8)
    scales = np.empty(data.shape[:2], type_)
    lost = 0.0
    for rows in row_chunks(weight):
        piece = in_blocks(weight[rows], block)
        scales[rows] = at_least(np.abs(piece).max(-1) / 127, type_)
        scale = scales[rows, :, None].astype(np.float32)
        steps = np.rint(piece / scale)
        data[rows] = steps + 128
        lost += total(np.square(steps * scale - piece))
    return Rounded(data, scales, None, relative(lost, weight))


def round_4_bits(weight: np.ndarray, block: int, type_: np.dtype = FLOAT32) -> Rounded:
    """Round float32 [outputs, inputs] to 4 bits in blocks.

    Returns uint8 [outputs, blocks, block / 2], scales [outputs, blocks] of type `type_`, and packed
    zero points uint8 [outputs, (blocks + 1) // 2]. A value v stands for (v - zero point) * scale.
    Two values share a byte, the first in the low half.
    """
    values = np.empty((len(weight), -(-weight.shape[1] // block), block), np.uint8)
    scales = np.empty(values.shape[:2], type_)
    zeros = np.empty(values.shape[:2], np.uint8)
    lost = 0.0
    for rows in row_chunks(weight):
        piece = in_blocks(weight[rows], block)
        values[rows], scales[rows], zeros[rows], errors = best_range(piece, type_)
        lost += total(errors)
    return join_rounded(values, scales, zeros, relative(lost, weight))


def join_rounded(
    values: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    error: float,
    offsets: np.ndarray | None = None,
) -> Rounded:
    """Pack 4-bit values uint8 [outputs, blocks, block] and zero points [outputs, blocks]."""
    if zeros is not None:
        zeros = _pack(np.pad(zeros.astype(np.uint8), ((0, 0), (0, zeros.shape[1] % 2))))
    return Rounded(_pack(values), scales, zeros, error, offsets)


def side_by_side(parts: Sequence[Rounded]) -> Rounded:
    """Concatenate the outputs of weights with the same inputs, blocks and form.

    The result has the largest of their errors.
    """

    def joined_by(name: str) -> np.ndarray | None:
        if getattr(parts[0], name) is None:
            return None
        return np.concatenate([getattr(part, name) for part in parts])

    names = ("data", "scales", "zero_points", "offsets", "multiples")
    whole = {name: joined_by(name) for name in names}
    return Rounded(**whole, error=max(part.error for part in parts))  # type: ignore[arg-type]


def best_range(
    piece: np.ndarray, type_: np.dtype, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round [n, blocks, block] with the best clipping of each block's range.

    Args:
        importance: Weights of the squared errors of inputs, [blocks, block]. Default: equal.

    Returns:
        uint8 values, and scales, zero points and squared errors [n, blocks].
    """
    importance = np.ones(piece.shape[1:], np.float32) if importance is None else importance
    low = np.minimum(piece.min(-1), 0)
    high = np.maximum(piece.max(-1), 0)
    best = _round_between(piece, low, high, type_, importance)
    for clip in CLIPS[1:]:
        factor = np.float32(clip)
        clipped = _round_between(piece, low * factor, high * factor, type_, importance)
        _keep_better(best, clipped)
    return best


def _keep_better(best: Sequence[np.ndarray], candidates: Sequence[np.ndarray]) -> None:
    """Replace blocks of `best` by those of `candidates` with smaller errors, the last array."""
    better = candidates[-1] < best[-1]
    for chosen, candidate in zip(best, candidates, strict=True):
        chosen[better] = candidate[better]


def _round_between(
    piece: np.ndarray, low: np.ndarray, high: np.ndarray, type_: np.dtype, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round to 16 even steps from `low` to `high`, both [n, blocks].

    The scale is then fitted to the values by least squares.
    """
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


def dequantize(rounded: Rounded) -> np.ndarray:
    """Dequantize 4-bit `rounded` to float32 [outputs, blocks * block]."""
    assert rounded.zero_points is not None
    values = unpacked(rounded.data).astype(np.float32)
    zeros = unpacked(rounded.zero_points)[:, : rounded.data.shape[1]]
    dequantized: np.ndarray = (values - zeros[..., None]) * rounded.scales[..., None].astype(
        np.float32
    )
    return dequantized.reshape(len(values), -1)


def unpacked(data: np.ndarray) -> np.ndarray:
    """Unpack two values per byte, the low half first, along the last axis."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)


def _pack(values: np.ndarray) -> np.ndarray:
    """Pack pairs of 4-bit values along the last axis, the first in the low half."""
    packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return packed


def in_blocks(rows: np.ndarray, block: int) -> np.ndarray:
    """Split into blocks, the last padded with zeros: [n, inputs] -> [n, blocks, block]."""
    padded = np.pad(np.asarray(rows, np.float32), ((0, 0), (0, -rows.shape[1] % block)))
    return padded.reshape(len(rows), -1, block)


def at_least(exact: np.ndarray, type_: np.dtype) -> np.ndarray:
    """Convert float32 scales to the next larger number of a type, so that values stay in range.

    Scales of 0, of weights that are all 0, become 1.
    """
    rounded = np.where(exact > 0, exact, 1).astype(type_)
    above = np.nextafter(rounded, np.array(np.inf, type_))
    return np.where(rounded.astype(np.float32) < exact, above, rounded)


# Largest distance of a value from its step, in steps. Rounding to bfloat16 can move it this far. 32
# values are not this close by chance.
TOLERANCE = 1 / 16
MAX_STEPS = 15
# Outputs that are checked first, because most weights are not on a grid.
FIRST = 4


def on_grid(weight: np.ndarray, block: int, type_: np.dtype, offsets: bool) -> Rounded | None:
    """Return a weight [outputs, inputs] whose blocks already have at most 16 evenly spaced values.

    The result has the form of `round_4_bits`, or None for any other weight. If 0 is not among the
    values, blocks have `offsets` of type `type_`. If `offsets` is
    False, such a weight returns None.
    """
    outputs, inputs = weight.shape
    if inputs % block or _steps(weight[:FIRST].reshape(-1, block)) is None:
        return None
    blocks = inputs // block
    values = np.empty((outputs, blocks, block), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    starts = np.empty((outputs, blocks), np.float32)
    for rows in row_chunks(weight):
        grid = _steps(weight[rows].reshape(-1, block))
        if grid is None:
            return None
        for whole, part in zip((values, scales, starts), grid, strict=True):
            whole[rows] = part.reshape(whole[rows].shape)
    zeros = np.rint(-starts / scales)
    meets_zero = np.abs(starts + zeros * scales) <= TOLERANCE * scales
    rounded_scales = scales.astype(type_)
    if meets_zero.all() and zeros.min() >= 0 and zeros.max() <= MAX_STEPS:
        error = _error(weight, values, rounded_scales, -zeros * rounded_scales.astype(np.float32))
        return join_rounded(values, rounded_scales, zeros, error)
    if not offsets:
        return None
    rounded_starts = starts.astype(type_)
    error = _error(weight, values, rounded_scales, rounded_starts.astype(np.float32))
    return join_rounded(values, rounded_scales, None, error, rounded_starts)


def _steps(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Express blocks float32 [n, block] as steps of even spacing.

    Returns uint8 steps [n, block], spacing [n] and start [n]. None if a block is not evenly spaced.
    """
    low = blocks.min(-1)
    high = blocks.max(-1)
    if not np.isfinite(high - low).all():
        return None
    (left,) = np.nonzero(high > low)
    # A block of one value has one step, from 0.
    values = np.repeat((low > 0).astype(np.uint8)[:, None], blocks.shape[1], axis=1)
    spacing = np.where(low == 0, 1, np.abs(low)).astype(np.float32)
    low = np.where(high > low, low, np.minimum(low, 0))
    for count in range(MAX_STEPS, 0, -1):
        between = (high[left] - low[left]) / count
        steps = (blocks[left] - low[left, None]) / between[:, None]
        nearest = np.rint(steps)
        good = np.abs(steps - nearest).max(-1, initial=0) <= TOLERANCE
        values[left[good]] = nearest[good]
        spacing[left[good]] = between[good]
        left = left[~good]
        if not len(left):
            return values, spacing, low
    return None


def _error(weight: np.ndarray, values: np.ndarray, scales: np.ndarray, starts: np.ndarray) -> float:
    """Return |W - values * scales - starts| / |W|."""
    lost = 0.0
    for rows in row_chunks(weight):
        restored = values[rows] * scales[rows, :, None].astype(np.float32) + starts[rows, :, None]
        lost += total(np.square(restored.reshape(weight[rows].shape) - weight[rows]))
    return relative(lost, weight)


# Type and largest value of each format.
TYPES: dict[TensorFormat, tuple[np.dtype, int]] = {
    "int8": (np.dtype(np.int8), 127),
    "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448),
}
INT4 = np.dtype(ml_dtypes.int4)


def round_rows(weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> Rounded:
    """Round float32 [outputs, inputs] to int8 or float8_e4m3fn, with scales [outputs] of type
    `scales`.
    """
    kind, peak = TYPES[format_]
    data = np.empty(weight.shape, kind)
    steps = at_least(np.abs(weight).max(axis=1) / peak, scales)
    lost = 0.0
    for rows in row_chunks(weight):
        scale = steps[rows, None].astype(np.float32)
        values = weight[rows] / scale
        data[rows] = np.rint(values) if kind == np.int8 else values
        lost += total(np.square(data[rows].astype(np.float32) * scale - weight[rows]))
    return Rounded(data, steps, None, relative(lost, weight))


def round_blocks(weight: np.ndarray, block: int, scales: np.dtype) -> Rounded:
    """Round float32 [outputs, inputs] to int4, with scales [outputs, inputs / block]."""
    data = np.empty(weight.shape, INT4)
    lost = 0.0
    steps = np.empty((len(weight), weight.shape[1] // block), scales)
    for rows in row_chunks(weight):
        piece = weight[rows].reshape(-1, steps.shape[1], block)
        values, steps[rows], errors = _best_clip(piece, scales)
        data[rows] = values.reshape(len(piece), -1)
        lost += total(errors)
    return Rounded(data, steps, None, relative(lost, weight))


def _best_clip(piece: np.ndarray, type_: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round [n, blocks, block] to -8..7 with the best range of each block.

    Returns values, and scales and squared errors [n, blocks].
    """
    peak = np.abs(piece).max(-1)
    # -8 has no positive counterpart, so the larger of the two ends may use it.
    best = _round(piece, peak / 7, type_)
    for end in (7.5, *(7 / clip for clip in CLIPS[1:])):
        _keep_better(best, _round(piece, peak / np.float32(end), type_))
    return best


def _round(
    piece: np.ndarray, scale: np.ndarray, type_: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round to even steps of `scale` [n, blocks], then fit the scale by least squares."""
    values = np.clip(np.rint(piece / np.where(scale > 0, scale, 1)[..., None]), -8, 7)
    power = np.square(values).sum(-1)
    fitted = np.where(power > 0, (values * piece).sum(-1) / np.maximum(power, 1), 1)
    steps = at_least(fitted.astype(np.float32), type_)
    errors = np.square(values * steps[..., None].astype(np.float32) - piece).sum(-1)
    return values.astype(INT4), steps, errors


# 4-bit weights have blocks of 32, or larger ones if the error stays below EASY. Blocks of 16 would
# take 1.5 times as long.
BLOCK = 32
LARGER_BLOCKS = (64, 128)
EASY = 0.06


@dataclass(frozen=True)
class IntegerScheme:
    """Block formats for operators that read quantized weights.

    A weight whose relative error exceeds its limit gets the `higher` format, or stays as it is if
    there is none. Normal weights lose 0.078 in 4 bits and 0.008 in 8. Outliers cost more.

    Attributes:
        blocks: Block sizes for 8 bits. The largest that divides the inputs is used, else 32. Fewer
            scales are faster and cost little quality (docs/precision.md).
        offsets: The operators read offsets with 4 bits.
    """

    blocks: tuple[int, ...] = (128, 64)
    offsets: bool = False
    limits: ClassVar[Mapping[TensorFormat, float]] = {"int4": 0.12, "int8-block": 0.03}
    higher: ClassVar[Mapping[TensorFormat, TensorFormat]] = {"int4": "int8-block"}

    def round(
        self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype
    ) -> tuple[Rounded, int]:
        """Round float32 [outputs, inputs] to a format, with scales of type `scales`.

        Returns the weight, and the number of inputs that share a scale (0: all).
        """
        if format_ == "int8-block":
            block = next((size for size in self.blocks if weight.shape[1] % size == 0), BLOCK)
            return round_8_bits(weight, block, scales), block
        unchanged = on_grid(weight, BLOCK, scales, self.offsets)
        if unchanged is not None:
            return unchanged, BLOCK
        rounded = round_4_bits(weight, BLOCK, scales)
        block = BLOCK
        for larger in LARGER_BLOCKS:
            if rounded.error > EASY:
                break
            candidate = round_4_bits(weight, larger, scales)
            if candidate.error <= EASY:
                rounded = candidate
                block = larger
        return rounded, block

    def keeps(self, weight: np.ndarray, scales: np.dtype) -> bool:
        """Return True if a weight has 4-bit values already, which `round` keeps."""
        return on_grid(weight, BLOCK, scales, self.offsets) is not None


class SymmetricScheme:
    """Formats for weights that a graph widens before a product with DequantizeLinear.

    They have no zero points, which TensorRT does not support. Normal weights lose 0.10 in 4 bits,
    0.026 in fp8 and 0.008 in 8 bits.
    """

    limits: ClassVar[Mapping[TensorFormat, float]] = {"int4": 0.15, "fp8": 0.05, "int8": 0.03}
    higher: ClassVar[Mapping[TensorFormat, TensorFormat]] = {"int4": "int8"}
    # The largest that divides the inputs: TensorRT does not support partial blocks.
    blocks = (64, 32)

    def round(
        self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype
    ) -> tuple[Rounded, int]:
        """Round a weight. See `IntegerScheme.round`."""
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
