"""Weights that have 4 bits already, as the package gguf writes and reads them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INSTRUCTIONS, case_of, here, multiply, with_rounded_rows
from profiles import tries

from freeexport.checkpoints.gguf_values import KINDS, values_of
from graphs.quantization.panels import BITS
from graphs.quantization.rounding import IntegerScheme, Rounded, on_grid, unpacked

FLOAT16 = np.dtype(np.float16)


def bell(outputs: int = 24, inputs: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def as_in(kind: str, weight: np.ndarray) -> np.ndarray:
    return dequantize(quantize(weight, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])


def any_q4_k(outputs: int, inputs: int) -> np.ndarray:
    """Weights that random bytes stand for, but for their two float16 a block of 256, which are given."""
    raw = np.random.default_rng(1).integers(0, 256, (outputs, inputs // 256, 144), np.uint8)
    raw[..., :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    return dequantize(raw.reshape(outputs, -1), GGMLQuantizationType.Q4_K)


def any_blocks(kind: str, outputs: int, inputs: int) -> np.ndarray:
    """Random bytes as blocks of a kind, with scales and offsets of an ordinary size."""
    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(2).integers(0, 256, (outputs * inputs // size, width), np.uint8)
    for at in {"Q6_K": [208], "Q5_0": [0], "Q8_0": [0]}.get(kind, [0, 2]):
        numbers = np.random.default_rng(at).uniform(1e-3, 2e-2, (len(raw), 1))
        raw[:, at : at + 2] = numbers.astype("<f2").view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_blocks_are_repacked_bit_exactly(kind: str) -> None:
    raw, known = any_blocks(kind, 20, 512), KINDS[kind]
    found = values_of(kind, raw, 20)
    assert found is not None
    case = case_of(found, 512, BITS[known.format], known.block)
    np.testing.assert_array_equal(
        case.values.astype(np.float32), dequantize(raw.reshape(20, -1), GGMLQuantizationType[kind])
    )
    x = np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)
    expected = with_rounded_rows(x, case)
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        np.testing.assert_allclose(multiply(name, x, case), expected, atol=4e-6 * np.abs(expected).max())
    raw[3, 208 if kind == "Q6_K" else 0 :][:2] = np.array([np.inf], "<f2").view(np.uint8)
    assert values_of(kind, raw, 20) is None


def read(rounded: Rounded, offsets: bool) -> np.ndarray:
    values, scales = unpacked(rounded.data).astype(np.float32), rounded.scales[..., None].astype(np.float32)
    if offsets:
        assert rounded.zero_points is None
        assert rounded.offsets is not None
        return (values * scales + rounded.offsets[..., None].astype(np.float32)).reshape(len(values), -1)
    assert rounded.zero_points is not None
    assert rounded.offsets is None
    return ((values - unpacked(rounded.zero_points)[:, : values.shape[1], None]) * scales).reshape(len(values), -1)


@pytest.mark.parametrize(("kind", "offsets"), [("Q4_0", False), ("Q4_1", True)])
def test_4_bit_weights_of_a_file_are_kept_exactly(kind: str, offsets: bool) -> None:
    weight = as_in(kind, bell())
    kept = on_grid(weight, 32, FLOAT16, offsets=True)
    assert kept is not None
    np.testing.assert_array_equal(read(kept, offsets), weight)
    assert kept.error == 0


def test_scales_beyond_float16_are_rounded_slightly() -> None:
    weight = any_q4_k(8, 512)
    kept = on_grid(weight, 32, FLOAT16, offsets=True)
    assert kept is not None
    assert np.abs(read(kept, True) - weight).max() < 1e-3 * np.abs(weight).max()
    assert 0 < kept.error < 5e-4
    weight = (as_in("Q4_0", bell()).view(np.uint32) & 0xFFFF0000).view(np.float32)  # as bfloat16 holds it
    kept = on_grid(weight, 32, FLOAT16, offsets=True)
    assert kept is not None
    assert kept.error < 5e-3


def test_weights_off_the_grid_are_not_kept() -> None:
    assert on_grid(as_in("Q4_1", bell()), 32, FLOAT16, offsets=False) is None
    assert on_grid(bell(), 32, FLOAT16, offsets=True) is None
    assert on_grid(as_in("Q8_0", bell()), 32, FLOAT16, offsets=True) is None
    almost = as_in("Q4_1", bell())
    almost[20, 100] += 0.05
    assert on_grid(almost, 32, FLOAT16, offsets=True) is None
    assert on_grid(as_in("Q4_1", bell())[:, :250], 32, FLOAT16, offsets=True) is None
    infinite = as_in("Q4_1", bell())
    infinite[0, 0] = np.inf
    assert on_grid(infinite, 32, FLOAT16, offsets=True) is None


def test_blocks_of_one_value_are_exact() -> None:
    weight = np.zeros((4, 96), np.float32)
    weight[1], weight[2, 32:64], weight[3, 5] = 0.5, -0.25, 15
    kept = on_grid(weight, 32, FLOAT16, offsets=False)
    assert kept is not None
    np.testing.assert_array_equal(read(kept, False), weight)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 4), st.integers(1, 15), st.booleans())
@tries(60)
def test_evenly_spaced_values_are_recognized(seed: int, outputs: int, blocks: int, steps: int, centred: bool) -> None:
    rng = np.random.default_rng(seed)
    spacing = rng.uniform(1e-3, 1, (outputs, blocks, 1)).astype(np.float16).astype(np.float32)
    start = -spacing * 7 if centred else (rng.standard_normal(spacing.shape) * 3).astype(np.float16).astype(np.float32)
    weight = (rng.integers(0, steps + 1, (outputs, blocks, 32)) * spacing + start).astype(np.float32)
    kept = on_grid(weight.reshape(outputs, -1), 32, FLOAT16, offsets=True)
    assert kept is not None
    found = read(kept, kept.offsets is not None)
    assert np.abs(found - weight.reshape(outputs, -1)).max() <= 2e-3 * np.abs(weight).max()


def test_scheme_keeps_weights_on_the_grid_without_rounding() -> None:
    weight = as_in("Q4_1", bell())
    own, portable = IntegerScheme(offsets=True), IntegerScheme()
    kept, block = own.round(weight, "int4", FLOAT16)
    assert (kept.error, block) == (0, 32)
    assert own.keeps(weight, FLOAT16)
    assert not portable.keeps(weight, FLOAT16)
    assert portable.round(weight, "int4", FLOAT16)[0].error > 0.01
