"""Products with activations in 16 bits: their error, and the same bits in every call and from every instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, INSTRUCTIONS, here, multiply, random_case, session
from profiles import tries
from test_kernels import BEFORE, activated, assert_same_bits, everywhere, fused_case, rows, shapes

from runtime.engines.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

WIDE = {"activation_bits": 16}


def root_mean_square(values):
    return np.sqrt(np.square(values).mean())


@given(shapes)
@tries(40)
def test_error_of_16_bit_activations_is_fifty_times_smaller_than_with_8_bits(shape):
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    exact = x.astype(np.float64) @ case.values.T + (0 if case.bias is None else case.bias)
    sizes = np.abs(x).astype(np.float64) @ np.abs(case.values).T
    narrow, wide = (root_mean_square(everywhere(x, case, **each) - exact) for each in ({}, WIDE))
    # Rounding in fp32 remains where 8 bits are exact, for instance with one input per group.
    assert wide <= max(narrow / 50, 2e-7 * sizes.max())


@given(shapes, st.sampled_from(ACTIVATIONS), st.sampled_from(BEFORE), st.sampled_from([None, 4, 6, 8]))
@tries(40)
def test_fused_operations_match_float64_and_are_bit_identical_on_all_instruction_sets(
    shape, activation, before, up_bits
):
    case, x, total, fused = fused_case(shape, activation, before, up_bits)
    y = everywhere(x, case, **fused, **WIDE)
    for row in {0, len(x) // 2, len(x) - 1}:
        alone = {name: fused[name][row : row + 1] for name in ("skip", "keeps_norm") if fused[name] is not None}
        assert_same_bits(multiply("scalar", x[row : row + 1], case, **fused | alone, **WIDE)[0], y[row])
    inner = total.astype(np.float64) @ case.values.T + (0 if case.bias is None else case.bias)
    gate = np.ones(1) if fused["up"] is None else total.astype(np.float64) @ fused["up"].values.T
    sizes = np.abs(total).astype(np.float64) @ np.abs(case.values).T
    np.testing.assert_allclose(y, activated(activation, inner) * gate, atol=2e-4 * sizes.max() * np.abs(gate).max())


@pytest.mark.parametrize(("bits", "threads"), [(4, 4), (8, 1), (8, 4), (5, 4), (6, 4)])
def test_row_is_bit_identical_in_any_batch_and_with_any_number_of_threads(bits, threads):
    rng = np.random.default_rng(bits)
    inputs = 512 if bits == 6 else 576
    case, x = random_case(rng, 1000, inputs, bits, bias=True), rows(rng, 70, inputs)
    alone = [multiply("scalar", row[None], case, **WIDE)[0] for row in x]
    product = session(case, threads, **WIDE)
    for count in (*range(1, 10), 16, 33, 70):
        (y,) = product.run(None, {"x": x[-count:]})
        assert_same_bits(y, np.stack(alone[-count:]))


def test_side_by_side_products_equal_separate_products():
    rng = np.random.default_rng(3)
    cases, x = (
        [random_case(rng, outputs, 320, bits, bias=True) for outputs, bits in ((90, 4), (50, 8))],
        rows(rng, 9, 320),
    )
    alone = [multiply("scalar", x, each, **WIDE) for each in cases]
    assert_same_bits(everywhere(x, cases[0], up=cases[1], beside=True, **WIDE), np.concatenate(alone, axis=1))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_extreme_values_do_not_saturate(bits):
    case = random_case(np.random.default_rng(bits), 20, 256, bits)
    x = np.full((9, 256), 1e4, np.float32)
    x[:, ::2] = 1e4 * (1 - 0.5 / 127)  # remainders of half a step
    x[3] *= -1
    exact = x.astype(np.float64) @ case.values.T
    np.testing.assert_allclose(
        everywhere(x, case, **WIDE), exact, atol=1e-6 * np.abs(x).max() * np.abs(case.values).sum(1).max()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_affects_only_its_row(bad):
    rng = np.random.default_rng(1)
    case, x = random_case(rng, 20, 70, 4), rows(rng, 3, 70)
    good = everywhere(x, case, **WIDE)
    x[1, 40] = bad
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        y = multiply(name, x, case, **WIDE)
        assert np.isnan(y[1]).all()
        np.testing.assert_array_equal(y[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_rows_of_very_small_and_very_large_values(size):
    rng = np.random.default_rng(2)
    case = random_case(rng, 20, 70, 8)
    x = (rows(rng, 2, 70) * size).astype(np.float32)
    expected = x.astype(np.float64) @ case.values.T
    np.testing.assert_allclose(everywhere(x, case, **WIDE), expected, atol=max(1e-27, np.abs(x).max() * 1e-2))


def test_tiled_prompts_are_equal_with_8_and_16_bit_activations():
    rng = np.random.default_rng(4)
    case, x = random_case(rng, 64, 320, 4), rows(rng, 20, 320)
    for name in filter(here, ("amx", "scalar-bf16")):
        narrow, wide = (multiply(name, x, case, prompt=True, **each) for each in ({}, WIDE))
        assert_same_bits(wide, narrow)
