"""Weights in the layout of this project's kernels: quantized, as in their file, or as floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from graphs.quantization.rounding import Rounded, relative, row_chunks, total, unpacked
from runtime.bundle.quantization import TensorFormat

# Formats of floats, the first preferred.
FLOAT_DTYPES: dict[TensorFormat, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
BITS: dict[TensorFormat, int] = {"int4": 4, "int5": 5, "int6": 6, "int8-block": 8}
BITS |= {format_: 8 * dtype.itemsize for format_, dtype in FLOAT_DTYPES.items()}
PANEL = 16  # outputs stored together
GROUP = 32  # inputs that share a scale of the activations


@dataclass(frozen=True)
class InFile:
    """A weight [outputs, inputs] whose quantized values the kernels read as the file stores them.

    Attributes:
        kind: Name of the format in the file.
        format: Name of the format in a bundle.
        block: Inputs that share a scale.
        read: Returns the weight in the form that `in_panels` takes.
    """

    kind: str
    format: TensorFormat
    block: int
    read: Callable[[], Rounded]


def in_panels(rounded: Rounded, inputs: int, bits: int) -> Rounded:
    """Lay out a weight [outputs, inputs] in panels of 16 outputs.

    The last panel is padded with outputs of scale 0.

    Args:
        rounded: Two values per byte for 4 bits, one value per byte for 5, 6 and 8 bits.
        inputs: Number of inputs.
        bits: Bits per value.

    Returns:
        `data` uint8 [panels, groups, bytes], and `scales`, `offsets`, `multiples` and uint8
            `zero_points`
        [panels, blocks, 16].
    """
    outputs = len(rounded.scales)
    panels = -(-outputs // PANEL)
    groups = -(-inputs // GROUP)
    data = np.zeros((panels * PANEL, groups, GROUP * bits // 8), np.uint8)
    for rows in row_chunks(rounded.data.reshape(outputs, -1)):
        piece = rounded.data[rows]
        values = unpacked(piece) if bits == 4 else piece
        values = values.reshape(len(piece), -1)[:, : groups * GROUP]
        quads = values.reshape(len(piece), groups, GROUP // 4, 4)
        if bits < 8:
            # Even quads of inputs in the low halves of bytes, odd ones in the high halves. Further
            # bits follow.
            low = quads[:, :, 0::2] & 15 | quads[:, :, 1::2] << 4
            quads = np.concatenate([low, *_planes(quads >> 4, bits)], axis=2)
        data[rows] = quads.reshape(len(piece), groups, -1)
    # [panel, output, group, quad, byte] -> [panel, group, quad, output, byte]
    ordered = data.reshape(panels, PANEL, groups, bits, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(ordered).reshape(panels, groups, -1)
    zeros = rounded.zero_points
    multiples = rounded.multiples
    if zeros is not None:
        zeros = _by_panel(unpacked(zeros)[:, : rounded.scales.shape[1]], panels)
    offsets = None if rounded.offsets is None else _by_panel(rounded.offsets, panels)
    if multiples is not None:
        multiples = _by_panel(multiples.reshape(outputs, -1), panels)
    scales = _by_panel(rounded.scales, panels)
    return Rounded(packed, scales, zeros, rounded.error, offsets, multiples)


def narrowest(weight: np.ndarray) -> TensorFormat:
    """Return the narrowest format of floats that has all values of a float32 weight."""

    def has_all(dtype: np.dtype) -> bool:
        pieces = (weight[rows] for rows in row_chunks(weight))
        return all(
            np.array_equal(piece.astype(dtype).astype(np.float32), piece) for piece in pieces
        )

    with np.errstate(over="ignore"):
        return next(format_ for format_, dtype in FLOAT_DTYPES.items() if has_all(dtype))


def error_in_fp16(weight: np.ndarray) -> float:
    """Return the relative error of a float32 weight in float16. Infinite beyond its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        lost = sum(
            total(np.square(weight[rows].astype(np.float16).astype(np.float32) - weight[rows]))
            for rows in row_chunks(weight)
        )
    return relative(lost, weight)


def floats_in_panels(weight: np.ndarray, format_: TensorFormat) -> np.ndarray:
    """Lay out a float32 weight [outputs, inputs] in panels of 16 outputs, padded with zeros.

    Returns:
        uint8 [panels, groups, bytes]: values [32 inputs][16 outputs], rounded to `format_`.
    """
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    groups = -(-inputs // GROUP)
    packed = np.zeros((panels, groups * GROUP, PANEL), FLOAT_DTYPES[format_])
    for panel in range(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        packed[panel, :inputs, : len(rows)] = rows.T
    return packed.view(np.uint8).reshape(panels, groups, -1)


def _planes(above: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Pack the bits beyond 4 of values [n, groups, 8, 4]. Yields bytes [n, groups, 1, 4]."""
    extra = bits - 4
    if extra > 0:
        shifts = np.arange(0, 8, extra, dtype=np.uint8)[:, None]
        for first in range(0, 8, len(shifts)):
            shifted = above[:, :, first : first + len(shifts)] << shifts
            yield np.bitwise_or.reduce(shifted, axis=2, keepdims=True)


def _by_panel(values: np.ndarray, panels: int) -> np.ndarray:
    """Group outputs into panels: [outputs, blocks] -> [panels, blocks, 16]."""
    padded = np.zeros((panels * PANEL, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, -1).transpose(0, 2, 1))
