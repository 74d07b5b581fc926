"""Passes over graphs whose weights are not written yet.

They quantize linear layers and the embedding, and fuse norms, activations and gates into products
of this project's kernels.
"""

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
from graphs.quantization.panels import BITS, FLOAT_DTYPES
from graphs.quantization.quantizer import FLOATS, OPERANDS, Quantizer, Stored
from runtime.bundle.quantization import EnginePrecision, HigherTensor, TensorFormat
from runtime.engines.kernels import DOMAIN

# Inputs of PackedLinear by position.
X = 0
DATA = 1
SCALES = 2
ZEROS = 3
BIAS = 4
SKIP = 5
NORM = 6
UP_DATA = 7
UP_SCALES = 8
UP_ZEROS = 9
OFFSETS = 10
UP_OFFSETS = 11
MULTIPLES = 12
UP_MULTIPLES = 13
SHIFT = 14
INPUTS = 15
# Inputs of its two weights, in the order of `OPERANDS`.
WEIGHT = (DATA, SCALES, ZEROS, OFFSETS, MULTIPLES)
UP = (UP_DATA, UP_SCALES, UP_ZEROS, UP_OFFSETS, UP_MULTIPLES)
# Norms by operator: is it a layer norm, and is it the norm of a sum (its fourth output)?
NORMS = {
    "SimplifiedLayerNormalization": (False, False),
    "SkipSimplifiedLayerNormalization": (False, True),
    "LayerNormalization": (True, False),
    "SkipLayerNormalization": (True, True),
}
# activation_bits of PackedLinear that leave activations in fp32.
EXACT = 32
# accuracy_level of MatMulNBits that rounds activations to 8 bits. Other levels are 5 to 40 times
# slower on a CPU.
INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class Part:
    """Some outputs of a weight [outputs, inputs], with operands as values of the graph."""

    stored: Stored
    operands: dict[str, ir.Value]
    outputs: int
    inputs: int

    @property
    def attributes(self) -> dict[str, Any]:
        stored = self.stored
        sizes = {"N": self.outputs, "K": self.inputs, "bits": BITS[stored.format]}
        kind = {"bfloat16": 1} if stored.format == "bf16" else {}
        return {**sizes, "block_size": stored.block, **kind}


class Products:
    """Operators that multiply with quantized weights.

    Attributes:
        domain: ONNX domain of the operators.
        own: The operators are this project's (docs/precision.md). They read weights in panels, and
            may read two weights with different formats.
        exact: A quantized weight has the products of its values in fp32.
    """

    domain = ""
    own = False
    exact = False

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        """Replace `node`, Gemm(x, W, bias), by operators on `tape` that read the quantized weight.

        Args:
            parts: Outputs of the weight. Two parts are possible with `own` operators only.
        """
        raise NotImplementedError


class OrtProducts(Products):
    """ONNX Runtime's MatMulNBits.

    It rounds activations by row and block, so that a call with k rows equals k calls with one row
    (DynamicQuantizeMatMul has one scale for all rows). It does not saturate on processors without
    VNNI (docs/precision.md).

    Args:
        rounds_activations: Round activations to 8 bits, for a CPU. A GPU does not benefit.
    """

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
    """This project's PackedLinear.

    Args:
        activation_bits: Bits that it rounds activations to in products with quantized weights, 8 or
            16. 32: activations stay in fp32, and products are those of the dequantized weights.
    """

    domain = DOMAIN
    own = True

    def __init__(self, activation_bits: int = 8) -> None:
        self.exact = activation_bits == EXACT
        self._attributes = {} if activation_bits == 8 else {"activation_bits": activation_bits}

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *bias = node.inputs
        given: list[ir.Value | None] = [None] * INPUTS
        given[X] = x
        given[BIAS] = bias[0] if bias else None
        floats = parts[0].stored.format in FLOAT_DTYPES
        attributes = parts[0].attributes
        if self.exact or not floats:
            attributes |= self._attributes
        for part, places in zip(parts, (WEIGHT, UP), strict=False):
            for place, operand in zip(places, OPERANDS, strict=True):
                given[place] = part.operands.get(operand)
        for second in parts[1:]:
            for name, value in second.attributes.items():
                if name != "K":
                    attributes[f"up_{name}"] = value
        made = tape.op("PackedLinear", given, attributes, domain=DOMAIN)
        # ONNX Runtime cannot infer the type and shape of custom operators.
        outputs = sum(part.outputs for part in parts)
        made.type = ir.TensorType(ir.DataType.FLOAT)
        made.shape = ir.Shape([None, outputs])
        return made


