"""Products with quantized weights in the operators of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.graph import MICROSOFT
from graphs.quantization.panels import BITS
from graphs.quantization.quantizer import OPERANDS, Stored
from runtime.kernels import DOMAIN

# Inputs of PackedLinear, and those of its two weights in the order of `OPERANDS`.
X, DATA, SCALES, ZEROS, BIAS, SKIP, NORM, UP_DATA, UP_SCALES, UP_ZEROS, OFFSETS, UP_OFFSETS, INPUTS = range(13)
WEIGHT = (DATA, SCALES, ZEROS, OFFSETS)
UP = (UP_DATA, UP_SCALES, UP_ZEROS, UP_OFFSETS)
# Activations in MatMulNBits are rounded to 8 bits; without it they stay as they are, on a CPU 5 to 40 times slower.
INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class Part:
    """Some outputs of a weight [outputs, inputs], and their operands as values of the graph."""

    stored: Stored
    operands: dict[str, ir.Value]
    outputs: int
    inputs: int

    @property
    def attributes(self) -> dict[str, Any]:
        bits = BITS[self.stored.format]
        return {"N": self.outputs, "K": self.inputs, "bits": bits, "block_size": self.stored.block}


class Products(Protocol):
    """`domain`: of its operators. `beside`: one may read two weights of two formats."""

    domain: str
    beside: bool

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        """What Gemm(x, W, bias) `node` gives, by operators on `tape` that read the quantized weight. `parts`: its
        outputs; one, or two where `beside`."""
        ...


class OrtProducts:
    """ONNX Runtime's MatMulNBits. It rounds activations by row and block, so that k rows at once are k single rows
    (DynamicQuantizeMatMul has one scale for all), and does not saturate on processors without VNNI (docs/precision.md).
    `rounds_activations`, as a CPU wants it; a GPU has no use for that."""

    domain, beside = MICROSOFT, False

    def __init__(self, rounds_activations: bool = True) -> None:
        self._attributes = {"accuracy_level": INT8_ACTIVATIONS} if rounds_activations else {}

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *bias = node.inputs
        (part,) = parts
        attributes = {**part.attributes, **self._attributes}
        made = tape.op("MatMulNBits", [x, *part.operands.values()], attributes, domain=MICROSOFT)
        return tape.op("Add", [made, bias[0]]) if bias and bias[0] is not None else made


class PackedProducts:
    """Our own operators, which read weights packed (docs/kernels.md)."""

    domain, beside = DOMAIN, True

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *bias = node.inputs
        first, *rest = parts
        given: list[ir.Value | None] = [None] * INPUTS
        given[X], given[BIAS] = x, bias[0] if bias else None
        attributes = first.attributes
        for place, operand in zip(WEIGHT, OPERANDS, strict=True):
            given[place] = first.operands.get(operand)
        for second in rest:
            for place, operand in zip(UP, OPERANDS, strict=True):
                given[place] = second.operands.get(operand)
            attributes |= {f"up_{name}": value for name, value in second.attributes.items() if name != "K"}
        made = tape.op("PackedLinear", given, attributes, domain=DOMAIN)
        # ONNX Runtime cannot work it out from an operator that it does not know.
        outputs = sum(part.outputs for part in parts)
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, outputs])
        return made


class WidenedProducts:
    """Weights that are widened before: TensorRT reads them rounded and widens them as it computes."""

    domain, beside = "", False

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *rest = node.inputs
        (part,) = parts
        attributes = {"axis": 1, "block_size": part.stored.block} if part.stored.block else {"axis": 0}
        weight = tape.op("DequantizeLinear", list(part.operands.values()), attributes)
        return tape.op("Gemm", [x, weight, *rest], {"transB": 1})
