import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import INSTRUCTIONS, best_two, here

from runtime.kernels import missing

if problem := missing():
    pytest.skip(problem, allow_module_level=True)


RUN = {threads: best_two(threads) for threads in (1, 3)}


@given(
    st.integers(0, 2**32), st.integers(1, 5), st.one_of(st.integers(2, 200), st.integers(4000, 20000)), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_the_best_two_and_the_sum_are_those_of_float64_on_any_number_of_threads(seed, rows, count, ties):
    logits = (np.random.default_rng(seed).standard_normal((rows, count)) * 5).astype(np.float32)
    if ties:
        logits = np.rint(logits)
    top, log_sum = RUN[1](logits)
    np.testing.assert_array_equal(top, np.argsort(-logits, axis=1, kind="stable")[:, :2])
    exact = logits.astype(np.float64)
    largest = exact.max(1, keepdims=True)
    np.testing.assert_allclose(log_sum, np.log(np.exp(exact - largest).sum(1)) + largest[:, 0], atol=2e-5)
    for one, many in zip((top, log_sum), RUN[3](logits), strict=True):
        np.testing.assert_array_equal(one, many)
    for row in range(rows):
        for one, many in zip(RUN[1](logits[row : row + 1]), (top, log_sum), strict=True):
            np.testing.assert_array_equal(one[0], many[row])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_set_gives_the_same_bits(name, monkeypatch):
    if not here(name):
        pytest.skip(f"this processor has no {name}")
    logits = (np.random.default_rng(0).standard_normal((3, 9001)) * 4).astype(np.float32)
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "scalar")
    expected = best_two()(logits)
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", name)
    for one, other in zip(best_two()(logits), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_that_is_no_number_is_seen_in_its_sum_alone():
    logits = np.ones((3, 5000), np.float32)
    logits[1, 4500] = np.nan
    top, log_sum = RUN[1](logits)
    np.testing.assert_array_equal(np.isnan(log_sum), [False, True, False])
    assert ((top >= 0) & (top < 5000)).all()


def test_no_rows_and_wrong_shapes():
    top, log_sum = RUN[1](np.zeros((0, 9), np.float32))
    assert top.shape == (0, 2)
    assert log_sum.shape == (0,)
    for shape in ((3,), (3, 1), (2, 3, 4)):
        with pytest.raises(Exception, match="logits are no rows of two or more"):
            RUN[1](np.zeros(shape, np.float32))
