"""Products with weights of floats: their values, the same bits everywhere and in every call, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    ACTIVATIONS,
    INSTRUCTIONS,
    float_case,
    here,
    multiply,
    packed_rows,
    random_case,
    session,
)
from profiles import tries

from graphs.quantization.panels import narrowest
from runtime.engines.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

FORMATS = ("bf16", "fp16", "fp32")
shapes = st.tuples(
    st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 70), st.integers(1, 300), st.sampled_from(FORMATS),
    st.booleans(),
)  # fmt: skip


def rows(rng, count, inputs):
    return rng.standard_normal((count, inputs)).astype(np.float32)


def everywhere(x, case, **fused):
    """The product, which has the same bits on every instruction set that this processor has."""
    y = multiply("scalar", x, case, **fused)
    for name in filter(here, INSTRUCTIONS):
        np.testing.assert_array_equal(multiply(name, x, case, **fused).view(np.int32), y.view(np.int32), name)
    return y


@given(shapes)
@tries(40)
def test_products_match_float64_and_are_bit_identical_on_all_instruction_sets(shape):
    seed, count, outputs, inputs, format_, bias = shape
    rng = np.random.default_rng(seed)
    case, x = float_case(rng, outputs, inputs, format_, bias), rows(rng, count, inputs)
    y = everywhere(x, case)
    expected = x @ case.values.T + (0 if case.bias is None else case.bias)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)
    for row in {0, count // 2, count - 1}:
        np.testing.assert_array_equal(multiply("scalar", x[row : row + 1], case)[0], y[row])


@given(shapes, st.sampled_from(ACTIVATIONS), st.sampled_from([None, "gate", "beside"]), st.sampled_from(FORMATS))
@tries(40)
def test_fused_operations_match_separate_products(shape, activation, second, other):
    seed, count, outputs, inputs, format_, bias = shape
    rng = np.random.default_rng(seed)
    case, up = (float_case(rng, outputs, inputs, each, bias) for each in (format_, other))
    x, skip = rows(rng, count, inputs), rows(rng, count, inputs)
    fused = {"skip": skip, "norm": rng.standard_normal(inputs).astype(np.float32)}
    if second == "beside":
        alone = [multiply("scalar", x, each, **fused) for each in (case, up)]
        y = everywhere(x, case, up=up, beside=True, **fused)
        np.testing.assert_array_equal(y, np.concatenate(alone, axis=1))
        return
    y = everywhere(x, case, activation=activation, up=up if second else None, **fused)
    alone = multiply("scalar", x, case, activation=activation, **fused)
    np.testing.assert_array_equal(y, alone * multiply("scalar", x, up, **fused) if second else alone)


@pytest.mark.parametrize("second", [None, "gate", "beside"])
@pytest.mark.parametrize("format_", FORMATS)
def test_row_of_a_large_call_is_bit_identical_to_single_row(format_, second):
    rng = np.random.default_rng(0)
    case, up = (float_case(rng, 75, 600, format_, bias=True) for _ in range(2))
    x = rows(rng, 91, 600)
    fused = {"up": up if second else None, "beside": second == "beside"}
    y = everywhere(x, case, **fused)
    for row in (0, 7, 23, 64, 88, 90):
        np.testing.assert_array_equal(multiply("scalar", x[row : row + 1], case, **fused)[0], y[row])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format_", FORMATS)
def test_session_multiplies_float_weights_in_prompts_as_in_steps(format_, threads):
    rng = np.random.default_rng(threads)
    case = float_case(rng, 1000, 576, format_)
    product = session(case, threads)
    for count in (1, 7, 130):
        x = rows(rng, count, 576)
        expected = multiply("scalar", x, case)
        np.testing.assert_array_equal(product.run(None, {"x": x})[0], expected)
        for name in filter(here, ("scalar-bf16", *INSTRUCTIONS)):
            np.testing.assert_array_equal(multiply(name, x, case, prompt=True), expected, name)


@pytest.mark.parametrize("format_", FORMATS)
def test_packed_rows_returns_the_values_of_the_table(format_):
    case = float_case(np.random.default_rng(1), 50, 70, format_)
    indices = np.array([[0, 49], [17, 0]])
    (found,) = packed_rows(case).run(None, {"indices": indices})
    np.testing.assert_array_equal(found, case.values[indices].astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 64}, "block_size of 16 and 32 bits is not 32"),
        ({"bits": 32}, "data have 9216 elements, N, K, bits and block_size want 18432"),
        ({"scales": np.ones((3, 3, 16), np.float16)}, "scales go with weights of at most 8 bits"),
        ({"zeros": np.ones((3, 3, 16), np.uint8)}, "16 and 32 bits go with no zero points, offsets or multiples"),
        ({"activation_bits": 16}, "activation_bits 16 go with weights of at most 8 bits"),
    ],
)
def test_graphs_with_unexpected_tensors_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        session(float_case(np.random.default_rng(3), 48, 96, "bf16"), **changes)


def test_float_and_quantized_weights_in_one_product_are_refused():
    rng = np.random.default_rng(4)
    case, up = float_case(rng, 48, 96, "bf16"), random_case(rng, 48, 96, 8)
    given = {"up_data": up.packed.data, "up_scales": up.packed.scales, "up_bits": 8, "up_block_size": 32}
    with pytest.raises(Exception, match="up has floats, or the other weight has, but not both"):
        session(case, activation="silu", **given)


@pytest.mark.parametrize(
    ("values", "format_"),
    [([1.0, -2.5, 2.0**127], "bf16"), ([1.0, 1 + 2**-10, 2**-24], "fp16"), ([1.0, 70000.0 + 2**-3], "fp32"),
     ([1 + 2**-23], "fp32")],
)  # fmt: skip
def test_narrowest_format_holds_all_values_exactly(values, format_):
    assert narrowest(np.array([values], np.float32)) == format_
