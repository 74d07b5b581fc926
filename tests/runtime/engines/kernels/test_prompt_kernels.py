"""Products and attention of a prompt in tiles of bfloat16: against float64, the same bits whatever stands beside a row,
and which calls have them."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from attention_cases import Call, attend, attention_session, encoder_session, exact, feeds, random_call, random_layer
from checkpoints import BY_NAME
from checkpoints import LONG as LONG_MODEL
from hypothesis import assume, example, given
from hypothesis import strategies as st
from kernel_cases import ACTIVATIONS, here, multiply, random_case, session
from profiles import tries
from test_attention_kernel import pasts
from test_kernels import BEFORE, activated, assert_same_bits, fused_case, rows, shapes

import runtime.decoding.decoder
from runtime import Session
from runtime.decoding.decoder import Decoder
from runtime.engines import runner
from runtime.engines.kernels import missing, prompt_differs_from, reading_prompt

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

TILES = {"prompt": True}
# AMX where the processor has it, and the plain kernels that imitate it.
TILED = [name for name in ("amx", "scalar-bf16") if here(name)]
tiled = pytest.mark.parametrize("name", TILED)
CASE = BY_NAME["llama-tied"]


def in_tiles(shape, activation="none", up=None):
    """Whether a prompt has this product in tiles: a head has not (`is_head` in packed_linear.cpp)."""
    _, _, outputs, inputs, *_ = shape
    return outputs <= 16 * inputs or activation != "none" or up is not None


def rounded(x):
    """To the nearest bfloat16, as float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def in_bfloat16(x, case):
    """The product of rounded rows and weights, in float64, and how far sums in fp32 may be from it: each addition
    rounds once, to 2^-24 of what stands there then, at most the sum of magnitudes."""
    x, weight = rounded(x), rounded(case.values)
    bias = np.zeros(1) if case.bias is None else case.bias
    sizes = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, (case.inputs + 2) * 2.0**-24 * sizes + 1e-30


@tiled
@given(shapes, st.sampled_from([None, 4, 5, 6, 8]))
@tries(60)
def test_products_match_inputs_and_weights_rounded_to_bfloat16(name, shape, second):
    assume(in_tiles(shape, up=second))
    seed, count, outputs, inputs, bits, block, bias = shape
    rng = np.random.default_rng(seed)
    case, x = random_case(rng, outputs, inputs, bits, block, bias), rows(rng, count, inputs)
    cases = [case] if second is None else [case, random_case(rng, outputs + 3, inputs, second, 32, bias)]
    y = multiply(name, x, case, up=None if second is None else cases[1], beside=second is not None, **TILES)
    pairs = [in_bfloat16(x, one) for one in cases]
    expected, limit = (np.concatenate(part, axis=1) for part in zip(*pairs, strict=True))
    assert (np.abs(y - expected) <= limit).all()
    # A factor that is rounded to 8 bits is off by 2^-8 of itself at most, a product of two by twice that.
    exact = x.astype(np.float64) @ case.values.T + (0 if case.bias is None else case.bias)
    sizes = np.abs(x).astype(np.float64) @ np.abs(case.values).T
    assert (np.abs(y[:, :outputs] - exact) <= 1.01 * 2.0**-7 * sizes + limit[:, :outputs]).all()


@tiled
@given(shapes, st.sampled_from(ACTIVATIONS), st.sampled_from(BEFORE), st.sampled_from([None, 4, 6, 8]))
@example((0, 1, 17, 1, 4, 32, False), "none", "", None)  # a head
@tries(60)
def test_fused_operations_in_tiles_match_other_calls(name, shape, activation, before, up_bits):
    case, x, total, fused = fused_case(shape, activation, before, up_bits)
    up = fused["up"]
    y = multiply(name, x, case, **fused, **TILES)
    if not in_tiles(shape, activation, up):
        assert_same_bits(y, multiply("scalar", x, case, **fused))
        return
    inner, gate = in_bfloat16(total, case)[0], np.ones(1) if up is None else in_bfloat16(total, up)[0]
    expected = activated(activation, inner) * gate
    size = max(np.abs(expected).max(), 0.1 * np.abs(inner).max() * np.abs(gate).max())
    # Where a norm's last bit tips a value over to the next bfloat16.
    np.testing.assert_allclose(y, expected, atol=(2.0**-7 if before else 2e-5) * size + 1e-12)
    assert np.median(np.abs(y - expected)) <= 1e-3 * size + 1e-12


