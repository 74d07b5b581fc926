"""Linear layers with quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.exit_head import EXIT
from graphs.graph import STACK
from graphs.quantization.products import Part, Products
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
            parts = self._parts(tensor)
            stored = [self._store(part) for part in parts]
            if not all(part.rounded for part in stored):  # one product reads them all
                parts, stored = [tensor], [self._store(tensor)]
            self._stored.update((str(part.name), each) for part, each in zip(parts, stored, strict=True))
            if stored[0].rounded:
                self._replace(model.graph, node, parts, stored)
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

    def _parts(self, tensor: ir.LazyTensor) -> list[ir.LazyTensor]:
        """A weight as it is, or, where what it is stacked of is to have two formats, that of each."""
        names = str(tensor.name).split(STACK)
        if not self._products.beside or len({self._wanted(name) for name in names}) == 1:
            return [tensor]
        if self._wanted(names[0]) == "int4" and self._quantizer.keeps(tensor):
            return [tensor]
        return _by_format(tensor, self._wanted)

    def _store(self, tensor: ir.LazyTensor) -> Stored:
        first = _first(str(tensor.name))
        of_checkpoint = first != self._head and not first.startswith(EXIT)
        return self._quantizer.store(tensor, self._wanted(first), of_checkpoint)

    def _replace(self, graph: ir.Graph, node: ir.Node, tensors: list[ir.LazyTensor], stored: list[Stored]) -> None:
        tape = Tape()
        parts = []
        for tensor, each in zip(tensors, stored, strict=True):
            operands = {name: external(graph, operand) for name, operand in each.operands.items()}
            parts.append(Part(each, operands, *tensor.shape.numpy()))
        made = self._products.product(tape, node, parts)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [made])

    def _higher(self) -> Iterator[HigherTensor]:
        for name, stored in self._stored.items():
            wanted = self._wanted(_first(name))
            if stored.format != wanted:
                yield HigherTensor(self._engine, name, wanted, stored.format, stored.lost)
            elif wanted != self._linears and name != self._head:
                yield HigherTensor(self._engine, name, self._linears, wanted, None)

    def _record(self) -> None:
        precision = EnginePrecision(
            engine=self._engine,
            linears=self._linears,
            head=self._stored[self._head].format if self._head in self._stored else None,
            bytes=sum(stored.bytes for stored in self._stored.values()),
            largest_error=max((stored.error for stored in self._stored.values()), default=0.0),
            kept=sum(len(name.split(STACK)) for name, stored in self._stored.items() if stored.kept),
        )
        self._quantizer.record(precision, list(self._higher()))


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm"]


def _first(name: str) -> str:
    """Of the tensors that a weight is stacked of."""
    return name.split(STACK)[0]


def _by_format(tensor: ir.LazyTensor, wanted: Callable[[str], TensorFormat]) -> list[ir.LazyTensor]:
    """A weight as it is, or, where the tensors that it is stacked of are to have two formats, those of each."""
    names = str(tensor.name).split(STACK)
    rows = tensor.meta.get(STACK, [tensor.shape.numpy()[0]])
    runs = [list(run) for _, run in groupby(zip(names, rows, strict=True), key=lambda part: wanted(part[0]))]
    if len(runs) != 2:
        return [tensor]
    parts, start = [], 0
    for run in runs:
        end = start + sum(count for _, count in run)
        name, shape = STACK.join(name for name, _ in run), ir.Shape((end - start, *tensor.shape.numpy()[1:]))
        part = partial(_rows, tensor, start, end)
        parts.append(ir.LazyTensor(part, tensor.dtype, shape, name=name))
        parts[-1].meta[STACK] = [count for _, count in run]
        start = end
    return parts


def _rows(tensor: ir.LazyTensor, start: int, end: int) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy()[start:end])
