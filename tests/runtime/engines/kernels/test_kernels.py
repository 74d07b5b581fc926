"""Products with packed weights: their values, the same bits from every instruction set, and what is refused."""

import math
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    ACTIVATIONS,
    EPSILON,
    INSTRUCTIONS,
    case_of,
    float_case,
    here,
    multiply,
    random_case,
    session,
    with_rounded_rows,
)
from profiles import tries

import runtime.engines.kernels
from graphs.quantization.rounding import Rounded, round_4_bits, round_8_bits
from runtime.engines.kernels import missing

SOURCE = Path(runtime.engines.kernels.__file__).with_name("source")
OFFICIAL = Path("/usr/include/onnxruntime/onnxruntime_c_api.h")

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

WIDE = {"activation_bits": 16}


def rows(rng, count, inputs):
    """Rows with outliers, as activations have them."""
    x = rng.standard_normal((count, inputs)).astype(np.float32)
    x[:, rng.integers(inputs)] *= 30
    return x


def assert_same_bits(ours, theirs, name=""):
    np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32), name)


def everywhere(x, case, **fused):
    """The product, which has the same bits on every instruction set that this processor has."""
    y = multiply("scalar", x, case, **fused)
    for name in filter(here, INSTRUCTIONS):
        assert_same_bits(multiply(name, x, case, **fused), y, name)
    return y


shapes = st.tuples(
    st.integers(0, 2**32), st.integers(1, 33), st.integers(1, 70),
    st.one_of(st.integers(1, 300), st.sampled_from([256, 512])), st.sampled_from([4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]), st.booleans(),
)  # fmt: skip


@given(shapes)
@tries(40)
def test_products_match_rounded_inputs_and_are_bit_identical_on_all_instruction_sets(shape):
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    expected, sizes = with_rounded_rows(x, case), np.abs(x).astype(np.float64) @ np.abs(case.values).T
    np.testing.assert_allclose(everywhere(x, case), expected, atol=1e-6 * sizes.max())


@pytest.mark.parametrize("activations", [{}, WIDE], ids=["int8", "int16"])
@pytest.mark.parametrize(("bits", "threads"), [(4, 1), (4, 4), (8, 1), (8, 4), (5, 4), (6, 4)])
def test_row_is_bit_identical_in_any_batch_and_with_any_number_of_threads(bits, threads, activations):
    rng = np.random.default_rng(bits)
    inputs = 512 if bits == 6 else 576
    case, x = random_case(rng, 1000, inputs, bits, bias=True), rows(rng, 70, inputs)
    alone = [multiply("scalar", row[None], case, **activations)[0] for row in x]
    product = session(case, threads, **activations)
    for count in (*range(1, 18), 33, 70):
        for start in (0, 70 - count):
            (y,) = product.run(None, {"x": x[start : start + count]})
            assert_same_bits(y, np.stack(alone[start : start + count]))


@pytest.mark.parametrize(("inputs", "block", "zeros"), [(1100, 32, True), (1056, 128, False), (400, 96, False)])
def test_rows_of_a_large_call_with_8_bit_weights_are_bit_identical(inputs, block, zeros):
    rng = np.random.default_rng(inputs)
    rounded = round_8_bits(rng.standard_normal((43, inputs)).astype(np.float32), block, np.dtype(np.float16))
    case, x = case_of(rounded, inputs, 8, block), rows(rng, 131, inputs)
    if zeros:
        points = rng.integers(0, 256, case.packed.scales.shape, np.uint8)
        case = replace(case, packed=replace(case.packed, zero_points=points))
    x[70, 5] = np.nan
    x[100] = 0
    for count in (16, 19, 64, 83, 131):
        everywhere(x[:count], case)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_rows_are_close_to_the_fp32_product(bits):
    rng = np.random.default_rng(bits)
    case, x = random_case(rng, 96, 576, bits), rng.standard_normal((33, 576)).astype(np.float32)
    exact = x @ case.values.T
    assert np.sqrt(np.square(multiply("scalar", x, case) - exact).mean() / np.square(exact).mean()) < 0.01


