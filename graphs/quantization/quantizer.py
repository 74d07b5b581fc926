"""Weights in the format that their engine asks for, or in a higher one where they would lose too much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphs.graph import STACK
from graphs.quantization.panels import BITS, InFile, in_panels
from graphs.quantization.rounding import BLOCK, Rounded, Scheme, round_4_bits, side_by_side
from graphs.weights import WeightFile
from runtime.bundle.manifest import EnginePrecision, HigherTensor, TensorFormat

FLOATS: dict[ir.DataType, TensorFormat] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}
# Errors of weights that had 4 bits already, and were not rounded; a bell loses 0.078.
KEPT = 0.01
# Operands of an operator that multiplies with a quantized weight, in this order.
OPERANDS = ("data", "scales", "zero_points", "offsets", "multiples")


@dataclass(frozen=True)
class Stored:
    """A weight in the weight file: of `OPERANDS` those that it has, or none where it stays as it is, in fp32 or what
    its engine computes in. `lost` is its relative error in the format that was wanted, `error` in the one
    that it got. `kind`: what its file calls its bits, which it kept."""

    format: TensorFormat
    operands: Mapping[str, ir.ExternalTensor]
    block: int
    bytes: int
    lost: float
    error: float
    kind: str = ""

    @property
    def rounded(self) -> bool:
        return bool(self.operands)

    @property
    def kept(self) -> bool:
        """In bits that the checkpoint had already."""
        return bool(self.kind) or (self.format == "int4" and self.error <= KEPT)


class Quantizer:
    """Rounds tensors one at a time into a weight file, each once a format, and remembers what became of them. `own`:
    linear layers in the layout of our own operators, with scales in fp16; else scales are of the weight's type.
    `given`: weights that are in 4 bits already, by the names of their tensors. `in_file`: of a tensor's name, how the
    checkpoint has it, where that is to stay; of linear layers and tables for our own operators."""

    def __init__(
        self,
        weights: WeightFile,
        scheme: Scheme,
        own: bool = False,
        given: Mapping[str, Rounded] = MappingProxyType({}),
        in_file: Callable[[str], InFile | None] = lambda _: None,
    ) -> None:
        self._weights, self._scheme, self._own, self._given = weights, scheme, own, given
        self._in_file = in_file
        self._stored: dict[tuple[str, TensorFormat], Stored] = {}
        self._kept = False
        # What engines came to, for the manifest.
        self.engines: list[EnginePrecision] = []
        self.higher: list[HigherTensor] = []

    def store(self, tensor: ir.LazyTensor, wanted: TensorFormat, of_checkpoint: bool = False) -> Stored:
        """A tensor [outputs, inputs] as `wanted`, or as the next format that keeps it within its limit. One
        `of_checkpoint` whose others had 4 bits already has more for a reason, and is not rounded to 4."""
        assert tensor.name is not None
        kind = FLOATS[tensor.dtype]
        # Scales of another type mean other values.
        name = tensor.name if kind == "fp32" else f"{tensor.name}.{kind}"
        if (name, wanted) not in self._stored:
            self._stored[name, wanted] = self._choose(name, tensor, wanted, of_checkpoint and self._kept)
        return self._stored[name, wanted]

    def kind(self, name: str) -> str:
        """The name that the file has for the bits of a tensor that are to stay; empty where none are."""
        found = self._in_file(name) if self._own else None
        return "" if found is None else found.kind

    def keeps(self, tensor: ir.LazyTensor) -> bool:
        """Whether a tensor has 4 bits already, which stay as they are."""
        return self._scheme.keeps(tensor.numpy(), self._scales(tensor))

    def _scales(self, tensor: ir.LazyTensor) -> np.dtype:
        return np.dtype(np.float16) if self._own else tensor.dtype.numpy()

    def store_table(self, tensor: ir.LazyTensor) -> Stored:
        """A table [rows, d] whose rows are looked up: uint8 [rows, d] in blocks, and their scales."""
        assert tensor.name is not None
        key: tuple[str, TensorFormat] = (f"{tensor.name}.rows", "int8-block")
        if key not in self._stored:
            array = tensor.numpy()
            rounded, block = self._scheme.round(array, "int8-block", np.dtype(np.float32))
            flat = np.ascontiguousarray(rounded.data.reshape(len(array), -1)[:, : array.shape[1]])
            table = Rounded(flat, rounded.scales, None, rounded.error)
            self._stored[key] = self._write(key[0], "int8-block", table, block, rounded.error)
        return self._stored[key]

    def _choose(self, name: str, tensor: ir.LazyTensor, wanted: TensorFormat, kept_alone: bool) -> Stored:
        names = str(tensor.name).split(STACK)
        if (kind := self.kind(names[0])) and all(self.kind(part) == kind for part in names):
            return self._as_in_file(name, names, int(tensor.shape.numpy()[1]))
        format_: TensorFormat | None = wanted
        scheme, lost = self._scheme, None
        # What a graph reads is float32, whatever type it is written in.
        array = tensor.numpy()
        fitted = any(part in self._given for part in name.split(STACK))
        while format_ is not None and format_ in scheme.limits:
            rounded, block = scheme.round(array, format_, self._scales(tensor))
            lost = rounded.error if lost is None else lost
            limit = KEPT if format_ == "int4" and kept_alone and not fitted else scheme.limits[format_]
            if rounded.error <= limit:
                self._kept = self._kept or (format_ == "int4" and rounded.error <= KEPT)
                if format_ == "int4" and fitted:
                    # What verification may find is what the format loses; a fitted weight is further off, its outputs
                    # less.
                    rounded, block = replace(self._fitted(tensor, array), error=rounded.error), BLOCK
                if self._own:
                    rounded = in_panels(rounded, array.shape[1], BITS[format_])
                return self._write(name, format_, rounded, block, lost)
            format_ = scheme.higher.get(format_)
        return Stored(FLOATS[tensor.dtype], {}, 0, tensor.nbytes, lost or 0.0, 0.0)

    def _as_in_file(self, name: str, names: list[str], inputs: int) -> Stored:
        found = [part for each in names if (part := self._in_file(each)) is not None]
        whole = side_by_side([part.read() for part in found])
        one = found[0]
        packed = in_panels(whole, inputs, BITS[one.format])
        return replace(self._write(name, one.format, packed, one.block, 0.0), kind=one.kind)

    def _fitted(self, tensor: ir.LazyTensor, array: np.ndarray) -> Rounded:
        """The tensors that a weight is stacked of as they were given; those that were not, as without text."""
        parts, start = [], 0
        for name, rows in zip(str(tensor.name).split(STACK), tensor.meta.get(STACK, [len(array)]), strict=True):
            given = self._given.get(name)
            parts.append(given or round_4_bits(array[start : start + rows], BLOCK, self._scales(tensor)))
            start += rows
        return side_by_side(parts)

    def _write(self, name: str, format_: TensorFormat, rounded: Rounded, block: int, lost: float) -> Stored:
        parts = {part: getattr(rounded, part) for part in OPERANDS}
        add, given = self._weights.add, {part: array for part, array in parts.items() if array is not None}
        operands = {
            part: add(f"{name}.{format_}.{part}", ir.DataType.from_numpy(array.dtype), partial(np.asarray, array))
            for part, array in given.items()
        }
        size = sum(tensor.nbytes for tensor in operands.values())
        return Stored(format_, operands, block, size, lost, rounded.error)
