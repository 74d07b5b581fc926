"""Attention over a KV cache and over a prompt: against float64, the same bits everywhere, and what is refused."""

import numpy as np
import pytest
from attention_cases import (
    Call,
    Layer,
    attend,
    attention_session,
    cross_session,
    encoder_session,
    exact,
    exact_encoder,
    feeds,
    from_cache,
    in_cache,
    prompt_session,
    random_call,
    random_layer,
)
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import INSTRUCTIONS, here
from profiles import tries

from runtime.engines.kernels import missing, reading_prompt

if problem := missing():
    pytest.skip(problem, allow_module_level=True)

layers = st.tuples(
    st.integers(0, 2**32), st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3), (5, 1), (12, 12)]),
    st.sampled_from([16, 24, 40, 48, 64, 128]), st.sampled_from([0, 1, 5, 30, 100]),
    st.sampled_from(["", "r", "b", "rn", "n", "p", "rs", "h", "rbnh", "psh", "i", "rbni", "psi"]),
)  # fmt: skip
# Contexts of up to four pieces.
pasts = st.one_of(st.integers(0, 25), st.integers(50, 200))
sequences = st.lists(st.tuples(pasts, st.integers(0, 12)), min_size=1, max_size=3)


def made(layer, sequence):
    seed, (heads, kv_heads), size, window, kinds = layer
    rng = np.random.default_rng(seed)
    made_layer = random_layer(rng, heads, kv_heads, size, window, kinds)
    past, lengths = (list(values) for values in zip(*sequence, strict=True))
    lengths[0] = max(lengths[0], 1)
    return made_layer, random_call(rng, made_layer, past, lengths, capacity=220)


@given(layers, sequences, st.booleans())
@tries(40)
def test_attention_matches_float64_and_is_bit_identical_on_all_instruction_sets(layer, sequence, packed):
    layer, call = made(layer, sequence)
    ours, expected = call.fresh(), call.fresh()
    y, wanted = attend("scalar", layer, ours, packed), exact(layer, expected)
    # A key in float16 or 8 bits may be rounded the other way.
    near = {np.float32: {"atol": 2e-5}, np.float16: {"atol": 3e-3, "rtol": 2e-3}, np.int8: {"atol": 0.05}}[layer.cache]
    np.testing.assert_allclose(y, wanted, **near)
    for part, wanted_part in ((ours.key, expected.key), (ours.value, expected.value)):
        np.testing.assert_allclose(from_cache(layer, part), from_cache(layer, wanted_part), **near)
    assert layer.cache == np.int8 or (ours.value == expected.value).all()
    for name in filter(here, INSTRUCTIONS):
        again = call.fresh()
        np.testing.assert_array_equal(attend(name, layer, again, packed), y, name)
        np.testing.assert_array_equal(again.key, ours.key, name)


@pytest.mark.parametrize("heads", [(9, 3), (4, 4)])
@pytest.mark.parametrize(
    ("size", "window", "kinds"),
    [(64, 0, "rb"), (40, 100, "rbh"), (64, 0, "rh"), (264, 0, "rb"), (64, 0, "ri"), (40, 100, "rbi"), (264, 0, "i")],
)
def test_long_prompts_are_bit_identical_on_all_instruction_sets(heads, size, window, kinds):
    rng = np.random.default_rng(size)
    layer = random_layer(rng, *heads, size, window, kinds)
    call = random_call(rng, layer, [0, 70, 5], [90, 1, 40], capacity=120)
    expected, ours = call.fresh(), call.fresh()
    y = attend("scalar", layer, ours, packed=True)
    near = {np.float32: 2e-5, np.float16: 3e-3, np.int8: 0.05}[layer.cache]
    np.testing.assert_allclose(y, exact(layer, expected), atol=near)
    for name in filter(here, INSTRUCTIONS):
        np.testing.assert_array_equal(attend(name, layer, call.fresh(), packed=True), y, name)


@given(layers, sequences)
@tries(20)
def test_row_of_a_call_is_bit_identical_to_single_row(layer, sequence):
    layer, call = made(layer, sequence)
    together = attend("scalar", layer, call.fresh(), packed=True)
    for b, length in enumerate(call.lengths):
        caches = call.key[b : b + 1].copy(), call.value[b : b + 1].copy()
        for row in range(length):
            past = call.past[b : b + 1] + np.int32(row)
            one = Call(call.rows[b : b + 1, row : row + 1], *caches, past, np.ones(1, np.int32))
            np.testing.assert_array_equal(attend("scalar", layer, one, packed=False)[0, 0], together[b, row])