def test_long_prompts_are_split_over_threads_by_rows_and_outputs():
    rng = np.random.default_rng(5)
    case, x = random_case(rng, 90, 320, 8, bias=True), rows(rng, 501, 320)
    (y,) = session(case, 3).run(None, {"x": x})
    assert_same_bits(y, multiply("scalar", x, case))


def activated(activation, x):
    """In float64."""
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "gelu":
        return 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))
    inner = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3) if activation == "gelu-tanh" else x
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-inner)) if activation != "none" else x


def fused_case(shape, activation, before, up_bits):
    """A weight, rows, these as they are multiplied, and what stands before and behind the product."""
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    skip = rows(rng, count, inputs) if "skip" in before else None
    norm = rng.standard_normal(inputs).astype(np.float32) if before else None
    shift = rng.standard_normal(inputs).astype(np.float32) if "layer" in before else None
    up = None if up_bits is None else random_case(rng, outputs, inputs, up_bits, 32)
    total = x if skip is None else x + skip
    if norm is not None:
        centred = total - (0 if shift is None else total.mean(1, keepdims=True, dtype=np.float64))
        scale = 1 / np.sqrt(np.square(centred, dtype=np.float64).mean(1, keepdims=True) + EPSILON)
        total = (centred * scale * norm + (0 if shift is None else shift)).astype(np.float32)
    kept = total if "kept" in before else None
    fused = {"skip": skip, "norm": norm, "shift": shift, "activation": activation, "up": up, "keeps_norm": kept}
    return case, x, total, fused


BEFORE = ("", "norm", "skip", "layer", "layer skip", "layer skip kept")


