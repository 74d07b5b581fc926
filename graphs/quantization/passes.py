"""Passes over graphs whose weights are not written yet: linear layers and the embedding get quantized weights, and what
stands before and behind a product on our own operators becomes part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.exit_head import EXIT
from graphs.graph import MICROSOFT, STACK, drop_unused, external, unread
from graphs.quantization.panels import BITS
from graphs.quantization.quantizer import FLOATS, OPERANDS, Quantizer, Stored
from runtime.bundle.manifest import EnginePrecision, HigherTensor, TensorFormat
from runtime.kernels import DOMAIN

# Inputs of PackedLinear, and those of its two weights in the order of `OPERANDS`.
X, DATA, SCALES, ZEROS, BIAS, SKIP, NORM, UP_DATA, UP_SCALES, UP_ZEROS, OFFSETS, UP_OFFSETS, *_ = range(15)
MULTIPLES, UP_MULTIPLES, SHIFT, INPUTS = 12, 13, 14, 15
WEIGHT = (DATA, SCALES, ZEROS, OFFSETS, MULTIPLES)
UP = (UP_DATA, UP_SCALES, UP_ZEROS, UP_OFFSETS, UP_MULTIPLES)
# Norms by operator: whether it is a layer norm, and whether it is of a sum, its fourth output.
NORMS = {
    "SimplifiedLayerNormalization": (False, False),
    "SkipSimplifiedLayerNormalization": (False, True),
    "LayerNormalization": (True, False),
    "SkipLayerNormalization": (True, True),
}
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


class Products:
    """Operators that multiply with quantized weights. `domain` is theirs. `own`: they are ours (docs/precision.md),
    which read weights in panels, and may read two weights of two formats."""

    domain = ""
    own = False

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        """Replace Gemm(x, W, bias) `node` by operators on `tape` that read the quantized weight. `parts`: its
        outputs; one, or two where they are our `own`."""
        raise NotImplementedError


class OrtProducts(Products):
    """ONNX Runtime's MatMulNBits. It rounds activations by row and block, so that k rows at once are k single rows
    (DynamicQuantizeMatMul has one scale for all), and does not saturate on processors without VNNI (docs/precision.md).
    `rounds_activations`, as a CPU wants it; a GPU has no use for that."""

    domain = MICROSOFT

    def __init__(self, rounds_activations: bool = True) -> None:
        self._attributes = {"accuracy_level": INT8_ACTIVATIONS} if rounds_activations else {}

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *bias = node.inputs
        (part,) = parts
        attributes = {**part.attributes, **self._attributes}
        made = tape.op("MatMulNBits", [x, *part.operands.values()], attributes, domain=MICROSOFT)
        return tape.op("Add", [made, bias[0]]) if bias and bias[0] is not None else made


class PackedProducts(Products):
    """PackedLinear."""

    domain, own = DOMAIN, True

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *bias = node.inputs
        given: list[ir.Value | None] = [None] * INPUTS
        given[X], given[BIAS] = x, bias[0] if bias else None
        attributes = parts[0].attributes
        for part, places in zip(parts, (WEIGHT, UP), strict=False):
            for place, operand in zip(places, OPERANDS, strict=True):
                given[place] = part.operands.get(operand)
        for second in parts[1:]:
            attributes |= {f"up_{name}": value for name, value in second.attributes.items() if name != "K"}
        made = tape.op("PackedLinear", given, attributes, domain=DOMAIN)
        # ONNX Runtime cannot work it out from an operator that it does not know.
        outputs = sum(part.outputs for part in parts)
        made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, outputs])
        return made


class WidenedProducts(Products):
    """Weights that are widened before: TensorRT reads them rounded and widens them as it computes."""

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *rest = node.inputs
        (part,) = parts
        attributes = {"axis": 1, "block_size": part.stored.block} if part.stored.block else {"axis": 0}
        weight = tape.op("DequantizeLinear", list(part.operands.values()), attributes)
        return tape.op("Gemm", [x, weight, *rest], {"transB": 1})


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
        for node in _gemms(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is None or tensor.dtype not in FLOATS or node.attributes.get_int("transB", 0) != 1:
                raise ir.passes.PreconditionError(f"{node.name}: not a product with an unwritten floating weight")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in _gemms(model.graph):
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
        for node in _gemms(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is not None and self._stored[str(tensor.name)].rounded:
                raise ir.passes.PostconditionError(f"{node.name} still reads a weight that was rounded as it was")

    def _parts(self, tensor: ir.LazyTensor) -> list[ir.LazyTensor]:
        """A weight as it is, or, where the tensors that it is stacked of are to have two formats, those of each."""
        names = str(tensor.name).split(STACK)
        rows = tensor.meta.get(STACK, [tensor.shape.numpy()[0]])
        kinds = {name: self._quantizer.kind(name) for name in names}
        by_format = groupby(zip(names, rows, strict=True), key=lambda part: kinds[part[0]] or self._wanted(part[0]))
        runs = [list(run) for _, run in by_format]
        if not self._products.own or len(runs) != 2:
            return [tensor]
        if not any(kinds.values()) and self._wanted(names[0]) == "int4" and self._quantizer.keeps(tensor):
            return [tensor]
        parts, start = [], 0
        for run in runs:
            end = start + sum(count for _, count in run)
            name, shape = STACK.join(name for name, _ in run), ir.Shape((end - start, *tensor.shape.numpy()[1:]))
            parts.append(ir.LazyTensor(partial(_rows_of, tensor, start, end), tensor.dtype, shape, name=name))
            parts[-1].meta[STACK] = [count for _, count in run]
            start = end
        return parts

    def _store(self, tensor: ir.LazyTensor) -> Stored:
        first = str(tensor.name).split(STACK)[0]
        of_checkpoint = first != self._head and not first.startswith(EXIT)
        return self._quantizer.store(tensor, self._wanted(first), of_checkpoint)

    def _replace(self, graph: ir.Graph, node: ir.Node, tensors: list[ir.LazyTensor], stored: list[Stored]) -> None:
        tape, parts = Tape(), []
        for tensor, each in zip(tensors, stored, strict=True):
            operands = {name: external(graph, operand) for name, operand in each.operands.items()}
            parts.append(Part(each, operands, *tensor.shape.numpy()))
        made = self._products.product(tape, node, parts)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [made])

    def _record(self) -> None:
        stored, head = list(self._stored.values()), self._stored.get(self._head)
        kinds = Counter[str]()
        for name, each in self._stored.items():
            kinds.update({each.kind: len(name.split(STACK))} if each.kind else {})
        self._quantizer.engines.append(
            EnginePrecision(
                engine=self._engine,
                linears=self._linears,
                head=None if head is None else head.format,
                bytes=sum(each.bytes for each in stored),
                largest_error=max((each.error for each in stored), default=0.0),
                kept=sum(len(name.split(STACK)) for name, each in self._stored.items() if each.kept),
                kinds=dict(sorted(kinds.items())),
            )
        )
        for name, each in self._stored.items():
            wanted = self._wanted(name.split(STACK)[0])
            if each.kind:
                continue
            if each.format != wanted:
                self._quantizer.higher.append(HigherTensor(self._engine, name, wanted, each.format, each.lost))
            elif wanted != self._linears and name != self._head:
                self._quantizer.higher.append(HigherTensor(self._engine, name, self._linears, wanted, None))


def _gemms(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm"]


def _rows_of(tensor: ir.LazyTensor, start: int, end: int) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy()[start:end])


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Before: rows of the unwritten float32 tensor `table` [rows, d] are read by Gather along axis 0.
    After: by GatherBlockQuantized, from 8-bit rows in blocks, or from a weight that stands packed: one in the bits of
    its file, or, where it is `tied` to it, a head in 8 bits."""

    def __init__(self, quantizer: Quantizer, table: str, tied: bool = False) -> None:
        self._quantizer, self._table, self._tied = quantizer, table, tied

    def requires(self, model: ir.Model) -> None:
        if len(self._lookups(model.graph)) != 1:
            raise ir.passes.PreconditionError(f"{self._table} is not read by one Gather")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, tape = model.graph, Tape()
        (node,) = self._lookups(graph)
        tensor, index = unread(node.inputs[0]), node.inputs[1]
        assert tensor is not None
        packed = self._tied or self._quantizer.kind(str(tensor.name))
        weight = self._quantizer.store(tensor, "int8-block") if packed else None
        stored = weight if weight is not None and weight.rounded else self._quantizer.store_table(tensor)
        operands = {name: external(graph, part) for name, part in stored.operands.items()}
        data, scales = operands["data"], operands["scales"]
        if stored is weight:
            outputs, inputs = tensor.shape.numpy()
            attributes = {"N": outputs, "K": inputs, "block_size": stored.block}
            attributes |= {} if stored.format == "int8-block" else {"bits": BITS[stored.format]}
            given = [index, data, scales, *(operands.get(name) for name in ("offsets", "multiples"))]
            while given[-1] is None:
                given.pop()
            rows = tape.op("PackedRows", given, attributes, domain=DOMAIN)
            rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, inputs])
        else:
            attributes = {"bits": 8, "block_size": stored.block, "gather_axis": 0, "quantize_axis": 1}
            rows = tape.op("GatherBlockQuantized", [data, index, scales], attributes, domain=MICROSOFT)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [rows])
        graph.opset_imports.update({made.domain: 1 for made in tape.nodes})
        drop_unused(graph)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if self._lookups(model.graph):
            raise ir.passes.PostconditionError(f"{self._table} is still read in float32")

    def _lookups(self, graph: ir.Graph) -> list[ir.Node]:
        found = [(node, unread(node.inputs[0])) for node in graph if node.op_type == "Gather"]
        return [node for node, tensor in found if tensor is not None and tensor.name == self._table]


