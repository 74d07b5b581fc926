"""The best two logits of each row and what they predict, and rows of a weight that is packed for products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    INSTRUCTIONS,
    best_two,
    case_in_file,
    here,
    packed_rows,
    predictions,
    random_case,
    whole_vocabulary,
)
from profiles import tries

from runtime.engines.kernels import missing, spread_logits
from runtime.engines.onnx import Call

if problem := missing():
    pytest.skip(problem, allow_module_level=True)


RUN = {threads: best_two(threads) for threads in (1, 3)}


@given(
    st.integers(0, 2**32), st.integers(1, 5), st.one_of(st.integers(2, 200), st.integers(4000, 20000)), st.booleans()
)
@tries(60)
def test_top_two_and_log_sum_match_float64_with_any_number_of_threads(
    seed: int, rows: int, count: int, ties: bool
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((rows, count)) * 5).astype(np.float32)
    if ties:
        logits = np.rint(logits)
    top, log_sum = RUN[1](logits)
    np.testing.assert_array_equal(top, np.argsort(-logits, axis=1, kind="stable")[:, :2])
    exact = logits.astype(np.float64)
    largest = exact.max(1, keepdims=True)
    np.testing.assert_allclose(log_sum, np.log(np.exp(exact - largest).sum(1)) + largest[:, 0], atol=2e-5)
    alone = [RUN[1](logits[row : row + 1]) for row in range(rows)]
    for place, whole in enumerate((top, log_sum)):
        np.testing.assert_array_equal(RUN[3](logits)[place], whole)
        np.testing.assert_array_equal(np.concatenate([each[place] for each in alone]), whole)


def test_top_two_are_equal_on_all_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, found = (np.random.default_rng(0).standard_normal((3, 9001)) * 4).astype(np.float32), []
    for name in filter(here, ("scalar", *INSTRUCTIONS)):
        monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
        found.append(best_two()(logits))
        for one, other in zip(found[-1], found[0], strict=True):
            np.testing.assert_array_equal(one, other, name)


def test_nan_empty_and_misshapen_logits() -> None:
    logits = np.ones((3, 5000), np.float32)
    logits[1, 4500] = np.nan
    top, log_sum = RUN[1](logits)
    np.testing.assert_array_equal(np.isnan(log_sum), [False, True, False])
    assert ((top >= 0) & (top < 5000)).all()
    assert [part.shape for part in RUN[1](np.zeros((0, 9), np.float32))] == [(0, 2), (0,)]
    for shape in ((3,), (3, 1), (2, 3, 4)):
        with pytest.raises(Exception, match="logits are no rows of two or more"):
            RUN[1](np.zeros(shape, np.float32))


@pytest.mark.parametrize(("margin", "known", "other"), [(1, False, 0), (0, True, 0), (1, True, 1)])
def test_predictions_match_float64(margin: int, known: bool, other: int) -> None:
    rng = np.random.default_rng(margin + 2 * other)
    logits = (rng.standard_normal((40, 12)) * 4).astype(np.float32)
    tokens = np.sort(rng.permutation(50)[: 12 - other]) if known else None
    emitted = None if known else rng.integers(0, 12, 40)
    token, confidence, nll = predictions(logits, emitted, tokens, margin=margin, other=other)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    order = np.argsort(-logits, axis=1)
    is_other = (order[:, 0] == 11) & bool(other)
    best = np.where(is_other, order[:, 1], order[:, 0])
    np.testing.assert_array_equal(token, best if tokens is None else tokens[best])
    ranked = np.sort(np.exp(exact), axis=1)[:, ::-1]
    np.testing.assert_allclose(confidence, np.where(is_other, 0, ranked[:, 0] - margin * ranked[:, 1]), atol=1e-6)
    np.testing.assert_allclose(nll, -exact[np.arange(40), order[:, 0] if emitted is None else emitted], atol=1e-5)
    one = predictions(logits[7:8], emitted if emitted is None else emitted[7:8], tokens, margin=margin, other=other)
    np.testing.assert_array_equal(np.stack(one)[:, 0], np.stack([token[7], confidence[7], nll[7]]))
    none = predictions(logits[:0], emitted if emitted is None else emitted[:0], tokens, margin=margin, other=other)
    assert [part.shape for part in none] == [(0,)] * 3
    if tokens is not None:
        whole = whole_vocabulary(tokens, 50, -9)
        expected = np.full((40, 50), -9, np.float32)
        expected[:, tokens] = logits[:, : len(tokens)]
        np.testing.assert_array_equal(whole.run(None, {"logits": logits})[0], expected)


def test_unread_logits_are_not_spread_to_the_vocabulary() -> None:
    logits, left = np.ones((2, 3), np.float32), np.full((2, 50), 7, np.float32)
    whole = whole_vocabulary(np.array([4, 9, 20]), 50, -9)
    Call(whole, {"logits": logits}, {"y": left}, spread=spread_logits()).run()
    assert (left == 7).all()
    (spread,) = whole.run(None, {"logits": logits})
    assert (spread.sum(axis=1) == 3 - 9 * 47).all(), "a call after it spreads them"


@pytest.mark.parametrize(
    ("emitted", "known", "message"),
    [
        ([9], None, "emitted token 9 is none of 5"),
        ([1, 2], None, "2 emitted tokens for 1 rows"),
        (None, [1, 2, 3], "5 logits for 3 known tokens"),
    ],
)
def test_tokens_that_do_not_match_the_logits_are_refused(
    emitted: list[int] | None, known: list[int] | None, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        predictions(np.ones((1, 5), np.float32), emitted, known)
    whole = whole_vocabulary(np.array([0, 50]), 50, 0)
    with pytest.raises(Exception, match="known tokens do not fit"):
        whole.run(None, {"logits": np.ones((1, 5), np.float32)})


@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "block"),
    [(1, 1, 8, 32), (16, 32, 8, 32), (37, 95, 8, 64), (40, 576, 8, 64), (37, 95, 5, 32)]
    + [(20, 512, bits, 32) for bits in (4, 5, 6)],
)
def test_packed_rows_returns_dequantized_rows(outputs: int, inputs: int, bits: int, block: int) -> None:
    made = random_case if bits == 8 else case_in_file
    case = made(np.random.default_rng(0), outputs, inputs, bits, block)
    indices = np.random.default_rng(1).permutation(outputs)
    for shape in ((-1,), (1, -1)):
        (rows,) = packed_rows(case).run(None, {"indices": indices.reshape(shape)})
        expected = case.values[indices].reshape(*indices.reshape(shape).shape, inputs)
        np.testing.assert_array_equal(rows, expected.astype(np.float32))
    assert packed_rows(case).run(None, {"indices": np.empty(0, np.int64)})[0].shape == (0, inputs)


def test_subnormal_scales_are_kept() -> None:
    case = random_case(np.random.default_rng(0), 16, 32, 8)
    case.packed.scales[:] = np.float16(6e-8)  # the least there is
    (rows,) = packed_rows(case).run(None, {"indices": np.arange(16)})
    steps = np.rint(rows / np.float32(np.float16(6e-8)))
    np.testing.assert_array_equal(rows, steps * np.float32(np.float16(6e-8)))
    assert np.abs(steps).max() == 127


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_out_of_range_row_index_is_refused(index: int) -> None:
    rows = packed_rows(random_case(np.random.default_rng(0), 20, 32, 8))
    with pytest.raises(Exception, match=f"index {index} is no row of 20"):
        rows.run(None, {"indices": np.array([0, index])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N": 33}, "input 1 of PackedRows has 1024 elements, N, K, bits and block_size want 1536"),
        ({"block_size": 48}, "no multiple of 32"),
        ({"K": 0}, "out of range"),
        ({"constant": False}, "input 1 of PackedRows is no constant"),
        ({"K": 64, "block_size": 32}, "input 1 of PackedRows has 1024 elements, N, K, bits and block_size want 2048"),
    ],
)
def test_contradictory_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    case = random_case(np.random.default_rng(0), 20, 32, 8)
    with pytest.raises(Exception, match=message):
        packed_rows(case, **changes)