@given(shapes, st.sampled_from(ACTIVATIONS), st.sampled_from(BEFORE), st.sampled_from([None, 4, 6, 8]))
@tries(60)
def test_fused_operations_match_float64_and_are_bit_identical_on_all_instruction_sets(
    shape, activation, before, up_bits
):
    case, x, total, fused = fused_case(shape, activation, before, up_bits)
    count, up = len(x), fused["up"]
    y = everywhere(x, case, **fused)
    for row in {0, count // 2, count - 1}:
        alone = {
            name: fused[name] if fused[name] is None else fused[name][row : row + 1] for name in ("skip", "keeps_norm")
        }
        assert_same_bits(multiply("scalar", x[row : row + 1], case, **fused | alone)[0], y[row])
    inner, gate = with_rounded_rows(total, case), np.ones(1) if up is None else with_rounded_rows(total, up)
    expected = activated(activation, inner) * gate
    # An activation may leave nothing of values that were large, and nearly all of a small one.
    size = max(np.abs(expected).max(), 0.1 * np.abs(inner).max() * np.abs(gate).max())
    # Where a norm's last bit tips a value over to the next of 255 steps.
    tolerance = 3e-2 if before else 8e-6
    np.testing.assert_allclose(y, expected, atol=tolerance * size + 1e-12)
    assert np.median(np.abs(y - expected)) <= 1e-4 * size + 1e-12


@pytest.mark.parametrize("activations", [{}, WIDE], ids=["int8", "int16"])
@given(shapes, st.integers(1, 50), st.sampled_from([4, 6, 8]), st.sampled_from(["", "norm", "skip"]))
@tries(40)
def test_side_by_side_products_equal_separate_products(activations, shape, second_outputs, second_bits, before):
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    second = random_case(rng, second_outputs, inputs, second_bits, 32, bias)
    norm = rng.standard_normal(inputs).astype(np.float32) if before else None
    fused = {"skip": rows(rng, count, inputs) if before == "skip" else None, "norm": norm, **activations}
    alone = [multiply("scalar", x, each, **fused) for each in (case, second)]
    assert_same_bits(everywhere(x, case, up=second, beside=True, **fused), np.concatenate(alone, axis=1))


@pytest.mark.parametrize(("threads", "bias"), [(1, True), (3, False), (3, True)])
def test_session_computes_side_by_side_products(bias, threads):
    rng = np.random.default_rng(7)
    case, second = (random_case(rng, outputs, 320, bits, bias=bias) for outputs, bits in ((600, 4), (50, 8)))
    up = {"up_data": second.packed.data, "up_scales": second.packed.scales}
    biases = {"bias": np.concatenate([case.bias, second.bias])} if bias else {}
    product = session(case, threads, up_N=50, up_bits=8, up_block_size=32, **up, **biases)
    for count in (1, 9, 130):
        x = rows(rng, count, 320)
        (y,) = product.run(None, {"x": x})
        assert_same_bits(y, np.concatenate([multiply("scalar", x, each) for each in (case, second)], axis=1))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_handle_very_large_and_small_values(activation):
    values = np.array([-1e38, -500, -88, -1e-30, 0, 1e-30, 10, 88, 500, 1e38, np.nan], np.float32)
    case = case_of(Rounded(np.full((1, 1, 32), 129, np.uint8), np.ones((1, 1), np.float16), None, 0), 1, 8, 32)
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        expected = activated(activation, values.astype(np.float64))
        y = multiply(name, values[:, None], case, activation=activation)[:, 0]
        np.testing.assert_allclose(y, expected, rtol=3e-6, atol=1e-30)


def test_one_operator_fuses_norm_sum_activation_and_gate():
    rng = np.random.default_rng(9)
    case, up, x, skip = *(random_case(rng, 90, 96, bits) for bits in (4, 8)), rows(rng, 40, 96), rows(rng, 40, 96)
    norm = rng.standard_normal(96).astype(np.float32)
    fused = session(
        case, 2, skip=skip, norm=norm, epsilon=EPSILON, activation="silu", up_data=up.packed.data,
        up_scales=up.packed.scales, up_zeros=up.packed.zero_points, up_bits=8, up_block_size=32,
    )  # fmt: skip
    y, total = fused.run(None, {"x": x, "skip": skip})
    assert_same_bits(y, multiply("scalar", x, case, skip=skip, norm=norm, activation="silu", up=up))
    np.testing.assert_array_equal(total, x + skip)
    with pytest.raises(Exception, match="skip has 96 values, x has 3840"):
        fused.run(None, {"x": x, "skip": skip[:1]})


def test_both_weights_of_a_graph_can_have_offsets():
    rng = np.random.default_rng(10)
    x, cases = rows(rng, 5, 96), []
    for _ in range(2):
        offsets = rng.standard_normal((90, 3)).astype(np.float16)
        data = rng.integers(0, 256, (90, 3, 16), np.uint8)
        cases.append(case_of(Rounded(data, np.abs(offsets) + np.float16(0.1), None, 0, offsets), 96, 4, 32))
    case, up = cases
    gated = session(
        case, 2, activation="silu", up_data=up.packed.data, up_scales=up.packed.scales, up_offsets=up.packed.offsets,
        up_bits=4, up_block_size=32,
    )  # fmt: skip
    (y,) = gated.run(None, {"x": x})
    assert_same_bits(y, multiply("scalar", x, case, activation="silu", up=up))
    expected = activated("silu", with_rounded_rows(x, case)) * with_rounded_rows(x, up)
    np.testing.assert_allclose(y, expected, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("bits", "data", "zero"),
    [(8, 0, None), (8, 255, None), (4, 255, 0), (4, 0, 15), (5, 0, None), (5, 31, None), (6, 0, None), (6, 63, None)],
)
def test_extreme_values_do_not_saturate(bits, data, zero):
    zeros = None if zero is None else np.full((16, 1), zero | zero << 4, np.uint8)
    blocks, block = (16, 16) if bits == 6 else (8, 32)
    weight = np.full((16, blocks, 16 if bits == 4 else block), data, np.uint8)
    zeros = None if zeros is None else np.repeat(zeros, 4, axis=1)
    multiples = np.ones((16, blocks, 1), np.int8) if bits == 6 else None
    scales = np.ones((16, 1 if bits == 6 else blocks), np.float16)
    case = case_of(Rounded(weight, scales, zeros, 0, None, multiples), 256, bits, block)
    x = np.full((9, 256), 127, np.float32)
    x[3] *= -1
    np.testing.assert_array_equal(everywhere(x, case), x @ case.values.T)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("weight", "options"),
    [(4, {}), (4, WIDE), (4, {"activation_bits": 32}), (4, {"prompt": True}), ("bf16", {})],
    ids=["int8", "int16", "exact", "prompt", "floats"],
)
def test_nan_and_infinity_affect_only_their_row(weight, options, bad):
    rng = np.random.default_rng(1)
    case = float_case(rng, 20, 70, weight) if weight == "bf16" else random_case(rng, 20, 70, weight)
    x = rows(rng, 40, 70)
    with_bad = x.copy()
    with_bad[3, 5] = bad
    for name in filter(here, ("scalar", "scalar-bf16", *INSTRUCTIONS)):
        good, y = (multiply(name, each, case, **options) for each in (x, with_bad))
        assert not np.isfinite(y[3]).any()
        assert_same_bits(np.delete(y, 3, 0), np.delete(good, 3, 0), name)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-31, 1e-30, 1e30])
