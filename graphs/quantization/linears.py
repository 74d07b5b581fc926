"""Linear layers in 8 and 4 bits, on ONNX Runtime's operators.

8 bits by row: activations get one scale a row, so that a row's result does not depend on its neighbours, and k rows at
once are k single rows (DynamicQuantizeMatMul has one scale for all). Blocks: MatMulNBits, which quantises by row too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.graph import MICROSOFT
from graphs.initializers import constant, drop_unused, external, unread
from graphs.quantization.quantizer import Quantizer, Stored
from runtime.precision import EnginePrecision, HigherTensor, TensorFormat

BITS = {"int4": 4, "int8-block": 8}
# Activations in MatMulNBits are rounded to 8 bits; without it they stay float32, 5 to 40 times slower.
INT8_ACTIVATIONS = 4


class QuantizeLinears(ir.passes.InPlacePass):
    """Before: products with weights are Gemm(x, W, bias) with W [outputs, inputs] float32, not yet written.
    After: those of them whose format is not "fp32" are integer products, and no weight is left unused.

    `linears` is the format of the engine, and `wanted` that of a weight by its name; `head` is the name of the head's
    weight, whose input has other rows than the layers'. What became of the weights is recorded with the quantizer.
    """

    def __init__(
        self, quantizer: Quantizer, engine: str, linears: TensorFormat, wanted: Callable[[str], TensorFormat], head: str
    ) -> None:
        self._quantizer, self._engine, self._linears = quantizer, engine, linears
        self._wanted, self._head = wanted, head
        self._stored: dict[str, Stored] = {}

    def requires(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or node.attributes.get_int("transB", 0) != 1:
                raise ir.passes.PreconditionError(f"{node.name}: not a product with an unwritten float32 weight")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rows = _Rows(model.graph)
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            assert tensor is not None
            assert tensor.name is not None
            stored = self._quantizer.store(tensor, self._wanted(tensor.name))
            self._stored[tensor.name] = stored
            if stored.format != "fp32":
                _replace(model.graph, node, stored, rows, tensor.name == self._head)
        model.graph.opset_imports[MICROSOFT] = 1
        drop_unused(model.graph)
        self._record()
        return ir.passes.PassResult(model, modified=bool(self._stored))

    def ensures(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is None or self._stored[str(tensor.name)].format != "fp32":
                raise ir.passes.PostconditionError(f"{node.name} is still a float32 product")

    def _record(self) -> None:
        higher = [
            HigherTensor(self._engine, name, wanted, stored.format, stored.lost)
            for name, stored in self._stored.items()
            if stored.format != (wanted := self._wanted(name))
        ]
        precision = EnginePrecision(
            engine=self._engine,
            linears=self._linears,
            head=self._stored[self._head].format if self._head in self._stored else None,
            bytes=sum(stored.bytes for stored in self._stored.values()),
            largest_error=max((stored.error for stored in self._stored.values()), default=0.0),
        )
        self._quantizer.record(precision, higher)


class _Rows:
    """Activations rounded to 8 bits by row, each value once: x -> uint8 [M, K], and the scales [M, 1]."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._middles: dict[bool, ir.Value] = {}

    def round(self, tape: Tape, x: ir.Value, head: bool) -> tuple[ir.Value, ir.Value]:
        if x not in self._rounded:
            axis = constant(self._graph, "rows.axis", np.array([1], np.int64))
            step = constant(self._graph, "rows.step", np.float32(1 / 127))
            peak = tape.op("ReduceMax", [tape.op("Abs", [x]), axis], {"keepdims": 1})
            # A row that is all 0 has a scale of 0, which makes its products 0 whatever it is rounded to.
            scales = tape.op("Mul", [peak, step])
            by_row = [x, tape.op("Squeeze", [scales, axis]), self._middle(tape, x, head)]
            self._rounded[x] = tape.op("QuantizeLinear", by_row, {"axis": 0}), scales
        return self._rounded[x]

    def _middle(self, tape: Tape, x: ir.Value, head: bool) -> ir.Value:
        """Zero points uint8 [M], 128 each. The inputs of all layers have the same rows, that of the head others."""
        if head not in self._middles:
            rows = tape.op("Shape", [x], {"start": 0, "end": 1})
            middle = constant(self._graph, "rows.middles", np.array([128], np.uint8))
            self._middles[head] = tape.op("Expand", [middle, rows])
        return self._middles[head]


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm"]


def _replace(graph: ir.Graph, node: ir.Node, stored: Stored, rows: _Rows, head: bool) -> None:
    x, weight, *rest = node.inputs
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    tape = Tape()
    operands = [external(graph, tensor) for tensor in stored.operands]
    bias = rest[0] if rest else None
    if stored.format == "int8":
        product = _by_row(graph, tape, x, operands, rows, head)
    else:
        outputs, inputs = weight.shape.numpy()
        product = _in_blocks(tape, x, operands, BITS[stored.format], stored.block, (outputs, inputs))
    if bias is not None:
        product = tape.op("Add", [product, bias])
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [product])


def _by_row(graph: ir.Graph, tape: Tape, x: ir.Value, operands: list[ir.Value], rows: _Rows, head: bool) -> ir.Value:
    rounded, scales = rows.round(tape, x, head)
    data, channels = operands
    one = constant(graph, "rows.one", np.float32(1))
    middle = constant(graph, "rows.middle", np.uint8(128))
    inputs = [rounded, data, one, channels, middle]
    return tape.op("Mul", [tape.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), scales])


def _in_blocks(
    tape: Tape, x: ir.Value, operands: list[ir.Value], bits: int, block: int, size: tuple[int, int]
) -> ir.Value:
    attributes = {"N": size[0], "K": size[1], "bits": bits, "block_size": block, "accuracy_level": INT8_ACTIVATIONS}
    return tape.op("MatMulNBits", [x, *operands], attributes, domain=MICROSOFT)