class WidenedProducts(Products):
    """DequantizeLinear before the product. TensorRT fuses them and reads the rounded weights."""

    def product(self, tape: Tape, node: ir.Node, parts: Sequence[Part]) -> ir.Value:
        x, _, *rest = node.inputs
        (part,) = parts
        attributes = {"axis": 0}
        if part.stored.block:
            attributes = {"axis": 1, "block_size": part.stored.block}
        weight = tape.op("DequantizeLinear", list(part.operands.values()), attributes)
        return tape.op("Gemm", [x, weight, *rest], {"transB": 1})


class QuantizeLinears(ir.passes.InPlacePass):
    """Quantizes the weights of products.

    Before: products with weights are Gemm(x, W, bias) with W [outputs, inputs], not yet written.
    After: those whose weights were quantized, or laid out for this project's kernels, are
    `products`, and no weight is unused.

    Args:
        quantizer: Stores the weights and records the results.
        products: Operators to insert.
        engine: Name of the engine.
        linears: Format of the engine's linear layers, for the record.
        wanted: Returns the format of a weight by its name.
        head: Name of the head's weight.
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
        self._quantizer = quantizer
        self._products = products
        self._engine = engine
        self._linears = linears
        self._wanted = wanted
        self._head = head
        self._stored: dict[str, Stored] = {}

    def requires(self, model: ir.Model) -> None:
        for node in _gemms(model.graph):
            tensor = unread(node.inputs[1])
            transposed = node.attributes.get_int("transB", 0) == 1
            if tensor is None or tensor.dtype not in FLOATS or not transposed:
                raise ir.passes.PreconditionError(
                    f"{node.name}: not a product with an unwritten floating weight"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in _gemms(model.graph):
            tensor = unread(node.inputs[1])
            assert tensor is not None
            parts = self._parts(tensor)
            stored = [self._store(part) for part in parts]
            # One product must read all parts, and unless it is exact, floats or quantized weights
            # only.
            floats = {part.format in FLOAT_DTYPES for part in stored}
            mixed = len(floats) > 1 and not self._products.exact
            if not all(part.replaces for part in stored) or mixed:
                parts = [tensor]
                stored = [self._store(tensor)]
            for part, result in zip(parts, stored, strict=True):
                self._stored[str(part.name)] = result
            if stored[0].replaces:
                self._replace(model.graph, node, parts, stored)
        if self._products.domain:
            model.graph.opset_imports[self._products.domain] = 1
        drop_unused(model.graph)
        self._record()
        return ir.passes.PassResult(model, modified=bool(self._stored))

    def ensures(self, model: ir.Model) -> None:
        for node in _gemms(model.graph):
            tensor = unread(node.inputs[1])
            if tensor is not None and self._stored[str(tensor.name)].replaces:
                raise ir.passes.PostconditionError(
                    f"{node.name} still reads the original of a quantized weight"
                )

    def _parts(self, tensor: ir.LazyTensor) -> list[ir.LazyTensor]:
        """Return the weight, or two weights if its stacked tensors are to have two formats."""
        names = str(tensor.name).split(STACK)
        rows = tensor.meta.get(STACK, [tensor.shape.numpy()[0]])
        kinds = {name: self._quantizer.kind(name) for name in names}

        def format_of(part: tuple[str, int]) -> str:
            return kinds[part[0]] or self._wanted(part[0])

        runs = [list(run) for _, run in groupby(zip(names, rows, strict=True), key=format_of)]
        if not self._products.own or len(runs) != 2:
            return [tensor]
        rounds_to_4_bits = not any(kinds.values()) and self._wanted(names[0]) == "int4"
        if rounds_to_4_bits and self._quantizer.keeps(tensor):
            return [tensor]
        parts = []
        start = 0
        for run in runs:
            end = start + sum(count for _, count in run)
            name = STACK.join(name for name, _ in run)
            shape = ir.Shape((end - start, *tensor.shape.numpy()[1:]))
            read = partial(_rows_of, tensor, start, end)
            part = ir.LazyTensor(read, tensor.dtype, shape, name=name)
            part.meta[STACK] = [count for _, count in run]
            parts.append(part)
            start = end
        return parts

    def _store(self, tensor: ir.LazyTensor) -> Stored:
        first = str(tensor.name).split(STACK)[0]
        of_checkpoint = first != self._head and not first.startswith(EXIT)
        return self._quantizer.store(tensor, self._wanted(first), of_checkpoint)

    def _replace(
        self, graph: ir.Graph, node: ir.Node, tensors: list[ir.LazyTensor], stored: list[Stored]
    ) -> None:
        tape = Tape()
        parts = []
        for tensor, each in zip(tensors, stored, strict=True):
            operands = {name: external(graph, operand) for name, operand in each.operands.items()}
            parts.append(Part(each, operands, *tensor.shape.numpy()))
        made = self._products.product(tape, node, parts)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], tape.nodes, node.outputs, [made]
        )

    def _record(self) -> None:
        stored = list(self._stored.values())
        head = self._stored.get(self._head)
        kinds = Counter[str]()
        unchanged = [name for name, each in self._stored.items() if each.kept]
        for name, each in self._stored.items():
            if each.kind:
                kinds[each.kind] += len(name.split(STACK))
        self._quantizer.engines.append(
            EnginePrecision(
                engine=self._engine,
                linears=self._linears,
                head=None if head is None else head.format,
                bytes=sum(each.bytes for each in stored),
                largest_error=max((each.error for each in stored), default=0.0),
                kept=sum(len(name.split(STACK)) for name in unchanged),
                kinds=dict(sorted(kinds.items())),
            )
        )
        for name, each in self._stored.items():
            wanted = self._wanted(name.split(STACK)[0])
            if each.kind:
                continue
            if each.format != wanted:
                higher = HigherTensor(self._engine, name, wanted, each.format, each.lost)
                self._quantizer.higher.append(higher)
            elif wanted != self._linears and name != self._head:
                higher = HigherTensor(self._engine, name, self._linears, wanted, None)
                self._quantizer.higher.append(higher)


def _gemms(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "Gemm"]


def _rows_of(tensor: ir.LazyTensor, start: int, end: int) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy()[start:end])


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Quantizes the embedding, or lays it out for this project's kernels.

    Before: Gather reads rows of the unwritten float32 tensor `table` [rows, d]. After:
    GatherBlockQuantized reads 8-bit rows in blocks, or PackedRows reads a weight in panels: one
    that keeps its bits from the checkpoint, or one in the format `panels`.
    """

    def __init__(
        self, quantizer: Quantizer, table: str, panels: TensorFormat | None = None
    ) -> None:
        self._quantizer = quantizer
        self._table = table
        self._panels = panels

    def requires(self, model: ir.Model) -> None:
        if len(self._lookups(model.graph)) != 1:
            raise ir.passes.PreconditionError(f"{self._table} is not read by one Gather")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        tape = Tape()
        (node,) = self._lookups(graph)
        tensor = unread(node.inputs[0])
        index = node.inputs[1]
        assert tensor is not None
        packed = self._panels or self._quantizer.kind(str(tensor.name))
        weight = self._quantizer.store(tensor, self._panels or "int8-block") if packed else None
        if weight is not None and weight.replaces:
            stored = weight
        else:
            stored = self._quantizer.store_table(tensor)
        operands = {name: external(graph, part) for name, part in stored.operands.items()}
        data = operands["data"]
        if stored is weight:
            outputs, inputs = tensor.shape.numpy()
            attributes = Part(stored, operands, outputs, inputs).attributes
            more = [operands.get(name) for name in ("scales", "offsets", "multiples")]
            given: list[ir.Value | None] = [index, data, *more]
            while given[-1] is None:
                given.pop()
            rows = tape.op("PackedRows", given, attributes, domain=DOMAIN)
            rows.type = ir.TensorType(ir.DataType.FLOAT)
            rows.shape = ir.Shape([None, inputs])
        else:
            attributes = {
                "bits": 8,
                "block_size": stored.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            }
            rows = tape.op(
                "GatherBlockQuantized",
                [data, index, operands["scales"]],
                attributes,
                domain=MICROSOFT,
            )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], tape.nodes, node.outputs, [rows]
        )
        graph.opset_imports.update({made.domain: 1 for made in tape.nodes})
        drop_unused(graph)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if self._lookups(model.graph):
            raise ir.passes.PostconditionError(f"{self._table} is still read in float32")

    def _lookups(self, graph: ir.Graph) -> list[ir.Node]:
        gathers = [(node, unread(node.inputs[0])) for node in graph if node.op_type == "Gather"]
        return [
            node for node, tensor in gathers if tensor is not None and tensor.name == self._table
        ]