@pytest.mark.parametrize(
    ("activations", "least", "share"), [({}, 1e-28, 2), (WIDE, 1e-27, 1e-2)], ids=["int8", "int16"]
)
def test_rows_of_very_small_and_very_large_values(activations, least, share, size):
    rng = np.random.default_rng(2)
    case = random_case(rng, 20, 70, 8)
    x = (rows(rng, 2, 70) * size).astype(np.float32)
    expected = x.astype(np.float64) @ case.values.T
    found = everywhere(x, case, **activations)
    np.testing.assert_allclose(found, expected, atol=max(least, np.abs(x).max() * share))


def test_every_class_of_float16_scale_is_read_alike_by_all_instruction_sets():
    rng = np.random.default_rng(8)
    scales = np.array([6e-8, 1e-6, 6.1e-5, 0.1, 60000, np.inf, -0.5, 0] * 2, np.float16)[:, None]
    case = case_of(Rounded(rng.integers(0, 256, (16, 1, 32), np.uint8), scales, None, 0), 32, 8, 32)
    x = rows(rng, 3, 32)
    y = multiply("scalar", x, case)
    for name in filter(here, INSTRUCTIONS):
        np.testing.assert_array_equal(multiply(name, x, case), y)
    finite = np.isfinite(scales[:, 0])
    case.values[~finite] = 0
    np.testing.assert_allclose(y[:, finite], with_rounded_rows(x, case)[:, finite], rtol=1e-5)
    assert not np.isfinite(y[:, ~finite]).any()


def test_empty_inputs_and_inputs_of_more_dimensions():
    rng = np.random.default_rng(3)
    case = random_case(rng, 20, 32, 8)
    product = session(case)
    assert product.run(None, {"x": np.zeros((0, 32), np.float32)})[0].shape == (0, 20)
    x = rows(rng, 6, 32)
    expected = multiply("scalar", x, case)
    for shape in ((2, 3, 32), (6, 32)):
        (y,) = product.run(None, {"x": x.reshape(shape)})
        np.testing.assert_array_equal(y.reshape(6, 20), expected)
    np.testing.assert_array_equal(product.run(None, {"x": x[0]})[0], expected[0])


