"""Weights in 8 and 4 bits, against a reading of the formats written apart; and graphs that widen those around zero."""

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
    Rounded,
    SymmetricScheme,
    at_least,
    round_4_bits,
    round_8_bits,
    round_blocks,
    round_rows,
)
from graphs.weights import WeightFile
from runtime.bundle.quantization import TensorFormat

TYPES = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
each_type = pytest.mark.parametrize("type_", TYPES, ids=str)
SYMMETRIC: tuple[TensorFormat, ...] = ("int8", "fp8", "int4")
each_format = pytest.mark.parametrize("format_", SYMMETRIC)


def bell(outputs: int = 24, inputs: int = 128, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((outputs, inputs)) * size).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Two values a byte, the low half first."""
    return np.stack([packed % 16, packed // 16], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def read(rounded: Rounded, inputs: int, bits: int) -> np.ndarray:
    """The values of `round_4_bits` or `round_8_bits`."""
    zeros = 128.0
    if bits == 4:
        assert rounded.zero_points is not None
        zeros = nibbles(rounded.zero_points)[:, : rounded.scales.shape[1], None]
    values = nibbles(rounded.data) if bits == 4 else rounded.data.astype(np.float32)
    steps = (values - zeros) * rounded.scales[..., None].astype(np.float32)
    return steps.reshape(len(rounded.data), -1)[:, :inputs]


def symmetric(weight: np.ndarray, format_: TensorFormat, type_: np.dtype) -> Rounded:
    return round_blocks(weight, 64, type_) if format_ == "int4" else round_rows(weight, format_, type_)


def widened(found: Rounded) -> np.ndarray:
    scales = found.scales.astype(np.float32)
    rows = scales[:, None] if scales.ndim == 1 else np.repeat(scales, found.data.shape[1] // scales.shape[1], 1)
    return found.data.astype(np.float32) * rows


def error(exact: np.ndarray, approximate: np.ndarray) -> float:
    return float(np.linalg.norm(exact - approximate) / np.linalg.norm(exact))


@each_type
@pytest.mark.parametrize(("inputs", "block"), [(32, 16), (40, 32), (96, 64), (96, 32)])
def test_reported_error_of_blocks_is_the_actual_error(inputs: int, block: int, type_: np.dtype) -> None:
    for size in (1.0, 1e-6):
        exact = bell(24, inputs, size)
        four, eight = round_4_bits(exact, block, type_), round_8_bits(exact, block, type_)
        assert four.scales.dtype == eight.scales.dtype == type_
        assert four.error == pytest.approx(error(exact, read(four, inputs, 4)), rel=1e-3)
        assert eight.error == pytest.approx(error(exact, read(eight, inputs, 8)), rel=1e-3)
        coarse = size < 1 and type_ == np.float16
        assert coarse or (0.04 < four.error < 0.12 and 0.002 < eight.error < 0.01)


def test_4_bit_rounding_is_better_than_a_minmax_grid() -> None:
    exact = bell(64, 256)
    blocks = exact.reshape(64, -1, 32)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale
    assert round_4_bits(exact, 32).error < 0.98 * error(blocks, plain)


def test_values_on_a_4_bit_grid_and_constants_are_exact() -> None:
    steps = np.random.default_rng(0).integers(0, 16, (8, 3, 32))
    steps[..., :2] = 0, 15
    zero = np.random.default_rng(1).integers(0, 16, (8, 3, 1))
    exact = ((steps - zero) * 0.25).astype(np.float32).reshape(8, 96)
    np.testing.assert_allclose(read(round_4_bits(exact, 32), 96, 4), exact, atol=1e-6)
    for value in (0.0, 0.5, -0.5):
        exact = np.full((4, 64), value, np.float32)
        np.testing.assert_allclose(read(round_4_bits(exact, 32), 64, 4), exact, rtol=1e-6)
        np.testing.assert_allclose(read(round_8_bits(exact, 32), 64, 8), exact, rtol=1e-6)


def test_row_is_rounded_as_in_a_larger_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, type_ = bell(50), np.dtype(np.float16)

    def rounded() -> list[Rounded]:
        others = [symmetric(exact, format_, type_) for format_ in SYMMETRIC]
        return [round_4_bits(exact, 32), round_8_bits(exact, 32), *others]

    whole = rounded()
    monkeypatch.setattr("graphs.quantization.rounding.CHUNK", 7 * 128)
    for one, other in zip(whole, rounded(), strict=True):
        np.testing.assert_array_equal(one.data.astype(np.float32), other.data.astype(np.float32))
        np.testing.assert_array_equal(one.scales, other.scales)
        assert one.error == pytest.approx(other.error, rel=1e-6)


@each_type
@each_format
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-9, 1e-7, 1e-5, 1e15])
def test_symmetric_rounding_reports_its_error_and_stays_in_range(
    format_: TensorFormat, type_: np.dtype, size: float
) -> None:
    if size > 1e4 and type_ == np.float16:
        pytest.skip("a weight of that size is out of range of fp16")
    exact = bell(size=size)
    found = symmetric(exact, format_, type_)
    assert found.scales.dtype == type_
    assert np.isfinite(widened(found)).all()
    assert (found.scales.astype(np.float32) > 0).all()
    assert np.abs(found.data.astype(np.float32)).max() <= {"int8": 127, "fp8": 448, "int4": 8}[format_]
    if size in (1.0, 1e-3):
        lost = error(exact, widened(found))
        assert found.error == pytest.approx(lost, rel=1e-3)
        assert {"int8": 0.005, "fp8": 0.015, "int4": 0.05}[format_] < lost < SymmetricScheme.limits[format_]


@each_type
def test_scales_are_rounded_up_to_the_next_value(type_: np.dtype) -> None:
    exact = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32) * np.float32(1e-3)
    found = at_least(exact, type_)
    below = np.nextafter(found, np.array(-np.inf, type_))
    assert (found.astype(np.float32) >= exact).all()
    assert (below.astype(np.float32) < exact).all()


KINDS = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@each_format
@pytest.mark.parametrize("bias", [False, True])
def test_product_equals_that_with_the_dequantized_weight(
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
    assert [engine.bytes for engine in quantizer.engines] == [
        24 * 128 * (4 if format_ == "int4" else 8) // 8 + 24 * (2 if format_ == "int4" else 1) * kind.itemsize
    ]
    onnx.checker.check_model(tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    type_ = np.dtype(KINDS[kind])
    rows = bell(5, 128).astype(type_)
    expected = rows.astype(np.float32) @ widened(symmetric(weight, format_, type_)).T + (offsets if bias else 0)
    np.testing.assert_allclose(
        session.run(["y"], {"x": rows})[0], expected, atol=1e-4 if type_ == np.float32 else 0.02, rtol=1e-3
    )


def test_weight_that_no_block_divides_gets_8_bits_and_reports_an_error_of_1(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        array = bell(16, 40)
        tensor = ir.LazyTensor(lambda: ir.tensor(array), ir.DataType.FLOAT16, ir.Shape(array.shape), name="w")
        stored = Quantizer(weights, SymmetricScheme()).store(tensor, "int4")
    assert (stored.format, stored.lost) == ("int8", 1.0)