class FuseProducts(ir.passes.InPlacePass):
    """Before: PackedLinear of x alone, with norms, activations and gates as operators of their own.
    After: an activation and a gate that nothing else reads, and a norm that one product reads, are part of it; also the
    norm of a sum that others read after it, where nothing reads the sum (layers of order `post`)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for fuse in (_with_activation, _with_gate, _with_norm):
            for node in [node for node in model.graph if _is_product(node)]:
                fuse(model.graph, node)
        return ir.passes.PassResult(model, modified=True)


def _with_activation(graph: ir.Graph, node: ir.Node) -> None:
    """PackedLinear -> activation that nothing else reads."""
    readers = _readers(node.outputs[0])
    by_type = {reader.op_type: reader for reader in readers}
    name, nodes = "", list[ir.Node]()
    if len(readers) == 1 and "Relu" in by_type:
        name, nodes = "relu", readers
    elif len(readers) == 1 and "Gelu" in by_type:
        name = "gelu-tanh" if readers[0].attributes.get_string("approximate", "none") == "tanh" else "gelu"
        nodes = readers
    elif len(readers) == 2 and by_type.keys() == {"Sigmoid", "Mul"}:
        nodes = [by_type["Sigmoid"], by_type["Mul"]]
        name = "silu" if _readers(nodes[0].outputs[0]) == nodes[1:] else ""
    if name:
        node.attributes["activation"] = ir.AttrString("activation", name)
        _take_over(graph, node.outputs[0], nodes[-1].outputs[0], nodes)


def _with_gate(graph: ir.Graph, node: ir.Node) -> None:
    """activation(PackedLinear(x)) * PackedLinear(x): the first takes the second's weight as well."""
    readers = _readers(node.outputs[0])
    if "activation" not in node.attributes or len(readers) != 1 or readers[0].op_type != "Mul":
        return
    (times,) = readers
    (other,) = (value for value in times.inputs if value is not node.outputs[0])
    up = other.producer() if other is not None else None
    if up is None or not _is_product(up) or "activation" in up.attributes or _readers(up.outputs[0]) != [times]:
        return
    same = up.inputs[X] is node.inputs[X] and up.attributes.get_int("N") == node.attributes.get_int("N")
    if not same or len(up.inputs) > INPUTS or (len(up.inputs) > BIAS and up.inputs[BIAS] is not None):
        return
    node.resize_inputs(INPUTS)
    for place, part in zip(UP, WEIGHT, strict=True):
        node.replace_input_with(place, up.inputs[part])
    for name in ("bits", "block_size"):
        node.attributes[f"up_{name}"] = ir.AttrInt64(f"up_{name}", up.attributes.get_int(name, 0))
    _take_over(graph, node.outputs[0], times.outputs[0], [up, times])