THREE, UP = np.ones(3, np.float16), {"up_data": np.ones(3, np.uint8), "up_scales": np.ones(3, np.float16)}
WRONG = {
    "K is 64": {"x": (2, 63)},
    "no dimension": {"x": ()},
    "data have 1024 elements, .* want 1536": {"K": 96},
    "want 1536": {"N": 33},
    "scales have": {"scales": THREE},
    "zero points have": {"zeros": np.ones(3, np.uint8)},
    "offsets have": {"zeros": None, "offsets": THREE},
    "offsets go with 4 and 5 bits, and with no zero points": {"offsets": np.ones(64, np.float16)},
    "bias have": {"bias": np.ones(21, np.float32)},
    "bits is not 4, 5, 6, 8, 16 or 32": {"bits": 7},
    "data have 1024 elements, .* want 1280": {"bits": 5, "zeros": None},
    "zero points go with 4 and 8 bits": {"bits": 5},
    "block_size of 6 bits is not 16": {"bits": 6, "zeros": None},
    "multiples go with 6 bits": {"bits": 6, "block_size": 16, "zeros": None},
    "multiples go with 6 bits, or with offsets": {"multiples": np.ones(64, np.int8)},
    "K is no multiple of 256": {"multiples": np.ones(64, np.int8), "zeros": None, "offsets": np.ones(64, np.float16)},
    "no multiple of 32": {"block_size": 48},
    "activation_bits is not 8, 16 or 32": {"activation_bits": 12},
    "out of range": {"N": -1},
    "K is out of range|N or K": {"K": 2**40},
    "input 1 is marked single": {"data": None},
    "norms have 3 elements": {"norm": np.ones(3, np.float32), "epsilon": 1e-5},
    "epsilon": {"norm": np.ones(64, np.float32)},
    "skip goes with a norm": {"skip": np.ones(64, np.float32)},
    "keeps_norm goes with skip": {"norm": np.ones(64, np.float32), "epsilon": 1e-5, "keeps_norm": 1},
    "shifts go with a layer norm": {"norm": np.ones(64, np.float32), "epsilon": 1e-5, "shift": np.ones(64, np.float32)},
    "a layer norm goes with norms": {"layer": 1},
    "skip goes with a second output": {
        "skip": np.ones(64, np.float32), "norm": np.ones(64, np.float32), "epsilon": 1e-5, "single": True,
    },
    "none of none, relu, silu, gelu-tanh and gelu": {"activation": "tanh"},
    "scales go with weights of at most 8 bits, and these with scales": {"scales": None, "zeros": None},
    "up_bits": UP,
    "up_N goes with up's data": {"up_N": 16},
    "and with no activation": {**UP, "up_N": 16, "activation": "relu"},
    "offsets go with 4 and 5 bits": {**UP, "up_offsets": THREE, "up_bits": 8, "up_block_size": 32},
    "up's data have 3 elements": {**UP, "up_bits": 4, "up_block_size": 32},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_contradictory_sizes_are_refused(message):
    rounded = round_4_bits(np.random.default_rng(0).standard_normal((20, 64), np.float32), 32, np.dtype(np.float16))
    change = dict(WRONG[message])
    shape = change.pop("x", (2, 64))

    def run():
        wrong = session(case_of(rounded, 64, 4, 32), **change)
        wrong.run(["y"], {given.name: np.ones(shape, np.float32) for given in wrong.get_inputs()})

    with pytest.raises(Exception, match=message):
        run()


@pytest.mark.skipif(shutil.which("g++") is None or not OFFICIAL.is_file(), reason="needs g++ and libonnxruntime-dev")
def test_api_declarations_match_the_official_header(tmp_path):
    for name in ("ort_api.h", "check_ort_api.cpp"):
        shutil.copy(SOURCE / name, tmp_path)

    def check():
        command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{OFFICIAL.parent}", "check_ort_api.cpp"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert check().returncode == 0, check().stderr
    header = tmp_path / "ort_api.h"
    header.write_text(header.read_text().replace("unused_11[16]", "unused_11[15]"))
    assert "KernelInfoGetConstantInput_tensor" in check().stderr


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64")
def test_sanitizers_find_no_error_in_the_kernels(tmp_path):
    child = Path(__file__).parents[2] / "kernel_sanitizer.py"
    done = subprocess.run([sys.executable, child, tmp_path], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "products checked" in done.stdout
