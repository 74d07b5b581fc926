"""Norms, activations and gates as part of products on our own operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_cases import session_of
from tensor_source import FLOAT, Source, normal

from graphs.graph import MICROSOFT, Graph
from graphs.quantization.passes import FuseProducts, PackedProducts, QuantizeLinears
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import IntegerScheme
from graphs.weights import WeightFile
from runtime.engines.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

WEIGHTS = {
    "gate": normal(24, 40),
    "up": normal(24, 40, seed=1),
    "bias": normal(24, seed=2),
    "norm": normal(40, seed=3),
    "shift": normal(40, seed=6),
}


def product(graph: Graph, x, name: str, bias: bool = False):
    return graph.op("Gemm", [x, graph.weight(name), *([graph.weight("bias")] if bias else [])], transB=1)


def activated(graph: Graph, kind: str, x, approximate: str = "tanh"):
    if kind == "Silu":
        return graph.op("Mul", [x, graph.op("Sigmoid", [x])])
    return graph.op(kind, [x], **({"approximate": approximate} if kind == "Gelu" else {}))


def gated(graph: Graph, kind: str, x, bias: bool = False, up=None, up_first: bool = False):
    """activation(gate(x)) * up(x)."""
    gate = activated(graph, kind, product(graph, x, "gate", bias))
    up = product(graph, x, "up") if up is None else up
    return graph.op("Mul", [up, gate] if up_first else [gate, up])


def add_norm(graph: Graph, x, skip):
    norm = [x, skip, graph.weight("norm")]
    normed, _, _, total = graph.ops("SkipSimplifiedLayerNormalization", norm, 4, MICROSOFT, epsilon=1e-5)
    return normed, total


def with_other_readers(graph: Graph, x, skip):
    gate, up = product(graph, x, "gate"), product(graph, x, "up")
    return [graph.op("Mul", [graph.op("Relu", [gate]), up]), graph.op("Neg", [up]), graph.op("Neg", [gate])]


def with_norm_and_sum(graph: Graph, x, skip):
    normed, total = add_norm(graph, x, skip)
    return [product(graph, normed, "up"), graph.op("Neg", [total])]


def with_norm_and_gate(graph: Graph, x, skip):
    normed, total = add_norm(graph, x, skip)
    return [gated(graph, "Silu", normed), total]


def layer_norm(graph: Graph, *rows):
    weights = [graph.weight("norm"), graph.weight("shift")]
    if len(rows) == 1:
        return graph.op("LayerNormalization", [*rows, *weights], axis=-1, epsilon=1e-5)
    return graph.ops("SkipLayerNormalization", [*rows, *weights], 4, MICROSOFT, epsilon=1e-5)


def with_layer_norm(graph: Graph, x, skip):
    return [product(graph, layer_norm(graph, x), "up")]


def with_layer_norm_and_sum(graph: Graph, x, skip):
    normed, _, _, total = layer_norm(graph, x, skip)
    return [product(graph, normed, "up"), graph.op("Neg", [total])]


def with_layer_norm_read_again(graph: Graph, x, skip):
    normed = layer_norm(graph, x, skip)[0]
    up = product(graph, normed, "up")
    return [up, graph.op("Add", [normed, x])]


def with_layer_norm_read_before(graph: Graph, x, skip):
    normed = layer_norm(graph, x, skip)[0]
    before = graph.op("Neg", [normed])
    return [product(graph, normed, "up"), before]


def with_norm_of_two(graph: Graph, x, skip):
    normed = graph.op("SimplifiedLayerNormalization", [x, graph.weight("norm")], axis=-1, epsilon=1e-5)
    return [product(graph, normed, "gate"), product(graph, normed, "up")]


# What is built, and the operators that are left.
GRAPHS: dict[str, tuple[Any, dict[str, int]]] = {
    "a gate": (lambda graph, x, skip: [gated(graph, "Silu", x, bias=True)], {}),
    "a gate on the other side": (lambda graph, x, skip: [gated(graph, "Relu", x, up_first=True)], {}),
    "a gate with gelu": (lambda graph, x, skip: [gated(graph, "Gelu", x, up_first=True)], {}),
    "an activation": (lambda graph, x, skip: [activated(graph, "Relu", product(graph, x, "up"))], {}),
    "a gelu that is no tanh": (lambda graph, x, skip: [activated(graph, "Gelu", product(graph, x, "up"), "none")], {}),
    "what something else reads": (with_other_readers, {"PackedLinear": 2, "Relu": 1, "Mul": 1, "Neg": 2}),
    "a gate of another input": (
        lambda graph, x, skip: [gated(graph, "Relu", x, up=product(graph, skip, "up"))], {"PackedLinear": 2, "Mul": 1},
    ),
    "a gate with a bias above": (
        lambda graph, x, skip: [gated(graph, "Relu", x, up=product(graph, x, "up", bias=True))],
        {"PackedLinear": 2, "Mul": 1},
    ),
    "a norm with its sum": (with_norm_and_sum, {"Neg": 1}),
    "a norm and a gate": (with_norm_and_gate, {}),
    "a layer norm": (with_layer_norm, {}),
    "a layer norm of a sum that is read, too": (with_layer_norm_and_sum, {"Neg": 1}),
    "the layer norm of a sum that others read after it": (with_layer_norm_read_again, {"Add": 1}),
    "a layer norm that others read before": (with_layer_norm_read_before, {"Neg": 1, "SkipLayerNormalization": 1}),
    "a norm that two products read": (with_norm_of_two, {"PackedLinear": 2, "SimplifiedLayerNormalization": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_operations_around_a_product_are_fused_if_nothing_else_reads_their_result(name: str, tmp_path: Path) -> None:
    """A graph of a few products of x [M, 40] has the same results with and without the pass."""
    build, kinds = GRAPHS[name]
    rows = {"x": normal(5, 40, seed=4), "skip": normal(5, 40, seed=5)}
    found = []
    for name, passes in (("apart", []), ("fused", [FuseProducts()])):
        path = tmp_path / name / "g.onnx"
        path.parent.mkdir()
        with WeightFile(path.parent / "weights.data") as weights:
            graph = Graph("g", Source(WEIGHTS), weights, FLOAT)
            given = [graph.input(name, FLOAT, ["M", 40]) for name in rows]
            for number, value in enumerate(build(graph, *given)):
                graph.output(f"y{number}", value, FLOAT, ["M", "N"])
            quantizer = Quantizer(weights, IntegerScheme(), own=True)
            wanted = QuantizeLinears(quantizer, PackedProducts(), "deep", "int4", lambda name: "int4", "head")
            graph.save(path, [wanted, *passes])
        found.append(session_of(path).run(None, rows))
        model = onnx.load(path, load_external_data=False)
    assert Counter(node.op_type for node in model.graph.node) == {"PackedLinear": 1, **kinds}
    for apart, fused in zip(*found, strict=True):
        np.testing.assert_allclose(fused, apart, rtol=0, atol=2e-2 * np.abs(apart).max())
