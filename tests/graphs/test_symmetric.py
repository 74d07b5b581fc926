"""Weights rounded around zero with scales of any type, and graphs that widen them, against numpy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tensor_source import Source

from graphs.graph import Graph
from graphs.quantization.passes import QuantizeLinears, WidenedProducts
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import (
    SYMMETRIC_LIMITS,
    Rounded,
    SymmetricScheme,
    at_least,
    round_4_bits,
    round_8_bits,
    round_blocks,
    round_rows,
)
from graphs.weights import WeightFile
from runtime.bundle.manifest import TensorFormat

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
each_type = pytest.mark.parametrize("type_", [np.dtype(kind) for kind in FLOATS], ids=str)
FORMATS: tuple[TensorFormat, ...] = ("int8", "fp8", "int4")
each_format = pytest.mark.parametrize("format_", FORMATS)


def bell(outputs: int = 24, inputs: int = 128, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((outputs, inputs)) * size).astype(np.float32)


def rounded(weight: np.ndarray, format_: TensorFormat, type_: np.dtype) -> Rounded:
    return round_blocks(weight, 64, type_) if format_ == "int4" else round_rows(weight, format_, type_)


def widened(found: Rounded) -> np.ndarray:
    scales = found.scales.astype(np.float32)
    rows = scales[:, None] if scales.ndim == 1 else np.repeat(scales, found.data.shape[1] // scales.shape[1], 1)
    return found.data.astype(np.float32) * rows


@each_type
@each_format
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_what_is_lost_is_said_and_little(format_: TensorFormat, type_: np.dtype, size: float) -> None:
    exact = bell(size=size)
    found = rounded(exact, format_, type_)
    assert found.scales.dtype == type_
    error = np.linalg.norm(widened(found) - exact) / np.linalg.norm(exact)
    assert found.error == pytest.approx(error, rel=1e-3)
    assert {"int8": 0.005, "fp8": 0.015, "int4": 0.05}[format_] < error < SYMMETRIC_LIMITS[format_]


@each_type
@each_format
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e15])
def test_nothing_leaves_its_range_whatever_the_scale(format_: TensorFormat, type_: np.dtype, size: float) -> None:
    if size > 1e4 and type_ == np.float16:
        pytest.skip("a weight of that size is out of range of fp16")
    found = rounded(bell(size=size), format_, type_)
    assert np.isfinite(widened(found)).all()
    assert (found.scales.astype(np.float32) > 0).all()
    assert np.abs(found.data.astype(np.float32)).max() <= {"int8": 127, "fp8": 448, "int4": 8}[format_]


@each_type
def test_scales_are_the_least_that_are_not_smaller(type_: np.dtype) -> None:
    exact = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32) * np.float32(1e-3)
    found = at_least(exact, type_)
    below = np.nextafter(found, np.array(-np.inf, type_))
    assert (found.astype(np.float32) >= exact).all()
    assert (below.astype(np.float32) < exact).all()


@each_type
def test_blocks_with_zero_points_have_scales_of_any_type_too(type_: np.dtype) -> None:
    for size in (1.0, 1e-6):
        exact = bell(size=size)
        four, eight = round_4_bits(exact, 32, type_), round_8_bits(exact, 32, type_)
        assert four.scales.dtype == eight.scales.dtype == type_
        values = (eight.data.astype(np.float32) - 128) * eight.scales[..., None].astype(np.float32)
        error = np.linalg.norm(values.reshape(exact.shape) - exact) / np.linalg.norm(exact)
        assert eight.error == pytest.approx(error, rel=1e-3)
        assert four.error < 0.12 or (size < 1 and type_ == np.float16)


KINDS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@each_format
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_with_the_widened_weight(
    format_: TensorFormat, kind: ir.DataType, bias: bool, tmp_path: Path
) -> None:
    weight, offsets = bell(), bell(1, 24)[0]
    with WeightFile(tmp_path / "weights.data") as weights:
        graph = Graph("g", Source({"w": weight, "b": offsets}), weights, kind)
        x = graph.input("x", kind, ["M", 128])
        operands = [x, graph.weight("w")] + ([graph.weight("b")] if bias else [])
        graph.output("y", graph.op("Gemm", operands, transB=1), kind, ["M", 24])
        quantizer = Quantizer(weights, SymmetricScheme())
        graph.save(
            tmp_path / "g.onnx",
            [QuantizeLinears(quantizer, WidenedProducts(), "deep", format_, lambda name: format_, "head")],
        )
    assert [engine.bytes for engine in quantizer.report.engines] == [
        24 * 128 * (4 if format_ == "int4" else 8) // 8 + 24 * (2 if format_ == "int4" else 1) * kind.itemsize
    ]
    onnx.checker.check_model(tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    type_ = np.dtype(KINDS[kind])
    rows = bell(5, 128).astype(type_)
    expected = rows.astype(np.float32) @ widened(rounded(weight, format_, type_)).T + (offsets if bias else 0)
    np.testing.assert_allclose(
        session.run(["y"], {"x": rows})[0], expected, atol=1e-4 if type_ == np.float32 else 0.02, rtol=1e-3
    )


def test_what_no_block_divides_gets_8_bits_and_says_so(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        array = bell(16, 40)
        tensor = ir.LazyTensor(lambda: ir.tensor(array), ir.DataType.FLOAT16, ir.Shape(array.shape), name="w")
        stored = Quantizer(weights, SymmetricScheme()).store(tensor, "int4")
    assert (stored.format, stored.lost) == ("int8", 1.0)


def test_one_row_is_rounded_as_it_is_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    type_ = np.dtype(np.float16)
    whole = [rounded(bell(), format_, type_) for format_ in FORMATS]
    monkeypatch.setattr("graphs.quantization.rounding.CHUNK", 7 * 128)
    for one, other in zip(whole, [rounded(bell(), format_, type_) for format_ in FORMATS], strict=True):
        np.testing.assert_array_equal(one.data.astype(np.float32), other.data.astype(np.float32))
        np.testing.assert_array_equal(one.scales, other.scales)
