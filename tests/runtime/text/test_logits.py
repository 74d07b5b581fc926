"""Processors and warpers on the same logits as those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.text.sampler import (
    Sampler,
    Warping,
    bias_sequences,
    forbid,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalise_repetition,
    softmax,
)

VOCABULARY = 200
CONTEXT = np.array([5, 17, 5, 199, 42, 7, 13])


def cases() -> Iterator[np.ndarray]:
    """Logits of several shapes: flat, peaked, far from zero, with ties and with forbidden tokens."""
    source = np.random.default_rng(0)
    for scale, shift in ((0.1, 0.0), (1.0, 0.0), (4.0, -30.0), (20.0, 100.0)):
        yield (source.normal(size=VOCABULARY) * scale + shift).astype(np.float32)
    yield source.integers(-3, 3, VOCABULARY).astype(np.float32)
    forbidden = source.normal(size=VOCABULARY).astype(np.float32)
    forbidden[source.integers(0, VOCABULARY, 50)] = -np.inf
    yield forbidden


def theirs(processor: LogitsProcessor, scores: np.ndarray, context: np.ndarray = CONTEXT) -> np.ndarray:
    result: np.ndarray = processor(torch.tensor(context)[None], torch.tensor(scores)[None])[0].numpy()
    return result


def assert_same(ours: np.ndarray, other: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert (np.isneginf(ours) == np.isneginf(other)).all()
    np.testing.assert_allclose(ours[np.isfinite(ours)], other[np.isfinite(other)], rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "processor"),
    [
        *[
            (lambda s, k=k: keep_top_k(s, k), TopKLogitsWarper(k))  # type: ignore[misc]
            for k in (1, 2, 50, VOCABULARY, 10 * VOCABULARY)
        ],
        *[
            (lambda s, p=p: keep_top_p(s, p), TopPLogitsWarper(p))  # type: ignore[misc]
            for p in (1e-6, 0.1, 0.5, 0.9, 0.999)
        ],
        *[(lambda s, p=p: keep_min_p(s, p), MinPLogitsWarper(p)) for p in (0.001, 0.1, 0.7, 1.0)],  # type: ignore[misc]
        *[
            (lambda s, p=p: penalise_repetition(s, CONTEXT, p), RepetitionPenaltyLogitsProcessor(p))  # type: ignore[misc]
            for p in (0.5, 1.3, 10.0)
        ],
        *[
            (lambda s, t=t: Warping(t, 0, 1.0, 0.0)(s), TemperatureLogitsWarper(t))  # type: ignore[misc]
            for t in (0.01, 0.7, 3.0)
        ],
    ],
)
def test_scores_are_those_of_transformers(ours: Callable[[np.ndarray], np.ndarray], processor: LogitsProcessor) -> None:
    for scores in cases():
        before = scores.copy()
        if isinstance(processor, TopPLogitsWarper) and (scores == np.round(scores)).all():
            continue  # which of several tied tokens stay is up to the order of a sort
        assert_same(ours(scores), theirs(processor, scores))
        np.testing.assert_array_equal(scores, before)


def test_biases_of_sequences_are_those_of_transformers() -> None:
    biases = {(3,): 1.5, (17,): -100.0, (7, 13): 9.0, (13, 8): 2.0, (7, 13, 8): 4.0, (1, 13, 9): 5.0}
    biases[(*CONTEXT.tolist(), 11)] = 6.0
    biases[(1, *CONTEXT.tolist(), 12)] = 7.0
    for scores in cases():
        expected = theirs(SequenceBiasLogitsProcessor(biases), scores)
        assert_same(bias_sequences(scores, CONTEXT, biases), expected)
        assert_same(Sampler(3, sequence_bias=biases).process(scores, CONTEXT), expected)


@pytest.mark.parametrize("least", [0, 3, 4, 5])
def test_end_of_sequence_is_forbidden_as_in_transformers(least: int) -> None:
    prompt = 3
    processor = MinNewTokensLengthLogitsProcessor(prompt, least, [7, 9])
    sampler = Sampler(prompt, frozenset({7, 9}), min_new_tokens=least)
    for scores in cases():
        assert_same(sampler.process(scores, CONTEXT), theirs(processor, scores))


def test_forbidden_tokens_have_no_chance() -> None:
    scores = forbid(np.zeros(5, np.float32), {1, 3})
    np.testing.assert_allclose(softmax(scores), [1 / 3, 0, 1 / 3, 0, 1 / 3])


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_best_that_reach_the_mass(values: list[float], mass: float) -> None:
    scores = np.array(values, np.float32)
    kept = np.isfinite(keep_top_p(scores, mass))
    probabilities = softmax(scores)
    assert probabilities[kept].sum() >= mass - 1e-9
    assert probabilities[kept].min() >= probabilities[~kept].max(initial=0)
    assert probabilities[kept].sum() - probabilities[kept].min() < mass + 1e-9


def test_softmax_is_that_of_torch() -> None:
    for scores in cases():
        np.testing.assert_allclose(softmax(scores), torch.tensor(scores).double().softmax(-1).numpy(), atol=1e-12)
        np.testing.assert_allclose(log_softmax(scores), torch.tensor(scores).double().log_softmax(-1).numpy())
