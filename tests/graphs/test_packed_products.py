"""Products on our own operators: graphs of one, and whole bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import CASES, Bundles
from kernel_cases import session_of
from linear_case import BIAS, FLOAT, WEIGHT, normal
from onnx import numpy_helper
from tensor_source import Source

from graphs.errors import GraphError
from graphs.graph import Graph
from graphs.quantization.passes import PackedProducts, QuantizeLinears
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import IntegerScheme, in_panels, round_4_bits
from graphs.weights import WeightFile
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import TensorFormat
from runtime.kernels import VERSION, missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

BY_NAME = {case.name: case for case in CASES}
LLAMA = BY_NAME["llama-tied"]
OWN: dict[str, Any] = {"kernels": "freeexport"}
each_precision = pytest.mark.parametrize("precision", ["int8", "int4", "mixed"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("format_", "tolerance"), [("int8-block", 0.015), ("int4", 0.12)])
def test_products_are_near_the_exact_ones(format_: TensorFormat, tolerance: float, bias: bool, tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        graph = Graph("g", Source({"w": WEIGHT, "b": BIAS}), weights, FLOAT)
        x = graph.input("x", FLOAT, ["M", 40])
        operands = [x, graph.weight("w")] + ([graph.weight("b")] if bias else [])
        graph.output("y", graph.op("Gemm", operands, transB=1), FLOAT, ["M", 24])
        quantizer = Quantizer(weights, IntegerScheme(), own=True)
        wanted = QuantizeLinears(quantizer, PackedProducts(), "deep", format_, lambda name: format_, "head")
        graph.save(tmp_path / "g.onnx", [wanted])
    rows = normal(16, 40, seed=2)
    (y,) = session_of(tmp_path / "g.onnx").run(["y"], {"x": rows})
    exact = rows @ WEIGHT.T + (BIAS if bias else 0)
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < tolerance
    for row in range(len(rows)):
        (alone,) = session_of(tmp_path / "g.onnx").run(["y"], {"x": rows[row : row + 1]})
        np.testing.assert_array_equal(alone[0], y[row])


def test_what_was_fitted_stands_beside_what_was_not_and_what_has_8_bits(tmp_path: Path) -> None:
    formats: dict[str, TensorFormat] = {"q": "int4", "k": "int4", "v": "int8-block"}
    parts = {name: normal(16, 64, seed=seed) for seed, name in enumerate(formats)}
    scales = np.dtype(np.float16)
    fitted = round_4_bits(parts["q"][:, ::-1], 32, scales)
    with WeightFile(tmp_path / "weights.data") as weights:
        graph = Graph("g", Source(parts), weights, FLOAT)
        x = graph.input("x", FLOAT, ["M", 64])
        weight = graph.stacked_weight(list(parts))
        graph.output("y", graph.op("Gemm", [x, weight], transB=1), FLOAT, ["M", 48])
        quantizer = Quantizer(weights, IntegerScheme(), True, {"q": fitted})
        graph.save(
            tmp_path / "g.onnx", [QuantizeLinears(quantizer, PackedProducts(), "deep", "int4", formats.__getitem__, "")]
        )
    tensors = {item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "g.onnx").graph.initializer}
    (data,) = (tensor for name, tensor in tensors.items() if name.startswith("q+k.") and "data" in name)
    expected = [in_panels(each, 64, 4) for each in (fitted, round_4_bits(parts["k"], 32, scales))]
    np.testing.assert_array_equal(data, np.concatenate([each.data for each in expected]))


@each_precision
@pytest.mark.parametrize("name", ["t5-gated-untied", "qwen3"])
def test_every_linear_layer_is_on_our_operators(name: str, precision: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], 1, precision=precision, **OWN)
    manifest = Bundle.open(path).manifest
    assert manifest.kernels == VERSION
    assert manifest.quantization is not None
    higher = [item.engine for item in manifest.quantization.higher if item.stored == "fp32"]
    for engine in ("encoder", "prologue", "shallow", "deep") if manifest.encoder_decoder else ("shallow", "deep"):
        graph = onnx.load(path / f"{engine}.onnx", load_external_data=False).graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("PackedLinear") > 0
        assert kinds.count("Gemm") <= higher.count(engine)
        assert not {"MatMulNBits", "MatMulIntegerToFloat"} & set(kinds)


def shallow_nodes(path: Path, kind: str) -> list[Any]:
    graph = onnx.load(path / "shallow.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


@pytest.mark.parametrize("name", ["llama-tied", "t5-relu-tied"])
def test_a_tied_head_stands_once(name: str, bundle: Bundles) -> None:
    once, twice = (bundle(BY_NAME[name], 1, precision="int8", head=head, **OWN) for head in (None, "int4"))
    (rows,) = shallow_nodes(once, "PackedRows")
    assert any(list(rows.input[1:]) == list(node.input[1:3]) for node in shallow_nodes(once, "PackedLinear"))
    assert not shallow_nodes(once, "GatherBlockQuantized")
    assert not Bundle.open(once).manifest.copies
    # A head in 4 bits is too coarse for what everything begins with.
    assert shallow_nodes(twice, "GatherBlockQuantized")
    (copy,) = Bundle.open(twice).manifest.copies
    assert copy.reason == "head, packed for freeexport's kernels, beside the embedding table"


def test_value_projections_that_heads_share_keep_8_bits(bundle: Bundles) -> None:
    """In one product with queries and keys, where there are fewer heads of values than of queries."""
    for name, shared in (("mistral-window", True), ("llama-biases", False)):
        for precision in ("int4", "int8"):
            path = bundle(BY_NAME[name], 1, precision=precision, **OWN)
            found = [
                (attributes["N"], attributes["up_N"], attributes["bits"], attributes["up_bits"])
                for node in shallow_nodes(path, "PackedLinear")
                if "up_N" in (attributes := {each.name: each.i for each in node.attribute})
            ]
            manifest = Bundle.open(path).manifest
            assert manifest.quantization is not None
            listed = {item.tensor: item for item in manifest.quantization.higher if item.error is None}
            size = manifest.head_dim
            expected = ((manifest.heads + manifest.kv_heads) * size, manifest.kv_heads * size, 4, 8)
            assert found == ([expected] if shared and precision == "int4" else [])
            values = {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(manifest.layers)}
            assert listed.keys() == (values if found else set())
            assert {(item.wanted, item.stored) for item in listed.values()} <= {("int4", "int8-block")}


@pytest.mark.parametrize(
    "options", [{}, {"precision": "fp16"}, {"precision": "int8", "target": "cuda", "dialect": "standard"}]
)
def test_what_is_not_rounded_for_a_cpu_has_no_kernels(options: dict[str, Any], bundle: Bundles) -> None:
    with pytest.raises(GraphError, match="--kernels freeexport is for weights that are quantized for a CPU"):
        bundle(LLAMA, 1, **OWN, **options)
