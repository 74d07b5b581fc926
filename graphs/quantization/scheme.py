"""How weights are quantized for the operators of a target: each format, how much it may lose, and what comes after
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphs.quantization.grid import on_grid
from graphs.quantization.rounding import Rounded, round_4_bits, round_8_bits
from graphs.quantization.symmetric import round_blocks, round_rows
from runtime.bundle.precision import TensorFormat


class Scheme(Protocol):
    """`limits`: relative errors of a weight above which it gets the `higher` format, or stays as it is where there is
    none."""

    @property
    def limits(self) -> Mapping[TensorFormat, float]: ...

    @property
    def higher(self) -> Mapping[TensorFormat, TensorFormat]: ...

    def round(self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> tuple[Rounded, int]:
        """[outputs, inputs] float32 in a format, with scales of that type; and how many inputs share one, 0 for all."""
        ...

    def keeps(self, weight: np.ndarray, scales: np.dtype) -> bool:
        """Whether a weight has 4 bits already, which `round` leaves as they are."""
        ...


# Weights that are spread like a bell lose 0.078 in 4 bits and 0.008 in 8; outliers cost more.
LIMITS: dict[TensorFormat, float] = {"int4": 0.12, "int8-block": 0.03}
HIGHER: dict[TensorFormat, TensorFormat] = {"int4": "int8-block"}
# 4 bits come in blocks of 32, or larger ones where a weight bears it: 16 would take half as long again.
BLOCK, LARGER_BLOCKS, EASY = 32, (64, 128), 0.06
# 8 bits come in the largest of these that divides the inputs, else in blocks of 32: fewer scales are faster, and lose
# hardly more (docs/precision.md).
BLOCKS_OF_8_BITS = (128, 64)


@dataclass(frozen=True)
class IntegerScheme:
    """For operators that read weights in blocks. `blocks`: of 8 bits, besides 32. `offsets`: of 4 bits they read those
    too."""

    blocks: tuple[int, ...] = BLOCKS_OF_8_BITS
    offsets: bool = False

    @property
    def limits(self) -> Mapping[TensorFormat, float]:
        return LIMITS

    @property
    def higher(self) -> Mapping[TensorFormat, TensorFormat]:
        return HIGHER

    def round(self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> tuple[Rounded, int]:
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
        return on_grid(weight, BLOCK, scales, self.offsets) is not None


# What a bell loses here: 0.10 in 4 bits, 0.026 in fp8, 0.008 in 8 bits.
SYMMETRIC_LIMITS: dict[TensorFormat, float] = {"int4": 0.15, "fp8": 0.05, "int8": 0.03}
# The largest block that divides the inputs: TensorRT takes no part of one.
SYMMETRIC_BLOCKS = (64, 32)


@dataclass(frozen=True)
class SymmetricScheme:
    """For weights that a graph widens before a product: DequantizeLinear, without zero points, which TensorRT does not
    take."""

    @property
    def limits(self) -> Mapping[TensorFormat, float]:
        return SYMMETRIC_LIMITS

    @property
    def higher(self) -> Mapping[TensorFormat, TensorFormat]:
        return {"int4": "int8"}

    def round(self, weight: np.ndarray, format_: TensorFormat, scales: np.dtype) -> tuple[Rounded, int]:
        if format_ != "int4":
            return round_rows(weight, format_, scales), 0
        block = next((size for size in SYMMETRIC_BLOCKS if weight.shape[1] % size == 0), 0)
        if not block:
            nothing = np.empty(0, np.int8)
            return Rounded(nothing, nothing, None, error=1.0), 0
        return round_blocks(weight, block, scales), block

    def keeps(self, weight: np.ndarray, scales: np.dtype) -> bool:
        return False
