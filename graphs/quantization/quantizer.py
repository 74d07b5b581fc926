"""Weights in the format that their engine asks for, or in a higher one where they would lose too much."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from graphs.quantization.rounding import Rounded, round_4_bits, round_8_bits, round_channels
from graphs.weights import WeightFile
from runtime.precision import EnginePrecision, HigherTensor, Int8Range, Quantization, TensorFormat

# Relative errors of a weight above which it gets the next higher format. Weights that are spread like a bell lose 0.078
# in 4 bits, 0.008 in 8 by channel, or 0.016 with the range halved; outliers, alone in their channel, cost more.
LIMITS: dict[TensorFormat, float] = {"int4": 0.12, "int8": 0.03, "int8-block": 0.03}
NEXT: dict[TensorFormat, TensorFormat] = {"int4": "int8", "int8": "int8-block", "int8-block": "fp32"}
# 4 bits come in blocks of 32, or larger ones where a weight bears it: 16 would take half as long again.
BLOCK, LARGER_BLOCKS, EASY = 32, (64, 128), 0.06


@dataclass(frozen=True)
class Stored:
    """A weight in the weight file: the operands of the operator for its format, or none for "fp32", which stays where
    it is. `lost` is its relative error in the format that was wanted, `error` in the one that it got."""

    format: TensorFormat
    operands: tuple[ir.ExternalTensor, ...]
    block: int
    bytes: int
    lost: float
    error: float


class Quantizer:
    """Rounds tensors one at a time into a weight file, each once a format, and remembers what became of them."""

    def __init__(self, weights: WeightFile, int8_range: Int8Range) -> None:
        self.int8_range = int8_range
        self._weights = weights
        self._stored: dict[tuple[str, TensorFormat], Stored] = {}
        self._engines: list[EnginePrecision] = []
        self._higher: list[HigherTensor] = []

    def store(self, tensor: ir.LazyTensor, wanted: TensorFormat) -> Stored:
        """A float32 tensor [outputs, inputs] as `wanted`, or as the next format that keeps it within its limit."""
        assert tensor.name is not None
        key = (tensor.name, wanted)
        if key not in self._stored:
            self._stored[key] = self._choose(tensor.name, tensor.numpy(), wanted)
        return self._stored[key]

    def store_table(self, tensor: ir.LazyTensor) -> Stored:
        """A table [rows, d] whose rows are looked up: uint8 [rows, d] in blocks of 32, and their scales."""
        assert tensor.name is not None
        key: tuple[str, TensorFormat] = (f"{tensor.name}.rows", "int8-block")
        if key not in self._stored:
            array = tensor.numpy()
            rounded = round_8_bits(array, BLOCK)
            flat = np.ascontiguousarray(rounded.data.reshape(len(array), -1)[:, : array.shape[1]])
            table = Rounded(flat, rounded.scales, None, rounded.error)
            self._stored[key] = self._write(key[0], "int8-block", table, BLOCK, rounded.error)
        return self._stored[key]

    def record(self, precision: EnginePrecision, higher: list[HigherTensor]) -> None:
        """Note what an engine came to, for the manifest."""
        self._engines.append(precision)
        self._higher.extend(higher)

    @property
    def report(self) -> Quantization:
        return Quantization(self.int8_range, tuple(self._engines), tuple(self._higher))

    def _choose(self, name: str, array: np.ndarray, wanted: TensorFormat) -> Stored:
        format_, lost = wanted, None
        while format_ != "fp32":
            rounded, block = self._round(array, format_)
            lost = rounded.error if lost is None else lost
            if rounded.error <= LIMITS[format_]:
                return self._write(name, format_, rounded, block, lost)
            format_ = NEXT[format_]
        return Stored("fp32", (), 0, array.nbytes, lost or 0.0, 0.0)

    def _round(self, array: np.ndarray, format_: TensorFormat) -> tuple[Rounded, int]:
        if format_ == "int8":
            return round_channels(array, self.int8_range), 0
        if format_ == "int8-block":
            return round_8_bits(array, BLOCK), BLOCK
        rounded, block = round_4_bits(array, BLOCK), BLOCK
        for larger in LARGER_BLOCKS:
            if rounded.error > EASY:
                break
            candidate = round_4_bits(array, larger)
            if candidate.error <= EASY:
                rounded, block = candidate, larger
        return rounded, block

    def _write(self, name: str, format_: TensorFormat, rounded: Rounded, block: int, lost: float) -> Stored:
        parts = {"data": rounded.data, "scales": rounded.scales, "zero_points": rounded.zero_points}
        operands = tuple(
            self._weights.add(
                f"{name}.{format_}.{part}", ir.DataType.from_numpy(array.dtype), partial(np.asarray, array)
            )
            for part, array in parts.items()
            if array is not None
        )
        return Stored(format_, operands, block, sum(tensor.nbytes for tensor in operands), lost, rounded.error)