# So many rows that a task has 32 of them, many, whose pieces one task attends with each, and few, whose pieces are
# shared among threads.
@pytest.mark.parametrize("lengths", [[80, 7, 16], [20, 7, 16], [3, 0, 1]])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("packed", "kinds"), [(False, "r"), (True, "r"), (True, "rsh"), (True, "rsi")])
def test_onnxruntime_runs_attention_on_its_threads_and_returns_the_whole_cache(packed, kinds, threads, lengths):
    rng = np.random.default_rng(0)
    layer = random_layer(rng, 9, 3, 64, 0, kinds)
    call = random_call(rng, layer, [3, 0, 150], lengths, capacity=180)
    expected = call.fresh()
    wanted = attend("scalar", layer, expected, packed)
    y, key, value = attention_session(layer, packed, threads).run(None, feeds(layer, call, packed))
    np.testing.assert_array_equal(y, wanted[call.valid] if packed else wanted.reshape(y.shape))
    for b, total in enumerate(call.past + call.lengths):  # what lies behind is unspecified
        np.testing.assert_array_equal(key[b, :, :total], expected.key[b, :, :total])
        np.testing.assert_array_equal(value[b, :, :total], expected.value[b, :, :total])


def test_values_are_rounded_to_float16_as_in_numpy():
    rng = np.random.default_rng(5)
    layer = random_layer(rng, 1, 1, 64, 0, "h")
    call = random_call(rng, layer, [0], [40])
    bits = rng.integers(0, 1 << 32, (40, 64), np.uint32)
    bits[:20] = (bits[:20] & 0x8FFFFFFF) + 0x30000000  # around the least float16
    bits[20:30] = np.arange(640).reshape(10, 64) * 0x800 + 0x38000000  # ties
    bits[30:] = (bits[30:] & 0x80FFFFFF) + 0x47000000  # around the largest
    call.rows[0, :, 128:] = bits.view(np.float32)
    with np.errstate(over="ignore"):
        expected = call.rows[0, :, 128:].astype(np.float16)
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        ours = call.fresh()
        attend(name, layer, ours, True)
        np.testing.assert_array_equal(ours.value[0, 0, :40].view(np.uint16), expected.view(np.uint16), name)


@pytest.mark.parametrize("kinds", ["r", "ri"])
def test_nan_row_affects_only_later_rows_of_its_sequence(kinds):
    rng = np.random.default_rng(1)
    layer = random_layer(rng, 4, 2, 32, 0, kinds)
    call = random_call(rng, layer, [5, 5], [4, 4])
    good = attend("scalar", layer, call.fresh(), True)
    call.rows[0, 2, 0] = np.nan  # of its query
    call.rows[0, 3, 4 * 32] = np.nan  # of a key
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        y = attend(name, layer, call.fresh(), True)
        np.testing.assert_array_equal(y[0, :2], good[0, :2])
        np.testing.assert_array_equal(y[1], good[1])
        assert np.isnan(y[0, 2, :32]).all()
        assert np.isnan(y[0, 3, :64]).all()


def test_idle_sequences_give_zeros_and_calls_without_rows_are_empty():
    rng = np.random.default_rng(2)
    layer = random_layer(rng, 2, 1, 16, 0, "")
    call = random_call(rng, layer, [0, 9], [0, 1])
    np.testing.assert_array_equal(attend("scalar", layer, call.fresh(), False)[0], 0)
    empty = Call(call.rows[:, :0], call.key, call.value, call.past, np.zeros(2, np.int32))
    assert attention_session(layer, False).run(["y"], feeds(layer, empty, False))[0].shape == (0, 32)


