"""Products of fp32 rows with quantized weights: the bits of the same weight in fp32, everywhere and in every call."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, INSTRUCTIONS, Case, float_case, here, multiply, random_case, session
from profiles import tries
from test_kernels import rows, shapes

from graphs.quantization.panels import floats_in_panels
from graphs.quantization.rounding import Rounded
from runtime.engines.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

EXACT = {"activation_bits": 32}


def dequantized(case):
    """The weight in fp32, rounded once, as a GGUF file is read."""
    values = case.values.astype(np.float32)
    packed = Rounded(floats_in_panels(values, "fp32"), None, None, 0)
    return Case(case.outputs, case.inputs, 32, 32, packed, values.astype(np.float64), case.bias)


def everywhere(x, case, **fused):
    """The product, whose values are the same on every instruction set that this processor has."""
    y = multiply("scalar", x, case, **fused, **EXACT)
    for name in filter(here, ("scalar-bf16", *INSTRUCTIONS)):
        np.testing.assert_array_equal(multiply(name, x, case, **fused, **EXACT), y, name)
    return y


@given(shapes)
@tries(60)
def test_products_equal_those_of_the_dequantized_weight(shape):
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    np.testing.assert_array_equal(everywhere(x, case), multiply("scalar", x, dequantized(case)))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_row_of_a_large_call_equals_single_row(bits):
    rng = np.random.default_rng(bits)
    # More inputs than are widened at a time, and an incomplete panel.
    case, x = random_case(rng, 41, 768, bits, bias=True), rows(rng, 133, 768)
    alone = np.concatenate([multiply("scalar", row[None], case, **EXACT) for row in x])
    for count in (2, 15, 16, 33, 64, 133):
        np.testing.assert_array_equal(everywhere(x[:count], case), alone[:count])


@given(shapes, st.sampled_from(ACTIVATIONS), st.sampled_from([None, "gate", "beside"]), st.sampled_from([5, "bf16"]))
@tries(40)
def test_fused_operations_equal_those_with_the_dequantized_weight(shape, activation, second, other):
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case = random_case(rng, outputs, inputs, bits, block, bias)
    x, skip = rows(rng, count, inputs), rows(rng, count, inputs)
    up = float_case(rng, outputs, inputs, other, bias) if other == "bf16" else random_case(rng, outputs, inputs, 5)
    fused = {"skip": skip, "norm": rng.standard_normal(inputs).astype(np.float32), "beside": second == "beside"}
    fused["activation"] = "none" if second == "beside" else activation
    in_fp32 = up if other == "bf16" else dequantized(up)
    expected = multiply("scalar", x, dequantized(case), up=in_fp32 if second else None, **fused)
    np.testing.assert_array_equal(everywhere(x, case, up=up if second else None, **fused), expected)


@pytest.mark.parametrize(("bits", "threads"), [(4, 1), (4, 3), (8, 4), (5, 2), (6, 3)])
def test_products_do_not_depend_on_the_number_of_threads(bits, threads):
    rng = np.random.default_rng(bits)
    case = random_case(rng, 1000, 512, bits)
    product = session(case, threads, **EXACT)
    for count in (1, 2, 7, 130):
        x = rows(rng, count, 512)
        np.testing.assert_array_equal(product.run(None, {"x": x})[0], multiply("scalar", x, case, **EXACT))


def test_float_and_quantized_weights_can_share_a_product():
    rng = np.random.default_rng(4)
    case, up = float_case(rng, 48, 96, "bf16"), random_case(rng, 48, 96, 8)
    given = {"up_data": up.packed.data, "up_scales": up.packed.scales, "up_bits": 8, "up_block_size": 32}
    x = rows(rng, 3, 96)
    (y,) = session(case, activation="silu", **given, **EXACT).run(None, {"x": x})
    np.testing.assert_array_equal(y, multiply("scalar", x, case, activation="silu", up=up, **EXACT))
