"""Products with rounded weights on ONNX Runtime's operators.

8 bits by row: activations get one scale a row, so that a row's result does not depend on its neighbours, and k rows at
once are k single rows (DynamicQuantizeMatMul has one scale for all). Blocks: MatMulNBits, which quantises by row too.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.exit_head import EXIT_LAYERS
from graphs.graph import MICROSOFT
from graphs.quantization.linears import weight_size
from graphs.quantization.quantizer import Stored
from graphs.rewrites.initializers import constant

_Of = Literal["layers", "exit", "head"]  # whose product it is

BITS = {"int4": 4, "int8-block": 8}
# Activations in MatMulNBits are rounded to 8 bits; without it they stay as they are, on a CPU 5 to 40 times slower.
INT8_ACTIVATIONS = 4


class OrtProducts:
    """See graphs.quantization.linears.Products. `rounds_activations`, as a CPU wants it; a GPU has no use for that."""

    domain = MICROSOFT

    def __init__(self, graph: ir.Graph, rounds_activations: bool = True) -> None:
        self._graph, self._rows = graph, _Rows(graph)
        self._attributes = {"accuracy_level": INT8_ACTIVATIONS} if rounds_activations else {}

    def product(self, tape: Tape, node: ir.Node, stored: Stored, operands: list[ir.Value], head: bool) -> ir.Value:
        x, weight, *rest = node.inputs
        assert x is not None
        assert weight is not None
        if stored.format == "int8":
            own = str(weight.name).startswith(EXIT_LAYERS)
            made = self._by_row(tape, x, operands, "head" if head else "exit" if own else "layers")
        else:
            made = self._in_blocks(tape, x, operands, BITS[stored.format], stored.block, weight_size(node))
        return tape.op("Add", [made, rest[0]]) if rest and rest[0] is not None else made

    def _by_row(self, tape: Tape, x: ir.Value, operands: list[ir.Value], of: _Of) -> ir.Value:
        rounded, scales = self._rows.round(tape, x, of)
        data, channels = operands
        one = constant(self._graph, "rows.one", np.float32(1))
        middle = constant(self._graph, "rows.middle", np.uint8(128))
        inputs = [rounded, data, one, channels, middle]
        return tape.op("Mul", [tape.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), scales])

    def _in_blocks(
        self, tape: Tape, x: ir.Value, operands: list[ir.Value], bits: int, block: int, size: tuple[int, int]
    ) -> ir.Value:
        attributes: dict[str, Any] = {"N": size[0], "K": size[1], "bits": bits, "block_size": block, **self._attributes}
        return tape.op("MatMulNBits", [x, *operands], attributes, domain=MICROSOFT)


class _Rows:
    """Activations rounded to 8 bits by row, each value once: x -> uint8 [M, K], and the scales [M, 1]."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._middles: dict[_Of, ir.Value] = {}

    def round(self, tape: Tape, x: ir.Value, of: _Of) -> tuple[ir.Value, ir.Value]:
        if x not in self._rounded:
            axis = constant(self._graph, "rows.axis", np.array([1], np.int64))
            step = constant(self._graph, "rows.step", np.float32(1 / 127))
            peak = tape.op("ReduceMax", [tape.op("Abs", [x]), axis], {"keepdims": 1})
            # A row that is all 0 has a scale of 0, which makes its products 0 whatever it is rounded to.
            scales = tape.op("Mul", [peak, step])
            by_row = [x, tape.op("Squeeze", [scales, axis]), self._middle(tape, x, of)]
            self._rounded[x] = tape.op("QuantizeLinear", by_row, {"axis": 0}), scales
        return self._rounded[x]

    def _middle(self, tape: Tape, x: ir.Value, of: _Of) -> ir.Value:
        """Zero points uint8 [M], 128 each. The inputs of all layers have the same rows, those of the head and of
        an exit's own layers others."""
        if of not in self._middles:
            rows = tape.op("Shape", [x], {"start": 0, "end": 1})
            middle = constant(self._graph, "rows.middles", np.array([128], np.uint8))
            self._middles[of] = tape.op("Expand", [middle, rows])
        return self._middles[of]
