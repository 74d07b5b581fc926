"""Norms, activations and gates as part of products on our own operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import CASES, Bundles
from engine_cases import pair_of, tokens
from kernel_cases import session_of
from linear_case import FLOAT, normal
from tensor_source import Source

from freeexport.conversion.convert import convert
from freeexport.conversion.options import ConvertOptions
from graphs.graph import MICROSOFT, Graph
from graphs.quantization.passes import FuseProducts, PackedProducts, QuantizeLinears
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import IntegerScheme
from graphs.weights import WeightFile
from runtime.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}
WEIGHTS = {"gate": normal(24, 40), "up": normal(24, 40, seed=1), "bias": normal(24, seed=2), "norm": normal(40, seed=3)}


def check(directory: Path, build, kinds: dict[str, int], outputs: int = 1) -> None:
    """A graph of a few products of x [M, 40] has the same results with and without the pass, and then operators of
    these kinds."""
    rows = {"x": normal(5, 40, seed=4), "skip": normal(5, 40, seed=5)}
    found = []
    for name, passes in (("apart", []), ("fused", [FuseProducts()])):
        path = directory / name / "g.onnx"
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
    assert Counter(node.op_type for node in model.graph.node) == kinds
    assert len(found[0]) == outputs
    for apart, fused in zip(*found, strict=True):
        np.testing.assert_allclose(fused, apart, rtol=0, atol=2e-2 * np.abs(apart).max())


def product(graph: Graph, x, name: str, bias: bool = False):
    return graph.op("Gemm", [x, graph.weight(name), *([graph.weight("bias")] if bias else [])], transB=1)


def silu(graph: Graph, x):
    return graph.op("Mul", [x, graph.op("Sigmoid", [x])])


def add_norm(graph: Graph, x, skip):
    norm = [x, skip, graph.weight("norm")]
    normed, _, _, total = graph.ops("SkipSimplifiedLayerNormalization", norm, 4, MICROSOFT, epsilon=1e-5)
    return normed, total


def test_a_gate_is_one_operator(tmp_path: Path) -> None:
    def build(graph, x, skip):
        return [graph.op("Mul", [silu(graph, product(graph, x, "gate", bias=True)), product(graph, x, "up")])]

    check(tmp_path, build, {"PackedLinear": 1})


@pytest.mark.parametrize(("kind", "attributes"), [("Relu", {}), ("Gelu", {"approximate": "tanh"})])
def test_a_gate_may_stand_on_either_side(kind: str, attributes: dict, tmp_path: Path) -> None:
    def build(graph, x, skip):
        up = product(graph, x, "up")
        return [graph.op("Mul", [up, graph.op(kind, [product(graph, x, "gate")], **attributes)])]

    check(tmp_path, build, {"PackedLinear": 1})


@pytest.mark.parametrize(
    ("kind", "attributes", "left"), [("Relu", {}, {}), ("Gelu", {"approximate": "none"}, {"Gelu": 1})]
)
def test_an_activation_with_a_kernel_is_part_of_its_product(
    kind: str, attributes: dict, left: dict, tmp_path: Path
) -> None:
    def build(graph, x, skip):
        return [graph.op(kind, [product(graph, x, "up")], **attributes)]

    check(tmp_path, build, {"PackedLinear": 1, **left})


def test_what_something_else_reads_stays(tmp_path: Path) -> None:
    def build(graph, x, skip):
        gate, up = product(graph, x, "gate"), product(graph, x, "up")
        return [graph.op("Mul", [graph.op("Relu", [gate]), up]), graph.op("Neg", [up]), graph.op("Neg", [gate])]

    check(tmp_path, build, {"PackedLinear": 2, "Relu": 1, "Mul": 1, "Neg": 2}, outputs=3)


@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_of_another_input_or_with_a_bias_above_stays(bias: bool, tmp_path: Path) -> None:
    def build(graph, x, skip):
        up = product(graph, x if bias else skip, "up", bias)
        return [graph.op("Mul", [graph.op("Relu", [product(graph, x, "gate")]), up])]

    check(tmp_path, build, {"PackedLinear": 2, "Mul": 1})


def test_a_norm_with_its_sum_is_part_of_the_product_that_reads_it(tmp_path: Path) -> None:
    def build(graph, x, skip):
        normed, total = add_norm(graph, x, skip)
        return [product(graph, normed, "up"), graph.op("Neg", [total])]

    check(tmp_path, build, {"PackedLinear": 1, "Neg": 1}, outputs=2)


def test_a_norm_and_a_gate_are_one_operator(tmp_path: Path) -> None:
    def build(graph, x, skip):
        normed, total = add_norm(graph, x, skip)
        return [graph.op("Mul", [silu(graph, product(graph, normed, "gate")), product(graph, normed, "up")]), total]

    check(tmp_path, build, {"PackedLinear": 1}, outputs=2)


def test_a_norm_that_two_products_read_stays(tmp_path: Path) -> None:
    def build(graph, x, skip):
        normed = graph.op("SimplifiedLayerNormalization", [x, graph.weight("norm")], axis=-1, epsilon=1e-5)
        return [product(graph, normed, "gate"), product(graph, normed, "up")]

    check(tmp_path, build, {"PackedLinear": 2, "SimplifiedLayerNormalization": 1}, outputs=2)


@pytest.mark.parametrize("name", ["llama-biases", "t5-gated-untied", "t5-relu-tied", "qwen3"])
def test_engines_compute_what_they_computed_before(
    name: str, checkpoint, tmp_path: Path, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, options = BY_NAME[name], {"precision": "int8", "kernels": "freeexport"}
    fused = bundle(case, 1, **options)
    monkeypatch.setattr(FuseProducts, "call", lambda fuse, model: ir.passes.PassResult(model, modified=False))
    sizes = {"capacity": 128, "encoder_capacity": 128, "verify": "none", "measure": False}
    convert(str(checkpoint(case)), tmp_path / "apart", ConvertOptions(1, **options, **sizes))
    ids, lengths = tokens(30)
    ours, before = (pair_of(path, rows=1).shallow(ids, lengths)["logits"] for path in (fused, tmp_path / "apart"))
    # The last bit of a norm now and then tips an activation over to the next of 255 steps.
    np.testing.assert_allclose(ours, before, atol=0.03 * np.abs(before).max(), rtol=0)
    counts = [
        len(onnx.load(path / "shallow.onnx", load_external_data=False).graph.node)
        for path in (fused, tmp_path / "apart")
    ]
    assert counts[0] <= counts[1] - 3
