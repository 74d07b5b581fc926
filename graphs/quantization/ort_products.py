"""Products with rounded weights on ONNX Runtime's MatMulNBits.

It rounds activations by row and block, so that k rows at once are k single rows (DynamicQuantizeMatMul has one scale
for all), and does not saturate on processors without VNNI (docs/precision.md).
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.graph import MICROSOFT
from graphs.quantization.linears import weight_size
from graphs.quantization.quantizer import Stored

BITS = {"int4": 4, "int8-block": 8}
# Activations in MatMulNBits are rounded to 8 bits; without it they stay as they are, on a CPU 5 to 40 times slower.
INT8_ACTIVATIONS = 4


class OrtProducts:
    """See graphs.quantization.linears.Products. `rounds_activations`, as a CPU wants it; a GPU has no use for that."""

    domain = MICROSOFT

    def __init__(self, rounds_activations: bool = True) -> None:
        self._attributes = {"accuracy_level": INT8_ACTIVATIONS} if rounds_activations else {}

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value]) -> ir.Value:
        x, _, *bias = node.inputs
        outputs, inputs = weight_size(node)
        size = {"N": outputs, "K": inputs, "bits": BITS[stored.format], "block_size": stored.block}
        made = tape.op("MatMulNBits", [x, *operands], {**size, **self._attributes}, domain=MICROSOFT)
        return tape.op("Add", [made, bias[0]]) if bias and bias[0] is not None else made