@tiled
@pytest.mark.parametrize(
    ("bits", "inputs", "threads"), [(4, 576, 1), (4, 1500, 3), (8, 1500, 1), (5, 576, 3), (6, 1536, 3)]
)
def test_row_is_bit_identical_in_any_batch_and_with_any_number_of_threads(name, bits, inputs, threads, monkeypatch):
    rng = np.random.default_rng(bits)
    case, x = random_case(rng, 600, inputs, bits, bias=True), rows(rng, 600, inputs)
    alone = np.concatenate([multiply(name, row[None], case, **TILES) for row in x[:70]])
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    product = session(case, threads)
    with reading_prompt():
        (whole,) = product.run(None, {"x": x})
    assert_same_bits(whole[:70], alone)
    for start, end in ((0, 1), (0, 15), (3, 20), (5, 38), (40, 600), (17, 530)):
        with reading_prompt():
            (y,) = product.run(None, {"x": x[start:end]})
        assert_same_bits(y, whole[start:end])
    (y,) = product.run(None, {"x": x[:40]})
    assert_same_bits(y, multiply("scalar", x[:40], case))


@tiled
def test_output_heads_do_not_use_tiles_in_prompts(name):
    rng = np.random.default_rng(2)
    case, x = random_case(rng, 600, 36, 8), rows(rng, 3, 36)
    assert_same_bits(multiply(name, x, case, **TILES), multiply("scalar", x, case))


layers = st.tuples(
    st.integers(0, 2**32), st.sampled_from([(1, 1), (4, 2), (9, 3), (5, 1), (12, 12)]),
    st.sampled_from([16, 24, 40, 64, 128, 256]), st.sampled_from([0, 1, 5, 30, 100]),
    st.sampled_from(["", "r", "rn", "n", "p", "rs", "rh", "nsh"]),
)  # fmt: skip
sequences = st.lists(st.tuples(pasts, st.integers(1, 60)), min_size=1, max_size=2)


def assert_same_in_pieces(name, layer, call, packed, y, piece):
    """Each piece of the rows of a finished call gives the same bits as the whole call gave, `y`."""
    for b, (past, length) in enumerate(zip(call.past, call.lengths, strict=True)):
        for row in range(0, length, piece):
            count = min(piece, length - row)
            key, value = (cache[b : b + 1].copy() for cache in (call.key, call.value))
            key[:, :, past + row :] = value[:, :, past + row :] = np.nan  # unspecified, and never read
            alone = Call(call.rows[b : b + 1, row : row + count], key, value, call.past[b : b + 1] + np.int32(row),
                         np.array([count], np.int32))  # fmt: skip
            np.testing.assert_array_equal(attend(name, layer, alone, packed, prompt=True)[0], y[b, row : row + count])


@tiled
@given(layers, sequences, st.integers(1, 40), st.booleans())
@tries(60)
def test_attention_is_close_to_float64_and_rows_are_bit_identical_in_any_piece(name, given, sequence, piece, packed):
    seed, heads, size, window, kinds = given
    rng = np.random.default_rng(seed)
    layer, (past, lengths) = random_layer(rng, *heads, size, window, kinds), map(list, zip(*sequence, strict=True))
    call = random_call(rng, layer, past, lengths, capacity=280)
    ours, expected = call.fresh(), call.fresh()
    y, wanted = attend(name, layer, ours, packed, prompt=True), exact(layer, expected)
    near = {"atol": 2e-5} if layer.cache == np.float32 else {"atol": 3e-3, "rtol": 2e-3}  # rounded the other way
    np.testing.assert_allclose(ours.key, expected.key, **near)
    # A score of values about 1 is off by about 2^-9 sqrt(2 size) * 0.2, and so, relatively, are weights; these and
    # values by 2^-9 more, at random.
    assert np.sqrt(np.square(y - wanted).mean()) <= 0.01 * np.sqrt(np.square(wanted).mean())
    assert_same_in_pieces(name, layer, ours, packed, y, piece)