class FuseProducts(ir.passes.InPlacePass):
    """Fuses norms, activations and gates into PackedLinear.

    Before: PackedLinear reads x alone. After: it includes an activation and a gate that nothing
    else reads, and a norm that only one product reads. In layers of order `post` it also includes
    the norm of a sum that others read later, if nothing reads the sum.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for fuse in (_with_activation, _with_gate, _with_norm):
            for node in [node for node in model.graph if _is_product(node)]:
                fuse(model.graph, node)
        return ir.passes.PassResult(model, modified=True)


def _with_activation(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse PackedLinear -> activation, if nothing else reads the product."""
    readers = _readers(node.outputs[0])
    by_type = {reader.op_type: reader for reader in readers}
    name = ""
    nodes = list[ir.Node]()
    if len(readers) == 1 and "Relu" in by_type:
        name = "relu"
        nodes = readers
    elif len(readers) == 1 and "Gelu" in by_type:
        approximate = readers[0].attributes.get_string("approximate", "none")
        name = "gelu-tanh" if approximate == "tanh" else "gelu"
        nodes = readers
    elif len(readers) == 2 and by_type.keys() == {"Sigmoid", "Mul"}:
        nodes = [by_type["Sigmoid"], by_type["Mul"]]
        name = "silu" if _readers(nodes[0].outputs[0]) == nodes[1:] else ""
    if name:
        node.attributes["activation"] = ir.AttrString("activation", name)
        _take_over(graph, node.outputs[0], nodes[-1].outputs[0], nodes)


