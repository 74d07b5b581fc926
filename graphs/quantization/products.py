"""Products with quantized weights in the operators of a target."""

from __future__ import annotations

from typing import Any, Protocol

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.graph import MICROSOFT
from graphs.quantization.panels import BITS
from graphs.quantization.quantizer import Stored
from runtime.kernels import DOMAIN

# Activations in MatMulNBits are rounded to 8 bits; without it they stay as they are, on a CPU 5 to 40 times slower.
INT8_ACTIVATIONS = 4


class Products(Protocol):
    """`domain`: of its operators."""

    domain: str

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value]) -> ir.Value:
        """What Gemm(x, W, bias) `node` gives, by operators on `tape` that read the quantized weight."""
        ...


class OrtProducts:
    """ONNX Runtime's MatMulNBits. It rounds activations by row and block, so that k rows at once are k single rows
    (DynamicQuantizeMatMul has one scale for all), and does not saturate on processors without VNNI (docs/precision.md).
    `rounds_activations`, as a CPU wants it; a GPU has no use for that."""

    domain = MICROSOFT

    def __init__(self, rounds_activations: bool = True) -> None:
        self._attributes = {"accuracy_level": INT8_ACTIVATIONS} if rounds_activations else {}

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value]) -> ir.Value:
        x, _, *bias = node.inputs
        attributes = {**_attributes(node, stored), **self._attributes}
        made = tape.op("MatMulNBits", [x, *operands], attributes, domain=MICROSOFT)
        return tape.op("Add", [made, bias[0]]) if bias and bias[0] is not None else made


class PackedProducts:
    """Our own operators, which read weights packed (docs/kernels.md)."""

    domain = DOMAIN

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value]) -> ir.Value:
        x, _, *bias = node.inputs
        data, scales, *zeros = operands
        given: list[ir.Value | None] = [x, data, scales, zeros[0] if zeros else None, *bias]
        attributes = _attributes(node, stored)
        made = tape.op("PackedLinear", given, attributes, domain=DOMAIN)
        # ONNX Runtime cannot work it out from an operator that it does not know.
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, attributes["N"]])
        return made


class WidenedProducts:
    """Weights that are widened before: TensorRT reads them rounded and widens them as it computes."""

    domain = ""

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value]) -> ir.Value:
        x, _, *rest = node.inputs
        attributes = {"axis": 1, "block_size": stored.block} if stored.block else {"axis": 0}
        weight = tape.op("DequantizeLinear", operands, attributes)
        return tape.op("Gemm", [x, weight, *rest], {"transB": 1})


def _attributes(node: ir.Node, stored: Stored) -> dict[str, Any]:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    outputs, inputs = weight.shape.numpy()
    return {"N": outputs, "K": inputs, "bits": BITS[stored.format], "block_size": stored.block}
