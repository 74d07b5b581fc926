"""The rule that keeps a weight higher, and that each weight stands once a format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from graphs.graph import STACK
from graphs.quantization.plan import ROUNDING
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import IntegerScheme, round_4_bits
from graphs.weights import WeightFile
from runtime.bundle.quantization import TensorFormat


def tensor(array: np.ndarray, name: str = "w") -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.tensor(array), ir.DataType.FLOAT, ir.Shape(array.shape), name=name)


def stack(parts: dict[str, np.ndarray]) -> ir.LazyTensor:
    whole = tensor(np.concatenate(list(parts.values())), STACK.join(parts))
    whole.meta[STACK] = [len(part) for part in parts.values()]
    return whole


def bell(outputs: int = 16, inputs: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def with_outliers(inputs: int, every: int, rest: float) -> np.ndarray:
    """Weights 1 and -1 once in `every` inputs, which take the range from all others, `rest` at most."""
    array = np.random.default_rng(0).uniform(-rest, rest, (16, inputs)).astype(np.float32)
    array[:, ::every], array[:, 1::every] = 1, -1
    return array


@pytest.mark.parametrize(
    ("array", "wanted", "stored"),
    [
        (with_outliers(64, 32, 0.2), "int4", "int8-block"),
        (with_outliers(1024, 1024, 0.02), "int4", "int4"),
        (bell(), "int4", "int4"),
        (bell(), "int8-block", "int8-block"),
    ],
)
def test_weight_with_too_large_an_error_gets_the_next_format(
    array: np.ndarray, wanted: TensorFormat, stored: TensorFormat, weights: WeightFile
) -> None:
    found = Quantizer(weights, IntegerScheme()).store(tensor(array), wanted)
    assert found.format == stored
    assert found.error <= IntegerScheme.limits[stored]
    assert found.bytes == weights.bytes
    # What it would have lost is remembered, to be shown.
    assert (found.lost > IntegerScheme.limits[wanted]) == (wanted != stored)


def test_weight_that_no_format_holds_stays_in_fp32(weights: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphs.quantization.rounding.IntegerScheme.limits", {"int4": 0.0, "int8-block": 0.0})
    stored = Quantizer(weights, IntegerScheme()).store(tensor(bell()), "int4")
    assert (stored.format, stored.operands) == ("fp32", {})
    assert 0.05 < stored.lost < 0.12
    assert weights.bytes == 0


def test_weight_that_no_format_holds_is_stored_as_floats_for_our_kernels(
    weights: WeightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphs.quantization.rounding.IntegerScheme.limits", {"int4": 0.0, "int8-block": 0.0})
    array = bell()
    for values, format_ in ((array, "fp32"), (array.astype(np.float16).astype(np.float32), "fp16")):
        stored = Quantizer(weights, IntegerScheme(), own=True).store(tensor(values), "int4")
        assert (stored.format, list(stored.operands), stored.error) == (format_, ["data"], 0.0)
        assert 0.05 < stored.lost < 0.12


def easy() -> np.ndarray:
    """Weights that stand near 16 even steps."""
    steps = np.random.default_rng(0).integers(0, 16, (8, 256))
    steps[:, ::16], steps[:, 1::16] = 0, 15
    return ((steps - 8 + np.random.default_rng(1).uniform(-0.1, 0.1, steps.shape)) * 0.1).astype(np.float32)


def test_weight_with_a_small_error_gets_larger_blocks(weights: WeightFile) -> None:
    stored = Quantizer(weights, IntegerScheme()).store(tensor(easy()), "int4")
    assert (stored.format, stored.block) == ("int4", 128)
    assert Quantizer(weights, IntegerScheme()).store(tensor(bell(), "bell"), "int4").block == 32


@pytest.mark.parametrize(("width", "block"), [(256, 128), (576, 64), (96, 32), (40, 32)])
def test_int8_uses_the_largest_block_that_divides_the_inputs(width: int, block: int, weights: WeightFile) -> None:
    for stored in (
        Quantizer(weights, IntegerScheme()).store(tensor(bell(16, width)), "int8-block"),
        Quantizer(weights, IntegerScheme()).store_table(tensor(bell(16, width), "table")),
    ):
        assert stored.block == block
        assert stored.error < 0.01
    # CUDA's kernels were tried with these alone.
    alone = ROUNDING["cuda"].scheme
    assert Quantizer(weights, alone).store(tensor(bell(16, width), "cuda"), "int8-block").block == 32


@pytest.mark.parametrize("easily", [False, True])
def test_fitted_weights_are_kept_when_projections_are_stacked(easily: bool, weights: WeightFile) -> None:
    """Beside one that was not fitted, which is as without text, though it would get larger blocks if it is easy."""
    sizes = (("q", 24), ("k", 8), ("v", 8))
    parts = {name: easy() if easily else bell(outputs, seed=seed) for seed, (name, outputs) in enumerate(sizes)}
    given = {name: replace(round_4_bits(parts[name][:, ::-1], 32), error=9.0) for name in ("q", "v")}
    fitted = Quantizer(weights, IntegerScheme(), given=given).store(stack(parts), "int4")
    weights.flush()
    stored = [given["q"], round_4_bits(parts["k"], 32), given["v"]]
    expected = [getattr(part, kind) for kind in ("data", "scales", "zero_points") for part in stored]
    # As written, without what pads it.
    raw = weights.path.read_bytes()
    found = b"".join(raw[operand.offset : operand.offset + operand.length] for operand in fitted.operands.values())
    assert found == b"".join(part.tobytes() for part in expected)
    assert fitted.block == 32
    # What a stack loses is what it would without text.
    if not easily:
        assert fitted.error == fitted.lost == round_4_bits(np.concatenate(list(parts.values())), 32).error


def test_weight_is_read_and_written_once_per_format(weights: WeightFile) -> None:
    quantizer = Quantizer(weights, IntegerScheme())
    first = quantizer.store(tensor(bell()), "int4")
    written = weights.bytes

    def never() -> ir.Tensor:
        raise AssertionError("read again")

    again = ir.LazyTensor(never, ir.DataType.FLOAT, ir.Shape((16, 64)), name="w")
    assert quantizer.store(again, "int4") is first
    assert weights.bytes == written


@pytest.mark.parametrize("width", [64, 96, 256])
def test_tied_head_and_embedding_share_their_bytes(width: int, weights: WeightFile) -> None:
    quantizer = Quantizer(weights, IntegerScheme())
    head = quantizer.store(tensor(bell(16, width)), "int8-block")
    table = quantizer.store_table(tensor(bell(16, width)))
    assert [part.offset for part in head.operands.values()] == [part.offset for part in table.operands.values()]
    assert table.operands["data"].shape == (16, width)
    assert weights.bytes == head.bytes
