"""Weights in the layout of our own operators, and those that keep the form of their file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from graphs.quantization.rounding import Rounded, pieces, unpacked
from runtime.bundle.manifest import TensorFormat

BITS: dict[TensorFormat, int] = {"int4": 4, "int5": 5, "int6": 6, "int8-block": 8}
# Outputs that stand together, and inputs that share a scale of the activations.
PANEL, GROUP = 16, 32


@dataclass(frozen=True)
class InFile:
    """A weight [outputs, inputs] whose values the file has as integers with scales, which our operators read as they
    are: `kind` is the file's name of that, `block` the inputs that share a scale. `read` gives it as `in_panels` takes
    it."""

    kind: str
    format: TensorFormat
    block: int
    read: Callable[[], Rounded]


def in_panels(rounded: Rounded, inputs: int, bits: int) -> Rounded:
    """A weight [outputs, inputs] in blocks: `data` uint8 [panels, groups, bytes], `scales`, `offsets`, `multiples` and
    uint8 `zero_points` [panels, blocks, 16]. The last panel is filled up with outputs of scale 0. `rounded` has two
    values of 4 bits in a byte, and one of 5, 6 and 8 bits."""
    outputs = len(rounded.scales)
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    data = np.zeros((panels * PANEL, groups, GROUP * bits // 8), np.uint8)
    for rows in pieces(rounded.data.reshape(outputs, -1)):
        piece = rounded.data[rows]
        values = (unpacked(piece) if bits == 4 else piece).reshape(len(piece), -1)[:, : groups * GROUP]
        quads = values.reshape(len(piece), groups, GROUP // 4, 4)
        if bits < 8:  # the even quads of inputs low, the odd ones high; then what 4 bits do not hold
            low = quads[:, :, 0::2] & 15 | quads[:, :, 1::2] << 4
            quads = np.concatenate([low, *_planes(quads >> 4, bits)], axis=2)
        data[rows] = quads.reshape(len(piece), groups, -1)
    # [panel, output, group, quad, byte] -> [panel, group, quad, output, byte]
    ordered = data.reshape(panels, PANEL, groups, bits, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(ordered).reshape(panels, groups, -1)
    zeros, multiples = rounded.zero_points, rounded.multiples
    if zeros is not None:
        zeros = _by_panel(unpacked(zeros)[:, : rounded.scales.shape[1]], panels)
    offsets = None if rounded.offsets is None else _by_panel(rounded.offsets, panels)
    if multiples is not None:
        multiples = _by_panel(multiples.reshape(outputs, -1), panels)
    return Rounded(packed, _by_panel(rounded.scales, panels), zeros, rounded.error, offsets, multiples)


def _planes(above: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """The bits that [n, groups, 8, 4] have beyond 4, of as many quads in a byte as it holds: [n, groups, 1, 4] each."""
    if (each := bits - 4) > 0:
        shifts = np.arange(0, 8, each, dtype=np.uint8)[:, None]
        for first in range(0, 8, len(shifts)):
            yield np.bitwise_or.reduce(above[:, :, first : first + len(shifts)] << shifts, axis=2, keepdims=True)


def _by_panel(values: np.ndarray, panels: int) -> np.ndarray:
    """[outputs, blocks] -> [panels, blocks, 16]."""
    padded = np.zeros((panels * PANEL, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, -1).transpose(0, 2, 1))