@tiled
@pytest.mark.parametrize(("threads", "kinds"), [(1, "r"), (3, "r"), (3, "rh")])
def test_onnxruntime_computes_prompt_attention_in_tiles_on_its_threads(name, threads, kinds, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    rng = np.random.default_rng(0)
    layer = random_layer(rng, 9, 3, 64, 0, kinds)
    call, opened = random_call(rng, layer, [20], [150], capacity=180), attention_session(layer, True, threads)
    with reading_prompt():
        y = opened.run(["y"], feeds(layer, call.fresh(), True))[0]
    np.testing.assert_array_equal(y, attend(name, layer, call.fresh(), True, prompt=True)[0])
    y = opened.run(["y"], feeds(layer, call.fresh(), True))[0]
    np.testing.assert_array_equal(y, attend("scalar", layer, call.fresh(), True)[0])


@tiled
@pytest.mark.parametrize(("kinds", "size"), [("rb", 64), ("r", 264)])
def test_attention_with_bias_or_large_heads_does_not_use_tiles(name, kinds, size):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, 4, 2, size, 0, kinds)
    call = random_call(rng, layer, [5], [40], capacity=60)
    y = attend(name, layer, call.fresh(), True, prompt=True)
    np.testing.assert_array_equal(y, attend("scalar", layer, call.fresh(), True))


@tiled
@pytest.mark.parametrize("kinds", ["r", "rh"])
def test_nan_row_affects_only_later_rows_of_its_sequence(name, kinds):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, 4, 2, 32, 0, kinds)
    call = random_call(rng, layer, [5, 5], [4, 6])
    good = attend(name, layer, call.fresh(), True, prompt=True)
    call.rows[0, 1, 0] = np.nan  # of a query
    call.rows[0, 2, 4 * 32] = np.nan  # of a key
    call.rows[1, 3, 6 * 32] = np.inf  # of a value
    y = attend(name, layer, call.fresh(), True, prompt=True)
    assert np.isnan(y[0, 1, :32]).all()
    assert np.isnan(y[0, 2, :64]).all()
    assert not np.isfinite(y[1, 3:6, :64:32]).any()
    y[0, 1, :32], y[0, 2:, :64], y[1, 3:, :64:32] = good[0, 1, :32], good[0, 2:, :64], good[1, 3:, :64:32]
    np.testing.assert_array_equal(y, good)


@tiled
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_prompt_read_in_pieces_is_bit_identical_and_lossless_equals_full(name, bundle, precision, monkeypatch):
    path = bundle(CASE, precision=precision, kernels="freeexport")
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    prompt, read = np.random.default_rng(3).integers(3, 90, 40).tolist(), []

    def keep(decoder):
        length = int(decoder.runners[0].cache.lengths[decoder.slot])
        arrays = [array for runner in decoder.runners for array in runner.cache.arrays.values()]
        read.append(np.stack([array[decoder.slot, :, :length] for array in arrays]))

    monkeypatch.setattr(Decoder, "on_prefill_done", keep)
    for piece in (512, 16, 7, 1):
        monkeypatch.setattr(runtime.decoding.decoder, "PREFILL_ROWS", piece)
        with Session(path, slots=1) as opened:
            texts = [
                opened.generate(prompt, max_new_tokens=20, mode=mode, threshold=0.0) for mode in ("lossless", "full")
            ]
        assert texts[0].token_ids == texts[1].token_ids
        assert_same_bits(read[-1], read[0])
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "scalar")
    with Session(path, slots=1) as opened:
        opened.generate(prompt, max_new_tokens=1, mode="full")
    assert not np.array_equal(read[-1], read[0])  # so the others were read in tiles