def _with_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(Skip)(Simplified)LayerNormalization -> PackedLinear."""
    normed = node.inputs[X]
    norm = normed.producer() if normed is not None else None
    if normed is None or norm is None or norm.op_type not in NORMS or normed.is_graph_output():
        return
    layer, skips = NORMS[norm.op_type]
    readers, others = _readers(normed), norm.outputs[3] if skips else normed
    keeps, first = readers != [node], next(one for one in graph if one in readers)
    if keeps and (others.uses() or others.is_graph_output() or first is not node):
        return
    inputs = dict(zip((X, SKIP, NORM, SHIFT) if skips else (X, NORM, SHIFT), norm.inputs, strict=False))
    node.resize_inputs(INPUTS)
    for place, value in inputs.items():
        node.replace_input_with(place, value)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))
    if layer:
        node.attributes["layer"] = ir.AttrInt64("layer", 1)
    if not skips:
        graph.remove(norm, safe=True)
        return
    if keeps:
        node.attributes["keeps_norm"] = ir.AttrInt64("keeps_norm", 1)
    node.resize_outputs(2)
    old = normed if keeps else others
    node.outputs[1].name, node.outputs[1].type = f"{old.name}.total", ir.TensorType(ir.DataType.FLOAT)
    _take_over(graph, node.outputs[1], old, [norm])


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "PackedLinear" and node.domain == DOMAIN


def _readers(value: ir.Value) -> list[ir.Node]:
    """Each node once, though it may read the value twice."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def _take_over(graph: ir.Graph, value: ir.Value, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """`value` stands for `old` from now on, and `nodes`, which made it, are gone."""
    value.shape = value.shape or old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)
