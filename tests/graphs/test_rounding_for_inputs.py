"""Weights in 4 bits, rounded for the inputs they meet: against GPTQ as its paper has it, against every choice there
is, and never worse than plain rounding."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import tries

from graphs.quantization import inputs as module
from graphs.quantization.inputs import DAMPING, round_4_bits_for
from graphs.quantization.rounding import best_range, dequantize, in_blocks, round_4_bits

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


def layer(outputs: int, inputs: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the moments of inputs that mix `rank` sources of very different size."""
    generator = np.random.default_rng(seed)
    sources = generator.standard_normal((4 * inputs, rank)) * np.exp(generator.uniform(-3, 1, rank))
    read = sources @ generator.standard_normal((rank, inputs))
    return generator.standard_normal((outputs, inputs)).astype(np.float32), read.T @ read


def damped(moments: np.ndarray) -> np.ndarray:
    found: np.ndarray = moments + np.eye(len(moments)) * DAMPING * np.diag(moments).mean()
    return found


def losses(weight: np.ndarray, approximate: np.ndarray, moments: np.ndarray) -> np.ndarray:
    wrong = approximate[:, : weight.shape[1]].astype(np.float64) - weight
    found: np.ndarray = np.einsum("oi,ij,oj->o", wrong, moments, wrong)
    return found


def gptq(weight: np.ndarray, moments: np.ndarray, block: int) -> np.ndarray:
    """One input after the other, the inverse of what is left written out each time (Frantar et al., equation 2)."""
    importance = np.diag(moments).astype(np.float32).reshape(-1, block)
    _, scales, zeros, _ = best_range(in_blocks(weight, block), FLOAT32, importance)
    left, inverse, result = weight.astype(np.float64), np.linalg.inv(moments), np.empty(weight.shape)
    for column in np.argsort(-np.diag(moments), kind="stable"):
        scale, zero = scales[:, column // block].astype(np.float64), zeros[:, column // block].astype(np.float64)
        result[:, column] = (np.clip(np.rint(left[:, column] / scale) + zero, 0, 15) - zero) * scale
        wrong = (left[:, column] - result[:, column]) / inverse[column, column]
        left -= wrong[:, None] * inverse[column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # it is not looked at again, and is no longer divided by
    return result


@pytest.mark.parametrize("inputs", [64, 160])
def test_without_descent_rounding_equals_gptq(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 0)
    weight, moments = layer(24, inputs, inputs // 2)
    found, wanted = dequantize(round_4_bits_for(weight, moments, 32)), gptq(weight, damped(moments), 32)
    # float32 against float64: a value that is half way between two steps may differ, and others make up for it.
    assert np.isclose(found, wanted, atol=1e-4).mean() > 0.97
    assert losses(weight, found, damped(moments)).sum() == pytest.approx(
        losses(weight, wanted, damped(moments)).sum(), rel=0.02
    )


def test_descent_improves_on_gptq_and_gptq_on_plain_rounding() -> None:
    weight, moments = layer(64, 192, 60)
    known = damped(moments)
    plain, ours = dequantize(round_4_bits(weight, 32)), dequantize(round_4_bits_for(weight, moments, 32))
    by_gptq = losses(weight, gptq(weight, known, 32), known).sum()
    assert losses(weight, ours, known).sum() < 0.95 * by_gptq < 0.5 * losses(weight, plain, known).sum()


def test_rounding_is_close_to_the_optimum_of_exhaustive_search() -> None:
    weight, moments = layer(40, 4, 3)
    known, rounded = damped(moments), round_4_bits_for(weight, moments, 4)
    assert rounded.zero_points is not None
    found, best = losses(weight, dequantize(rounded), known), np.empty(len(weight))
    every = np.array(list(product(range(16), repeat=4)), np.float64)
    for output, row in enumerate(weight):
        steps = (every - (rounded.zero_points[output, 0] & 15)) * float(rounded.scales[output, 0])
        wrong = steps - row
        best[output] = np.einsum("ni,ij,nj->n", wrong, known, wrong).min()
    assert (found >= best * (1 - 1e-3)).all()
    assert (found <= best * (1 + 1e-3)).mean() > 0.8
    assert found.sum() < 2 * best.sum() < 0.2 * losses(weight, dequantize(round_4_bits(weight, 4)), known).sum()


@tries(40)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 130),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
    size=st.sampled_from([1.0, 1e-4, 300.0]),
    dead=st.booleans(),
    type_=st.sampled_from([FLOAT16, FLOAT32]),
)
def test_no_output_is_worse_than_with_plain_rounding(
    outputs: int, inputs: int, rank: int, seed: int, size: float, dead: bool, type_: np.dtype
) -> None:
    weight, moments = layer(outputs, inputs, rank, seed)
    weight *= np.float32(size)
    if dead:
        weight[0] = 0
        moments[:, ::2] = moments[::2] = 0
    rounded, plain = round_4_bits_for(weight, moments, 32, type_), round_4_bits(weight, 32, type_)
    known = damped(moments)
    least, ours = losses(weight, dequantize(plain), known), losses(weight, dequantize(rounded), known)
    whole = np.einsum("oi,ij,oj->o", weight.astype(np.float64), known, weight)
    assert (ours <= least * 1.001 + 1e-6 * whole).all()
    assert (rounded.data.shape, rounded.data.dtype) == (plain.data.shape, plain.data.dtype)
    assert (rounded.scales.shape, rounded.scales.dtype) == (plain.scales.shape, type_)
    assert np.isfinite(rounded.scales).all()
    assert (rounded.scales > 0).all()
    exact = np.linalg.norm(weight)
    assert rounded.error * exact == pytest.approx(
        np.linalg.norm(dequantize(rounded)[:, :inputs] - weight), rel=1e-3, abs=1e-6 * float(exact)
    )


def test_rows_do_not_depend_on_the_chunks_of_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = layer(50, 96, 40)
    whole = round_4_bits_for(weight, moments, 32)
    again = round_4_bits_for(weight, moments, 32)
    monkeypatch.setattr("graphs.quantization.rounding.CHUNK", 96 * 7)
    pieces = round_4_bits_for(weight, moments, 32)
    assert (whole.data == again.data).all()
    assert (whole.scales == again.scales).all()
    assert np.isclose(dequantize(whole), dequantize(pieces), atol=1e-4).mean() > 0.98
