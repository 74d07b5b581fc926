"""Quantizes weights to the requested format, or to a higher one if the error would be too large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphs.graph import STACK
from graphs.quantization.panels import (
    BITS,
    FLOAT_DTYPES,
    GROUP,
    InFile,
    error_in_fp16,
    floats_in_panels,
    in_panels,
    narrowest,
)
from graphs.quantization.rounding import BLOCK, Rounded, Scheme, round_4_bits, side_by_side
from graphs.weights import WeightFile
from runtime.bundle.quantization import EnginePrecision, HigherTensor, TensorFormat

FLOATS: dict[ir.DataType, TensorFormat] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}
# Error up to which a weight had 4-bit values already. Rounding normal weights gives 0.078.
KEPT = 0.01
# Relative error up to which a weight is stored in float16. Rounding normal weights gives 0.0002.
# Weights with values beyond its range, or with most of them below it, lose more.
FLOAT16_LIMIT = 0.001
# Operands of operators on quantized weights, in their order.
OPERANDS = ("data", "scales", "zero_points", "offsets", "multiples")


@dataclass(frozen=True)
class Stored:
    """A weight in the weight file.

    Attributes:
        format: Format that the weight has.
        operands: Its tensors, a subset of `OPERANDS`. Empty if the weight is not quantized, nor
            laid out for this project's kernels.
        block: Inputs that share a scale.
        bytes: Size of all tensors.
        lost: Relative error in the requested format.
        error: Relative error in `format`.
        kind: Name of the format in the checkpoint file, if the weight keeps its bits.
    """

    format: TensorFormat
    operands: Mapping[str, ir.ExternalTensor]
    block: int
    bytes: int
    lost: float
    error: float
    kind: str = ""

    @property
    def replaces(self) -> bool:
        """True if operators read these tensors instead of the weight."""
        return bool(self.operands)

    @property
    def kept(self) -> bool:
        """True if the weight has the bits that it had in the checkpoint."""
        return bool(self.kind) or (self.format == "int4" and self.error <= KEPT)


class Quantizer:
    """Quantizes tensors one at a time into a weight file, and records the results.

    A tensor is stored once per format.

    Args:
        weights: File that receives the tensors.
        scheme: Rounds weights.
        own: Store linear layers in the layout of this project's kernels, with fp16 scales.
            Otherwise scales have the type of the weight.
        given: Weights that are already rounded to 4 bits, by tensor name.
        in_file: Returns the quantized form of a tensor in the checkpoint, if it should be kept,
            else None. For linear layers and tables of this project's kernels.
    """

    def __init__(
        self,
        weights: WeightFile,
        scheme: Scheme,
        own: bool = False,
        given: Mapping[str, Rounded] = MappingProxyType({}),
        in_file: Callable[[str], InFile | None] = lambda _: None,
    ) -> None:
        self._weights = weights
        self._scheme = scheme
        self._own = own
        self._given = given
        self._in_file = in_file
        self._stored: dict[tuple[str, TensorFormat], Stored] = {}
        self._kept = False
        # Results by engine, for the manifest.
        self.engines: list[EnginePrecision] = []
        self.higher: list[HigherTensor] = []

    def store(
        self, tensor: ir.LazyTensor, wanted: TensorFormat, of_checkpoint: bool = False
    ) -> Stored:
        """Store a tensor [outputs, inputs] as `wanted`, or in the next format within its error
        limit.

        Args:
            of_checkpoint: The checkpoint may have 4-bit weights already. If others of its weights
                have, this one has more bits for a reason and is not rounded to 4 bits.
        """
        assert tensor.name is not None
        kind = FLOATS[tensor.dtype]
        # Values depend on the type of the scales.
        name = tensor.name if kind == "fp32" else f"{tensor.name}.{kind}"
        if (name, wanted) not in self._stored:
            kept_alone = of_checkpoint and self._kept
            self._stored[name, wanted] = self._choose(name, tensor, wanted, kept_alone)
        return self._stored[name, wanted]

    @property
    def formats(self) -> dict[str, int]:
        """Number of weights by format: the name of that in the checkpoint file, or of ours."""
        counts = Counter[str]()
        for (name, _), stored in self._stored.items():
            counts[stored.kind or stored.format] += len(name.split(STACK))
        return dict(sorted(counts.items()))

    def kind(self, name: str) -> str:
        """Return the name of the format that a tensor keeps from its file, or an empty string."""
        tensor = self._in_file(name) if self._own else None
        return "" if tensor is None else tensor.kind

    def keeps(self, tensor: ir.LazyTensor) -> bool:
        """Return True if a tensor has 4-bit values already, which stay unchanged."""
        return self._scheme.keeps(tensor.numpy(), self._scales(tensor))

    def _scales(self, tensor: ir.LazyTensor) -> np.dtype:
        return np.dtype(np.float16) if self._own else tensor.dtype.numpy()

    def store_table(self, tensor: ir.LazyTensor) -> Stored:
        """Store a table [rows, d] for lookup of rows: uint8 [rows, d] in blocks, and scales."""
        assert tensor.name is not None
        key: tuple[str, TensorFormat] = (f"{tensor.name}.rows", "int8-block")
        if key not in self._stored:
            array = tensor.numpy()
            rounded, block = self._scheme.round(array, "int8-block", np.dtype(np.float32))
            flat = np.ascontiguousarray(rounded.data.reshape(len(array), -1)[:, : array.shape[1]])
            table = Rounded(flat, rounded.scales, None, rounded.error)
            self._stored[key] = self._write(key[0], "int8-block", table, block, rounded.error)
        return self._stored[key]

    def _choose(
        self, name: str, tensor: ir.LazyTensor, wanted: TensorFormat, kept_alone: bool
    ) -> Stored:
        names = str(tensor.name).split(STACK)
        if (kind := self.kind(names[0])) and all(self.kind(part) == kind for part in names):
            return self._as_in_file(name, names, int(tensor.shape.numpy()[1]))
        format_: TensorFormat | None = wanted
        scheme = self._scheme
        lost = None
        # Graphs read float32, whatever type the tensor is written in.
        array = tensor.numpy()
        if self._own and wanted in FLOAT_DTYPES:
            return self._as_floats(name, array, wanted)
        fitted = any(part in self._given for part in name.split(STACK))
        while format_ is not None and format_ in scheme.limits:
            rounded, block = scheme.round(array, format_, self._scales(tensor))
            lost = rounded.error if lost is None else lost
            limit = scheme.limits[format_]
            if format_ == "int4" and kept_alone and not fitted:
                limit = KEPT
            if rounded.error <= limit:
                self._kept = self._kept or (format_ == "int4" and rounded.error <= KEPT)
                if format_ == "int4" and fitted:
                    # Verification compares with the error of the format. A fitted weight is further
                    # off, but its outputs are closer.
                    rounded = replace(self._fitted(tensor, array), error=rounded.error)
                    block = BLOCK
                if self._own:
                    rounded = in_panels(rounded, array.shape[1], BITS[format_])
                return self._write(name, format_, rounded, block, lost)
            format_ = scheme.higher.get(format_)
        if self._own:
            return replace(self._as_floats(name, array, "fp32"), lost=lost or 0.0)
        return Stored(FLOATS[tensor.dtype], {}, 0, tensor.nbytes, lost or 0.0, 0.0)

    def _as_floats(self, name: str, array: np.ndarray, wanted: TensorFormat) -> Stored:
        format_ = narrowest(array)
        if format_ == "fp32" and wanted == "fp16" and error_in_fp16(array) <= FLOAT16_LIMIT:
            format_ = "fp16"
        panels = partial(floats_in_panels, array, format_)
        data = self._weights.add(f"{name}.{format_}.data", ir.DataType.UINT8, panels)
        return Stored(format_, {"data": data}, GROUP, data.nbytes, 0.0, 0.0)

    def _as_in_file(self, name: str, names: list[str], inputs: int) -> Stored:
        tensors = [part for each in names if (part := self._in_file(each)) is not None]
        whole = side_by_side([part.read() for part in tensors])
        one = tensors[0]
        packed = in_panels(whole, inputs, BITS[one.format])
        return replace(self._write(name, one.format, packed, one.block, 0.0), kind=one.kind)

    def _fitted(self, tensor: ir.LazyTensor, array: np.ndarray) -> Rounded:
        """Return a stacked weight from the given parts. Other parts are rounded as usual."""
        parts = []
        start = 0
        names = str(tensor.name).split(STACK)
        counts = tensor.meta.get(STACK, [len(array)])
        for name, rows in zip(names, counts, strict=True):
            part = self._given.get(name)
            if part is None:
                part = round_4_bits(array[start : start + rows], BLOCK, self._scales(tensor))
            parts.append(part)
            start += rows
        return side_by_side(parts)

    def _write(
        self, name: str, format_: TensorFormat, rounded: Rounded, block: int, lost: float
    ) -> Stored:
        operands = {}
        for part in OPERANDS:
            array = getattr(rounded, part)
            if array is not None:
                dtype = ir.DataType.from_numpy(array.dtype)
                produce = partial(np.asarray, array)
                operands[part] = self._weights.add(f"{name}.{format_}.{part}", dtype, produce)
        size = sum(tensor.nbytes for tensor in operands.values())
        return Stored(format_, operands, block, size, lost, rounded.error)