@tiled
def test_prompt_with_a_cached_prefix_is_bit_identical(name, bundle, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    path, options = bundle(CASE, precision="int8", kernels="freeexport"), {"mode": "full", "output_logprobs": True}
    prompts = [[*range(3, 40), *range(first, first + length)] for first, length in ((3, 9), (50, 1), (60, 30))]
    with Session(path, slots=2, prefix_cache_mb=64) as reuses, Session(path, slots=2) as plain:
        for prompt in prompts:
            ours, alone = (opened.generate(prompt, max_new_tokens=6, **options) for opened in (reuses, plain))
            assert (ours.token_ids, ours.logprobs) == (alone.token_ids, alone.logprobs)
        assert ours.stats.cached_tokens == 32


# Where attention in bfloat16 begins with AVX512_BF16.
LONG = 256
long_prompts = pytest.mark.skipif(not here("avx512-bf16"), reason="this processor has no AVX512_BF16")


@long_prompts
@pytest.mark.parametrize("kinds", ["", "h", "nsh"])
@pytest.mark.parametrize("piece", [1, 7, 64])
def test_long_prompts_use_bfloat16_from_a_fixed_position(kinds, piece):
    rng = np.random.default_rng(piece)
    layer = random_layer(rng, 4, 2, 64, 0, kinds)
    past, lengths = [LONG - 30, 5, LONG + 100], [70, 40, 33]
    call = random_call(rng, layer, past, lengths, capacity=LONG + 150)
    ours = call.fresh()
    y = attend("avx512-bf16", layer, ours, True, prompt=True)
    plain, wanted = attend("scalar", layer, call.fresh(), True), exact(layer, call.fresh())
    np.testing.assert_array_equal(attend("avx512-bf16", layer, call.fresh(), True), plain)
    for b, length in enumerate(lengths):
        early = min(max(LONG - past[b], 0), length)
        np.testing.assert_array_equal(y[b, :early], plain[b, :early])
        late, expected = y[b, early:length], wanted[b, early:length]
        assert early == length or (late != plain[b, early:length]).mean() > 0.9
        assert np.sqrt(np.square(late - expected).sum()) <= 0.01 * np.sqrt(np.square(expected).sum())
    assert_same_in_pieces("avx512-bf16", layer, ours, True, y, piece)


@long_prompts
@pytest.mark.parametrize("lengths", [[5], [LONG + 20], [70, 1, 33]])
def test_encoders_use_bfloat16_for_all_rows(lengths, monkeypatch):
    rng, found = np.random.default_rng(0), []
    layer = random_layer(rng, 2, 2, 16, 0, "")
    shape = len(lengths) * max(lengths), layer.width
    inputs = {"rows": rng.standard_normal(shape).astype(np.float32), "lengths": np.array(lengths, np.int32)}
    valid = np.concatenate([np.arange(max(lengths)) < length for length in lengths])
    for name, reads in (("avx512-vnni", True), ("avx512-bf16", False), ("avx512-bf16", True)):
        monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
        with reading_prompt(reads):
            found.append(encoder_session(layer).run(["y"], inputs)[0].reshape(len(valid), -1)[valid])
    exactly, outside, rounded = found
    np.testing.assert_array_equal(outside, exactly)
    assert (rounded != exactly).mean() > 0.9
    assert np.sqrt(np.square(rounded - exactly).sum()) <= 0.01 * np.sqrt(np.square(exactly).sum())


@long_prompts
def test_next_turn_rereads_the_answer_beyond_the_bfloat16_position(bundle, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "avx512-bf16")
    assert prompt_differs_from() == LONG
    path = bundle(LONG_MODEL, precision="int8", kernels="freeexport", capacity=LONG + 176)
    first = np.random.default_rng(4).integers(3, 90, LONG - 40).tolist()
    with Session(path, slots=1, prefix_cache_mb=64) as reuses, Session(path, slots=1) as plain:
        answer = reuses.generate(first, max_new_tokens=70, mode="full", ignore_eos=True)
        turn = [*first, *answer.token_ids, 5, 6, 7]
        ours, alone = (opened.generate(turn, max_new_tokens=20, output_logprobs=True) for opened in (reuses, plain))
        assert (ours.token_ids, ours.logprobs) == (alone.token_ids, alone.logprobs)
        assert ours.stats.cached_tokens == LONG


REFUSED = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# BPF: arch_prctl (158) with ARCH_REQ_XCOMP_PERM (0x1023) is refused, with EPERM; all else is allowed.
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (0x06, 0, 0, 0x50001)]
steps.append((0x06, 0, 0, 0x7FFF0000))
code = b"".join(struct.pack("HBBI", *step) for step in steps)
buffer = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
from runtime.engines.kernels import instructions
print(instructions())
"""


def test_single_short_encoder_text_does_not_use_tiles(monkeypatch):
    told = []
    monkeypatch.setattr(runner, "reading_prompt", lambda reads: told.append(reads) or nullcontext())
    engine = SimpleNamespace(output_shapes={}, run=lambda names, inputs: [np.zeros((1, 1, 1))] * len(names))
    encoder = runner.Encoder(engine, engine)
    speech = np.zeros((1, 8, 2))  # a window, which is long
    for prompt in (np.zeros(runner.SHORT_PROMPT), np.zeros(runner.SHORT_PROMPT + 1), speech):
        encoder.run(prompt)
    assert told == [False, True, True]


@pytest.mark.skipif(not here("amx"), reason="this processor has no AMX, or the system refuses it")
@pytest.mark.parametrize("wanted", [None, "amx"])
def test_refused_tile_permission_selects_the_next_instruction_set_or_is_an_error(wanted):
    environment = {**os.environ, "FREEEXPORT_INSTRUCTIONS": wanted or ""}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, timeout=60)
    if wanted is None:
        assert done.stdout == "avx512-bf16\n", done.stderr
    else:
        assert "names instructions that this processor lacks, or that its system refuses" in done.stderr
