"""What stands before and behind a product on our own operators, moved into it: each operator less saves its threads'
waiting, and a pass over the activations."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphs.graph import MICROSOFT
from graphs.quantization.products import BIAS, INPUTS, NORM, SKIP, UP, WEIGHT, X
from runtime.kernels import DOMAIN


class FuseProducts(ir.passes.InPlacePass):
    """Before: PackedLinear of x alone, with norms, activations and gates as operators of their own.
    After: an activation and a gate that nothing else reads, and a norm that one product reads, are part of it."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        for node in _products(graph):
            _with_activation(graph, node)
        for node in _products(graph):
            _with_gate(graph, node)
        for node in _products(graph):
            _with_norm(graph, node)
        return ir.passes.PassResult(model, modified=True)


def _with_activation(graph: ir.Graph, node: ir.Node) -> None:
    """PackedLinear -> activation."""
    found = _activation_of(node.outputs[0])
    if found is None:
        return
    name, nodes = found
    node.attributes["activation"] = ir.AttrString("activation", name)
    _take_over(graph, node.outputs[0], nodes[-1].outputs[0], nodes)


def _activation_of(product: ir.Value) -> tuple[str, list[ir.Node]] | None:
    """The activation of a product that nothing else reads: its name, and its nodes in order."""
    readers = _readers(product)
    if len(readers) == 1:
        (reader,) = readers
        if reader.op_type == "Relu":
            return "relu", [reader]
        if reader.op_type == "Gelu" and reader.attributes.get_string("approximate", "none") == "tanh":
            return "gelu-tanh", [reader]
    if len(readers) == 2:
        by_type = {reader.op_type: reader for reader in readers}
        sigmoid, times = by_type.get("Sigmoid"), by_type.get("Mul")
        if sigmoid and times and _readers(sigmoid.outputs[0]) == [times]:
            return "silu", [sigmoid, times]
    return None


def _with_gate(graph: ir.Graph, node: ir.Node) -> None:
    """activation(PackedLinear(x)) * PackedLinear(x): the first takes the second's weight as well."""
    readers = _readers(node.outputs[0])
    if "activation" not in node.attributes or len(readers) != 1 or readers[0].op_type != "Mul":
        return
    (times,) = readers
    (other,) = (value for value in times.inputs if value is not node.outputs[0])
    up = other.producer() if other is not None else None
    if up is None or not _may_be_up(up, node) or _readers(up.outputs[0]) != [times]:
        return
    node.resize_inputs(INPUTS)
    for place, part in zip(UP, WEIGHT, strict=True):
        node.replace_input_with(place, up.inputs[part])
    for name in ("bits", "block_size"):
        node.attributes[f"up_{name}"] = ir.AttrInt64(f"up_{name}", up.attributes.get_int(name, 0))
    _take_over(graph, node.outputs[0], times.outputs[0], [up, times])


def _may_be_up(up: ir.Node, gate: ir.Node) -> bool:
    plain = "activation" not in up.attributes and len(up.inputs) <= INPUTS and _input(up, BIAS) is None
    same = up.inputs[X] is gate.inputs[X] and up.attributes.get_int("N") == gate.attributes.get_int("N")
    return _is_product(up) and plain and same


def _with_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(Skip)SimplifiedLayerNormalization -> PackedLinear."""
    normed = node.inputs[X]
    norm = normed.producer() if normed is not None else None
    if normed is None or norm is None or _readers(normed) != [node] or normed.is_graph_output():
        return
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    if norm.op_type == "SimplifiedLayerNormalization":
        inputs = {X: norm.inputs[0], NORM: norm.inputs[1]}
    elif norm.op_type == "SkipSimplifiedLayerNormalization" and norm.domain == MICROSOFT:
        inputs = {X: norm.inputs[0], SKIP: norm.inputs[1], NORM: norm.inputs[2]}
    else:
        return
    node.resize_inputs(INPUTS)
    for place, value in inputs.items():
        node.replace_input_with(place, value)
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
    if SKIP in inputs:
        node.resize_outputs(2)
        total = norm.outputs[3]
        node.outputs[1].name, node.outputs[1].type = f"{total.name}.total", ir.TensorType(ir.DataType.FLOAT)
        _take_over(graph, node.outputs[1], total, [norm])
    else:
        graph.remove(norm, safe=True)


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if _is_product(node)]


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "PackedLinear" and node.domain == DOMAIN


def _readers(value: ir.Value) -> list[ir.Node]:
    """Each node once, though it may read the value twice."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _take_over(graph: ir.Graph, value: ir.Value, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """`value` stands for `old` from now on, and `nodes`, which made it, are gone."""
    value.shape = value.shape or old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)