WRONG = {
    "beyond the cache": {"past_lengths": np.array([39, 0], np.int32)},
    "a length is negative": {"past_lengths": np.array([-1, 0], np.int32)},
    "do not add up": {"query_lengths": np.array([1, 1], np.int32)},
    "dimension 0 of query_lengths is 3": {"query_lengths": np.ones(3, np.int32)},
    "dimension 1 of rows is 5": {"rows": np.ones((5, 5), np.float32)},
    "past_value has 3 dimensions": {"past_value": np.ones((2, 1, 40), np.float32)},
    "dimension 2 of past_value is 39, not 40": {"past_value": np.ones((2, 1, 39, 16), np.float32)},
    "beyond the rotary tables": {"cosine": np.ones((2, 8), np.float32), "sine": np.ones((2, 8), np.float32)},
    "dimension 0 of sine is 3, not 256": {"sine": np.ones((3, 8), np.float32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_contradictory_inputs_are_refused(message):
    rng = np.random.default_rng(3)
    layer = random_layer(rng, 2, 1, 16, 0, "r")
    session = attention_session(layer, True)
    given = {**feeds(layer, random_call(rng, layer, [4, 0], [2, 3]), True), **WRONG[message]}
    with pytest.raises(Exception, match=message):
        session.run(None, given)


@pytest.mark.parametrize(
    ("message", "attributes"),
    [
        ("no multiple of kv_num_heads", {"kv_num_heads": 3}),
        ("kv_num_heads is out of range", {"kv_num_heads": 0}),
        ("head_size is no multiple of 8 from 16 on", {"head_size": 20}),
        ("head_size is no multiple of 8 from 16 on", {"head_size": 8}),
        ("window is negative", {"window": -1}),
    ],
)
def test_out_of_range_attributes_are_refused(message, attributes):
    layer = random_layer(np.random.default_rng(4), 2, 1, 16, 0, "")
    with pytest.raises(Exception, match=message):
        attention_session(layer, True, **attributes)


def crossed(session, rows, key, value, lengths, counts):
    (y,) = session.run(None, {"rows": rows, "key": key, "value": value, "lengths": lengths, "query_lengths": counts})
    return y


@pytest.mark.parametrize(
    ("size", "cache", "softcap"),
    [
        (40, np.float32, 0.0),
        (48, np.float32, 0.0),
        (40, np.float16, 0.0),
        (40, np.float16, 0.7),
        (40, np.int8, 0.0),
        (40, np.int8, 0.7),
    ],
)
@pytest.mark.parametrize("name", list(filter(here, ["scalar", *INSTRUCTIONS])))
def test_cross_attention_matches_float64_and_rows_are_bit_identical_to_single_rows(
    name, size, cache, softcap, monkeypatch
):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    rng = np.random.default_rng(6)
    layer = Layer(6, 3, size, cache=cache, softcap=softcap)
    counts, lengths = np.array([4, 1, 9], np.int32), np.array([17, 30, 1], np.int32)
    rows = rng.standard_normal((3, 9, 6, size)).astype(np.float32)
    key, value = (in_cache(layer, rng.standard_normal((3, 3, 30, size)).astype(np.float32)) for _ in range(2))
    keys, values = from_cache(layer, key), from_cache(layer, value)
    valid = np.arange(9) < counts[:, None]
    padded = crossed(cross_session(layer, False, 2), rows.reshape(27, -1), key, value, lengths, counts)
    packed = crossed(cross_session(layer, True, 2), rows[valid].reshape(-1, 6 * size), key, value, lengths, counts)
    np.testing.assert_array_equal(padded.reshape(3, 9, -1)[valid], packed)
    np.testing.assert_array_equal(padded.reshape(3, 9, -1)[~valid], 0)
    alone, one = cross_session(layer, True), np.ones(1, np.int32)
    for place, (b, row) in enumerate(np.argwhere(valid)):
        scores = np.einsum("hd,hed->he", rows[b, row], np.repeat(keys[b, :, : lengths[b]], 2, 0)) * 0.2
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("he,hed->hd", weights, np.repeat(values[b, :, : lengths[b]], 2, 0))
        # Queries of a cache in 8 bits are rounded to 16.
        np.testing.assert_allclose(packed[place], expected.reshape(-1), atol=1e-3 if cache is np.int8 else 2e-5)
        given = rows[b, row].reshape(1, -1), key[b : b + 1], value[b : b + 1], lengths[b : b + 1], one
        np.testing.assert_array_equal(crossed(alone, *given)[0], packed[place])


@pytest.mark.parametrize("cache", [np.float16, np.int8])
@pytest.mark.parametrize("name", list(filter(here, ["scalar", *INSTRUCTIONS])))
def test_sequences_sharing_a_prompt_are_bit_identical_to_copies_of_the_prompt(name, cache, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    rng = np.random.default_rng(7)
    layer = Layer(4, 4, 40, cache=cache)
    rows = rng.standard_normal((16, 160)).astype(np.float32)
    key, value = (in_cache(layer, rng.standard_normal((2, 4, 150, 40)).astype(np.float32)) for _ in range(2))
    lengths, counts = np.array([150, 70], np.int32), np.full(16, 1, np.int32)
    session = cross_session(layer, True, 2)
    copies = crossed(session, rows, key.repeat(8, 0), value.repeat(8, 0), lengths.repeat(8), counts)
    np.testing.assert_array_equal(crossed(session, rows, key, value, lengths, counts), copies)
    with pytest.raises(Exception, match="query_lengths of 15 sequences do not share 2 prompts"):
        crossed(session, rows[:15], key, value, lengths, counts[:15])


@pytest.mark.parametrize("name", list(filter(here, ["scalar", *INSTRUCTIONS])))
@pytest.mark.parametrize(("heads", "size", "biased"), [((3, 3), 40, True), ((2, 1), 64, False), ((2, 2), 264, True)])
def test_encoder_attention_matches_float64_and_is_bit_identical_per_prompt(name, heads, size, biased, monkeypatch):
    rng = np.random.default_rng(size)
    layer = Layer(
        *heads, size, tables={"bias": rng.standard_normal((17, heads[0])).astype(np.float32)} if biased else {}
    )
    rows, lengths = rng.standard_normal((4, 133, layer.width)).astype(np.float32), np.array([133, 0, 1, 70], np.int32)
    rows[3, 70:] = np.nan  # padding is not read

    def attended(instructions, given, counts, threads):
        monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", instructions)
        session = encoder_session(layer, threads)
        inputs = {"rows": given.reshape(-1, layer.width), "lengths": counts, **layer.tables}
        return session.run(None, inputs)[0].reshape(*given.shape[:2], -1)

    y = attended(name, rows, lengths, 2)
    np.testing.assert_allclose(y, exact_encoder(layer, np.nan_to_num(rows), lengths), atol=2e-5)
    np.testing.assert_array_equal(attended("scalar", rows, lengths, 1), y)
    np.testing.assert_array_equal(attended(name, rows[3:, :70], lengths[3:], 1)[0], y[3, :70])
    with reading_prompt():
        in_tiles = attended("scalar-bf16", rows, lengths, 2)  # tiles have no bias, and no heads of more than 256
    np.testing.assert_allclose(in_tiles, y, atol=0 if biased else 0.03)
    assert biased or (in_tiles != y).any()


def test_encoder_inputs_of_wrong_shape_are_refused():
    layer = Layer(2, 2, 16)
    given = {"rows": np.ones((6, 96), np.float32), "lengths": np.array([3, 3], np.int32)}
    for change, message in (
        ({"lengths": np.array([3, 4], np.int32)}, "go beyond the"),
        ({"lengths": np.array([3, -1], np.int32)}, "a length is negative"),
        ({"lengths": np.ones(4, np.int32)}, "rows are no multiple of the sequences"),
        ({"rows": np.ones((6, 97), np.float32)}, "dimension 1 of rows is 97, not 96"),
    ):
        with pytest.raises(Exception, match=message):
            encoder_session(layer).run(None, {**given, **change})
    biased = Layer(2, 2, 16, tables={"bias": np.ones((4, 2), np.float32)})
    with pytest.raises(Exception, match="bias has an even number of distances"):
        encoder_session(biased).run(None, {**given, **biased.tables})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cache", [np.float16, np.int8])
@pytest.mark.parametrize("name", list(filter(here, ["scalar", *INSTRUCTIONS])))
def test_prompt_cache_stores_keys_and_values_in_the_layout_of_cross_attention(name, cache, threads, monkeypatch):
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    layer = Layer(6, 3, 40, cache=cache)
    rows = np.random.default_rng(9).standard_normal((2, 70, 2, 3, 40)).astype(np.float32)
    stored = prompt_session(layer, threads).run(None, {"rows": rows.reshape(2, 70, -1)})
    for found, wanted in zip(stored, np.moveaxis(rows, 2, 0), strict=True):
        wanted = in_cache(layer, wanted.transpose(0, 2, 1, 3))
        if cache is np.float16:
            np.testing.assert_array_equal(found, wanted)
        else:  # a value between two steps may be rounded either way
            np.testing.assert_allclose(from_cache(layer, found), from_cache(layer, wanted), atol=0.04)


def test_prompt_cache_inputs_of_wrong_shape_are_refused():
    layer = Layer(2, 2, 16, cache=np.int8)
    with pytest.raises(Exception, match="dimension 2 of rows is 60, not 64"):
        prompt_session(layer).run(None, {"rows": np.ones((1, 5, 60), np.float32)})
    for message, changed in (("head_size is no multiple", {"head_size": 12}), ("out of range", {"kv_num_heads": 0})):
        with pytest.raises(Exception, match=message):
            prompt_session(layer, **changed)
    nothing = prompt_session(layer).run(None, {"rows": np.ones((0, 5, 64), np.float32)})
    assert [part.shape for part in nothing] == [(0, 2, 5, 20)] * 2


def test_cross_attention_without_keys_is_zero_and_beyond_the_keys_is_refused():
    layer, rows, key = Layer(2, 2, 16), np.ones((2, 32), np.float32), np.ones((2, 2, 5, 16), np.float32)
    counts = np.ones(2, np.int32)
    y = crossed(cross_session(layer, True), rows, key, key, np.array([0, 3], np.int32), counts)
    np.testing.assert_array_equal(y, np.repeat([[0.0], [1.0]], 32, 1))
    with pytest.raises(Exception, match="cross_lengths go beyond the keys"):
        crossed(cross_session(layer, True), rows, key, key, np.array([6, 3], np.int32), counts)
    with pytest.raises(Exception, match="dimension 3 of past_value is 8, not 16"):
        crossed(cross_session(layer, True), rows, key, key[..., :8], counts, counts)
