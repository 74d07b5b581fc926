"""The quantisation passes, on graphs of one product and on whole engines: against numpy, and rows against rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from checkpoints import CASES, LARGER, Bundles
from engine_cases import pair_of, tokens
from linear_case import BIAS, FLOAT, WEIGHT, normal
from onnx_ir.tape import Tape
from tensor_source import Source

from graphs.graph import IR_VERSION, OPSET, Graph
from graphs.quantization.passes import OrtProducts, QuantizeEmbedding, QuantizeLinears
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import IntegerScheme
from graphs.weights import WeightFile
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import HigherTensor, TensorFormat

BY_NAME = {case.name: case for case in CASES}
PRECISIONS = ("int8", "int4", "mixed")
SELECTION = ("t5-gated-untied", "llama-biases", "mistral-window", "qwen3")
ORT = {"kernels": "onnxruntime"}
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[WeightFile]:
    with WeightFile(tmp_path / "weights.data") as file:
        yield file


def product(
    weights: WeightFile, format_: TensorFormat, bias: bool = False, weight: np.ndarray = WEIGHT
) -> Callable[[np.ndarray], np.ndarray]:
    """x [M, 40] -> x W^T (+ b) [M, 24] by a graph whose weight was stored as `format_`."""
    graph = Graph("g", Source({"w": weight, "b": BIAS}), weights, FLOAT)
    x = graph.input("x", FLOAT, ["M", 40])
    operands = [x, graph.weight("w")] + ([graph.weight("b")] if bias else [])
    graph.output("y", graph.op("Gemm", operands, transB=1), FLOAT, ["M", 24])
    path = weights.path.parent / "g.onnx"
    quantizer = Quantizer(weights, IntegerScheme())
    graph.save(path, [QuantizeLinears(quantizer, OrtProducts(), "deep", format_, lambda name: format_, "head")])
    weights.flush()
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["y"], {"x": rows})[0]


def test_sums_of_8_bits_do_not_saturate_on_any_processor(weights: WeightFile) -> None:
    """As they do by row without VNNI, where weights and activations are as large as they may be."""
    run = product(weights, "int8-block", weight=np.ones((24, 40), np.float32))
    for rows in (1, 2, 16):
        np.testing.assert_allclose(run(np.ones((rows, 40), np.float32)), np.full((rows, 24), 40.0), rtol=1e-5)


@pytest.mark.parametrize("format_", ["int8-block", "int4"])
def test_products_are_near_the_exact_ones_also_of_no_rows_and_of_zeros(
    format_: TensorFormat, weights: WeightFile
) -> None:
    run = product(weights, format_, bias=True)
    x, tolerance = normal(9, 40, seed=2), {"int8-block": 0.015, "int4": 0.12}[format_]
    exact = x @ WEIGHT.T + BIAS
    assert 1e-4 < np.linalg.norm(run(x) - exact) / np.linalg.norm(exact) < tolerance
    run = product(weights, format_)
    assert run(np.zeros((0, 40), np.float32)).shape == (0, 24)
    for value in (0.0, 1e-42):  # and rows whose scale vanishes
        rows = normal(3, 40, seed=2)
        rows[1] = value
        result = run(rows)
        np.testing.assert_allclose(result[1], np.zeros(24), atol=1e-38)
        assert np.isfinite(result).all()


def model_of(weights: WeightFile, **attributes: int) -> ir.Model:
    tape, x = Tape(), ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["M", 40]))
    tensor = ir.LazyTensor(lambda: ir.tensor(WEIGHT), FLOAT, ir.Shape((24, 40)), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(FLOAT), shape=ir.Shape((24, 40)), const_value=tensor)
    y = tape.op("Gemm", [x, weight], attributes)
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=[weight], opset_imports={"": OPSET}, name="g")
    return ir.Model(graph, ir_version=IR_VERSION)


def test_what_is_wanted_in_fp32_stays_and_a_product_of_another_kind_is_refused(weights: WeightFile) -> None:
    linears = QuantizeLinears(Quantizer(weights, IntegerScheme()), OrtProducts(), "deep", "int4", lambda _: "int4", "")
    with pytest.raises(ir.passes.PreconditionError):
        linears(model_of(weights))
    with pytest.raises(ir.passes.PreconditionError):
        QuantizeEmbedding(Quantizer(weights, IntegerScheme()), "w")(model_of(weights, transB=1))
    model = model_of(weights, transB=1)
    quantizer = Quantizer(weights, IntegerScheme())
    QuantizeLinears(quantizer, OrtProducts(), "deep", "int4", lambda name: "fp32", "head")(model)
    assert [node.op_type for node in model.graph] == ["Gemm"]
    (engine,) = quantizer.engines
    assert (engine.bytes, engine.largest_error, engine.head) == (24 * 40 * 4, 0.0, None)
    assert quantizer.higher == [HigherTensor("deep", "w", "int4", "fp32", None)]


@pytest.mark.parametrize(("width", "block"), [(40, 32), (192, 64), (128, 128)])
def test_the_embedding_is_read_as_it_was_rounded(width: int, block: int, weights: WeightFile) -> None:
    table = normal(50, width)
    graph = Graph("g", Source({"e": table}), weights, FLOAT)
    ids = graph.input("ids", ir.DataType.INT64, ["M"])
    graph.output("y", graph.op("Gather", [graph.weight("e"), ids], axis=0), FLOAT, ["M", width])
    path = weights.path.parent / "g.onnx"
    graph.save(path, [QuantizeEmbedding(Quantizer(weights, IntegerScheme()), "e")])
    weights.flush()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    picked = np.array([49, 0, 7, 7])
    (rows,) = session.run(["y"], {"ids": picked})
    padded = np.pad(table, ((0, 0), (0, -width % block))).reshape(50, -1, block)
    scales = np.abs(padded).max(-1, keepdims=True) / 127
    expected = (np.rint(padded / scales) * scales).reshape(50, -1)[:, :width]
    np.testing.assert_allclose(rows, expected[picked], atol=1e-6)


# Whole engines


@each_precision
@pytest.mark.parametrize("name", ["t5-gated-untied", "llama-tied"])
def test_every_linear_layer_is_rounded_and_reported(name: str, precision: str, bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], 1, precision=precision, **ORT)
    manifest = Bundle.open(path).manifest
    assert manifest.quantization is not None
    engines = {item.engine: item for item in manifest.quantization.engines}
    names = {"shallow", "deep"} | ({"encoder", "prologue"} if manifest.encoder_decoder else set())
    assert engines.keys() == names
    higher = [item.engine for item in manifest.quantization.higher]
    for engine in names:
        graph = onnx.load(path / f"{engine}.onnx", load_external_data=False).graph
        floats = [node for node in graph.node if node.op_type == "Gemm"]
        assert len(floats) <= higher.count(engine)
        used = {value for node in graph.node for value in node.input}
        assert {tensor.name for tensor in graph.initializer} <= used
        assert 0 < engines[engine].largest_error < 0.12
        assert (engines[engine].head is not None) == (engine in ("shallow", "deep"))


def test_a_head_can_have_4_bits_where_the_rest_is_rounded(bundle: Bundles) -> None:
    case = LARGER[1]
    eight, four = (bundle(case, 1, precision="int8", **ORT, **head) for head in ({}, {"head": "int4"}))
    formats = [
        {item.engine: (item.linears, item.head) for item in Bundle.open(path).manifest.quantization.engines}  # type: ignore[union-attr]
        for path in (eight, four)
    ]
    assert formats[0]["deep"] == ("int8-block", "int8-block")
    assert formats[1]["shallow"] == formats[1]["deep"] == ("int8-block", "int4")
    copies = [sum(copy.bytes for copy in Bundle.open(path).manifest.copies) for path in (eight, four)]
    assert copies[1] == copies[0] / 2
    ids, lengths = tokens(40)
    sizes = {path: (path / "weights.data").stat().st_size for path in (bundle(case, 1), eight, four)}
    assert sizes[four] < sizes[eight] < 0.3 * sizes[bundle(case, 1)]
    for path in (eight, four):
        logits = pair_of(path, rows=1).shallow(ids, lengths)["logits"]
        expected = pair_of(bundle(case, 1), rows=1).shallow(ids, lengths)["logits"]
        assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.25 * expected.std()
