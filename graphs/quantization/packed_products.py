"""Products with quantized weights on our own operators, which read them packed (docs/kernels.md)."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.quantization.linears import weight_size
from graphs.quantization.ort_products import BITS
from graphs.quantization.panels import in_panels
from graphs.quantization.quantizer import Stored
from graphs.quantization.rounding import Rounded
from runtime.bundle.precision import TensorFormat
from runtime.kernels import DOMAIN


def packed(rounded: Rounded, inputs: int, format_: TensorFormat) -> Rounded:
    """See graphs.quantization.quantizer.Layout."""
    return in_panels(rounded, inputs, BITS[format_])


class PackedProducts:
    """See graphs.quantization.linears.Products."""

    domain = DOMAIN

    def __init__(self, graph: ir.Graph) -> None:
        pass

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value], head: bool) -> ir.Value:
        x, _, *bias = node.inputs
        outputs, inputs = weight_size(node)
        data, scales, *zeros = operands
        given: list[ir.Value | None] = [x, data, scales, zeros[0] if zeros else None, *bias]
        attributes = {"N": outputs, "K": inputs, "bits": BITS[stored.format], "block_size": stored.block}
        made = tape.op("PackedLinear", given, attributes, domain=DOMAIN)
        # ONNX Runtime cannot work it out from an operator that it does not know.
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, outputs])
        return made