def _with_gate(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse activation(PackedLinear(x)) * PackedLinear(x) into the first product."""
    readers = _readers(node.outputs[0])
    if "activation" not in node.attributes or len(readers) != 1 or readers[0].op_type != "Mul":
        return
    (times,) = readers
    (other,) = (value for value in times.inputs if value is not node.outputs[0])
    up = other.producer() if other is not None else None
    if up is None or not _is_product(up) or "activation" in up.attributes:
        return
    if _readers(up.outputs[0]) != [times] or up.inputs[X] is not node.inputs[X]:
        return
    if up.attributes.get_int("N") != node.attributes.get_int("N") or len(up.inputs) > INPUTS:
        return
    if len(up.inputs) > BIAS and up.inputs[BIAS] is not None:
        return
    exact = node.attributes.get_int("activation_bits", 0) == EXACT
    if (up.inputs[SCALES] is None) != (node.inputs[SCALES] is None) and not exact:  # one has floats
        return
    node.resize_inputs(INPUTS)
    for place, part in zip(UP, WEIGHT, strict=True):
        node.replace_input_with(place, up.inputs[part])
    for name in ("bits", "block_size", "bfloat16"):
        node.attributes[f"up_{name}"] = ir.AttrInt64(f"up_{name}", up.attributes.get_int(name, 0))
    _take_over(graph, node.outputs[0], times.outputs[0], [up, times])


def _with_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse (Skip)(Simplified)LayerNormalization -> PackedLinear."""
    normed = node.inputs[X]
    norm = normed.producer() if normed is not None else None
    if normed is None or norm is None or norm.op_type not in NORMS or normed.is_graph_output():
        return
    layer, skips = NORMS[norm.op_type]
    readers = _readers(normed)
    others = norm.outputs[3] if skips else normed
    keeps = readers != [node]
    first = next(one for one in graph if one in readers)
    if keeps and (others.uses() or others.is_graph_output() or first is not node):
        return
    places = (X, SKIP, NORM, SHIFT) if skips else (X, NORM, SHIFT)
    inputs = list(zip(places, norm.inputs, strict=False))
    node.resize_inputs(INPUTS)
    for place, value in inputs:
        node.replace_input_with(place, value)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
    if layer:
        node.attributes["layer"] = ir.AttrInt64("layer", 1)
    if not skips:
        graph.remove(norm, safe=True)
        return
    if keeps:
        node.attributes["keeps_norm"] = ir.AttrInt64("keeps_norm", 1)
    node.resize_outputs(2)
    old = normed if keeps else others
    node.outputs[1].name = f"{old.name}.total"
    node.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
    _take_over(graph, node.outputs[1], old, [norm])


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "PackedLinear" and node.domain == DOMAIN


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value, each once."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def _take_over(graph: ir.Graph, value: ir.Value, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Replace `old` by `value` and remove the `nodes` that produced it."""
    value.shape = value.shape or old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)
