"""Products with quantized weights that are widened before: TensorRT reads them rounded and widens them as it
computes."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.quantization.quantizer import Stored


class WidenedProducts:
    """See graphs.quantization.linears.Products."""

    domain = ""

    def __init__(self, graph: ir.Graph) -> None:
        pass

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value], head: bool) -> ir.Value:
        x, _, *rest = node.inputs
        attributes = {"axis": 1, "block_size": stored.block} if stored.block else {"axis": 0}
        weight = tape.op("DequantizeLinear", operands, attributes)
        return tape.op("Gemm", [x, weight, *rest], {"transB": 1})
