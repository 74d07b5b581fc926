"""Linear layers with quantized weights."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.quantization.products import Products
from graphs.quantization.quantizer import FLOATS, Quantizer, Stored
from graphs.rewrites.initializers import drop_unused, external, unread
from runtime.bundle.precision import EnginePrecision, HigherTensor, TensorFormat


class QuantizeLinears(ir.passes.InPlacePass):
    """Before: products with weights are Gemm(x, W, bias) with W [outputs, inputs], not yet written.
    After: those of them whose weights were quantized are `products`, and no weight is left unused.

    `linears` is the format of the engine, and `wanted` that of a weight by its name; `head` is the name of the head's
    weight. What became of the weights is recorded with the quantizer.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        products: Products,
        engine: str,
        linears: TensorFormat,
        wanted: Callable[[str], TensorFormat],
        head: str,
    ) -> None:
        self._quantizer, self._products, self._engine, self._linears = quantizer, products, engine, linears
        self._wanted, self._head = wanted, head
        self._stored: dict[str, Stored] = {}

    def requires(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is None or tensor.dtype not in FLOATS or node.attributes.get_int("transB", 0) != 1:
                raise ir.passes.PreconditionError(f"{node.name}: not a product with an unwritten floating weight")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            assert tensor is not None
            assert tensor.name is not None
            stored = self._quantizer.store(tensor, self._wanted(tensor.name))
            self._stored[tensor.name] = stored
            if stored.rounded:
                _replace(model.graph, node, stored, self._products)
        if self._products.domain:
            model.graph.opset_imports[self._products.domain] = 1
        drop_unused(model.graph)
        self._record()
        return ir.passes.PassResult(model, modified=bool(self._stored))

    def ensures(self, model: ir.Model) -> None:
        for node in _products(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is not None and self._stored[str(tensor.name)].rounded:
                raise ir.passes.PostconditionError(f"{node.name} still reads a weight that was rounded as it was")

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


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm"]


def _replace(graph: ir.Graph, node: ir.Node, stored: Stored, products: Products) -> None:
    tape = Tape()
    made = products.product(tape, node, stored, [external(graph, tensor) for tensor in stored.operands])
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [made])
