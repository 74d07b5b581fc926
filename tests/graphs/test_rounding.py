"""Weights in 8 and 4 bits, against a reading of the formats written apart."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.quantization.rounding import Rounded, round_4_bits, round_8_bits


def weight(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Two values a byte, the low half first."""
    return np.stack([packed % 16, packed // 16], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)


def read_4_bits(rounded: Rounded, inputs: int) -> np.ndarray:
    blocks = rounded.scales.shape[1]
    assert rounded.zero_points is not None
    zeros = nibbles(rounded.zero_points)[:, :blocks]
    values = (nibbles(rounded.data) - zeros[..., None]) * rounded.scales[..., None]
    return values.reshape(len(rounded.data), -1)[:, :inputs]


def read_8_bits(rounded: Rounded, inputs: int) -> np.ndarray:
    values = (rounded.data.astype(np.float32) - 128) * rounded.scales[..., None]
    return values.reshape(len(rounded.data), -1)[:, :inputs]


def error(exact: np.ndarray, approximate: np.ndarray) -> float:
    return float(np.linalg.norm(exact - approximate) / np.linalg.norm(exact))


@pytest.mark.parametrize("inputs", [32, 40, 96])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_say_their_error(inputs: int, block: int) -> None:
    exact = weight(24, inputs)
    for rounded, values in (
        (four := round_4_bits(exact, block), read_4_bits(four, inputs)),
        (eight := round_8_bits(exact, block), read_8_bits(eight, inputs)),
    ):
        assert rounded.error == pytest.approx(error(exact, values), rel=1e-4)
    assert 0.04 < four.error < 0.12
    assert 0.002 < eight.error < 0.01


def test_4_bits_are_better_than_the_plain_grid() -> None:
    exact = weight(64, 256)
    blocks = exact.reshape(64, -1, 32)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(blocks / scale) + zero, 0, 15) - zero) * scale
    assert round_4_bits(exact, 32).error < 0.98 * error(blocks, plain)


def test_values_on_a_grid_of_4_bits_are_exact() -> None:
    steps = np.random.default_rng(0).integers(0, 16, (8, 3, 32))
    steps[..., :2] = 0, 15
    zero = np.random.default_rng(1).integers(0, 16, (8, 3, 1))
    exact = ((steps - zero) * 0.25).astype(np.float32).reshape(8, 96)
    rounded = round_4_bits(exact, 32)
    np.testing.assert_allclose(read_4_bits(rounded, 96), exact, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_constant_weights_are_exact(value: float) -> None:
    exact = np.full((4, 64), value, np.float32)
    np.testing.assert_allclose(read_4_bits(round_4_bits(exact, 32), 64), exact, rtol=1e-6)
    np.testing.assert_allclose(read_8_bits(round_8_bits(exact, 32), 64), exact, rtol=1e-6)


def test_one_row_is_rounded_as_it_is_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = weight(50, 64)
    whole = round_4_bits(exact, 32), round_8_bits(exact, 32)
    monkeypatch.setattr("graphs.quantization.rounding.CHUNK", 7 * 64)
    pieces = round_4_bits(exact, 32), round_8_bits(exact, 32)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        np.testing.assert_array_equal(a.scales, b.scales)
        assert a.error == pytest.approx(b.error, rel=1e-6)
