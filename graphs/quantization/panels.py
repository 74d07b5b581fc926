"""Quantized weights in the layout that our own operators read (runtime/kernels/source/packed_linear.h)."""

from __future__ import annotations

import numpy as np

from graphs.quantization.pieces import pieces
from graphs.quantization.rounding import Rounded, unpacked
from runtime.bundle.precision import TensorFormat

BITS: dict[TensorFormat, int] = {"int4": 4, "int8-block": 8}
# Outputs that stand together, and inputs that share a scale of the activations.
PANEL, GROUP = 16, 32


def packed(rounded: Rounded, inputs: int, format_: TensorFormat) -> Rounded:
    """See graphs.quantization.quantizer.Layout."""
    return in_panels(rounded, inputs, BITS[format_])


def in_panels(rounded: Rounded, inputs: int, bits: int) -> Rounded:
    """A weight [outputs, inputs] of `round_4_bits` or `round_8_bits`: `data` uint8 [panels, groups, bytes], `scales`,
    `offsets` and uint8 `zero_points` [panels, blocks, 16]. The last panel is filled up with outputs of scale 0."""
    outputs, blocks = rounded.scales.shape
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    data = np.zeros((panels * PANEL, groups, GROUP * bits // 8), np.uint8)
    for rows in pieces(rounded.data.reshape(outputs, -1)):
        data[rows] = _halves(rounded.data[rows], groups, bits)
    # [panel, output, group, quad, byte] -> [panel, group, quad, output, byte]
    ordered = data.reshape(panels, PANEL, groups, bits, 4).transpose(0, 2, 3, 1, 4)
    zeros = None if rounded.zero_points is None else _by_panel(unpacked(rounded.zero_points)[:, :blocks], panels)
    packed = np.ascontiguousarray(ordered).reshape(panels, groups, -1)
    offsets = None if rounded.offsets is None else _by_panel(rounded.offsets, panels)
    return Rounded(packed, _by_panel(rounded.scales, panels), zeros, rounded.error, offsets)


def _halves(data: np.ndarray, groups: int, bits: int) -> np.ndarray:
    """[n, blocks, bytes] -> uint8 [n, groups, bytes]: of 4 bits the even quads of inputs low, the odd ones high."""
    values = (data if bits == 8 else unpacked(data)).reshape(len(data), -1)[:, : groups * GROUP]
    if bits == 8:
        return values.reshape(len(data), groups, GROUP)
    quads = values.reshape(len(data), groups, GROUP // 8, 2, 4)
    halves: np.ndarray = (quads[..., 0, :] | quads[..., 1, :] << 4).reshape(len(data), groups, -1)
    return halves


def _by_panel(values: np.ndarray, panels: int) -> np.ndarray:
    """[outputs, blocks] -> [panels, blocks, 16]."""
    padded = np.zeros((panels * PANEL, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, -1).transpose(0, 2, 1))
