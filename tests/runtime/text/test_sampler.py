"""Processors, warpers and draws: as transformers' on the same logits, and with the distribution they promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.decoding.calls import Prediction
from runtime.decoding.response import Response
from runtime.errors import OptionError
from runtime.text.sampler import (
    UNKNOWN,
    Sampler,
    Warping,
    likeliest,
    race,
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


def warped(warping: Warping, scores: np.ndarray) -> np.ndarray:
    """Return the scores of all tokens, -inf for those that cannot be drawn."""
    tokens, kept = warping(scores)
    result = np.full_like(scores, -np.inf)
    result[tokens] = kept
    return result


def assert_same(ours: np.ndarray, other: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert (np.isneginf(ours) == np.isneginf(other)).all()
    np.testing.assert_allclose(ours[np.isfinite(ours)], other[np.isfinite(other)], rtol=1e-6)


BIASES = {(3,): 1.5, (17,): -100.0, (7, 13): 9.0, (13, 8): 2.0, (7, 13, 8): 4.0, (1, 13, 9): 5.0}
BIASES |= {(*CONTEXT.tolist(), 11): 6.0, (1, *CONTEXT.tolist(), 12): 7.0}
EOS = frozenset({7, 9})


@pytest.mark.parametrize(
    ("ours", "processor"),
    [
        *[(Warping(1.0, k, 1.0, 0.0), TopKLogitsWarper(k)) for k in (1, 2, 50, VOCABULARY, 10 * VOCABULARY)],
        *[(Warping(1.0, 0, p, 0.0), TopPLogitsWarper(p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)],
        *[(Warping(1.0, 0, 1.0, p), MinPLogitsWarper(p)) for p in (0.001, 0.1, 0.7, 1.0)],
        *[(Warping(t, 0, 1.0, 0.0), TemperatureLogitsWarper(t)) for t in (0.01, 0.7, 3.0)],
        *[(Sampler(3, repetition_penalty=p), RepetitionPenaltyLogitsProcessor(p)) for p in (0.5, 1.3, 10.0)],
        (Sampler(3, sequence_bias=BIASES), SequenceBiasLogitsProcessor(BIASES)),
        *[
            (Sampler(3, EOS, min_new_tokens=n), MinNewTokensLengthLogitsProcessor(3, n, list(EOS)))
            for n in (0, 3, 4, 5)
        ],
    ],
)
def test_processed_scores_match_transformers(ours: Warping | Sampler, processor: LogitsProcessor) -> None:
    for scores in cases():
        before = scores.copy()
        if isinstance(processor, TopPLogitsWarper) and (scores == np.round(scores)).all():
            continue  # which of several tied tokens stay is up to the order of a sort
        changed = warped(ours, scores) if isinstance(ours, Warping) else ours.process(scores, CONTEXT)
        assert_same(changed, processor(torch.tensor(CONTEXT)[None], torch.tensor(scores)[None])[0].numpy())
        np.testing.assert_array_equal(scores, before)


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=400),
    st.integers(1, 12),
    st.sampled_from([0.3, 0.7, 1.0, 1.7]),
)
def test_top_k_of_a_large_vocabulary_matches_transformers(values: list[int], count: int, temperature: float) -> None:
    """Scores with many ties, some of which are ties only after the division by the temperature."""
    scores = np.array(values * 5, np.float32)
    scores[::3] = np.nextafter(scores[::3], np.float32(100))
    logits = torch.tensor(scores)[None]
    expected = TopKLogitsWarper(count)(logits, TemperatureLogitsWarper(temperature)(logits, logits))
    assert_same(warped(Warping(temperature, count, 1.0, 0.0), scores), expected[0].numpy())


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.integers(0, 40),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
)
def test_penalties_count_only_generated_tokens(
    context: list[int], prompt: int, frequency: float, presence: float
) -> None:
    prompt = min(prompt, len(context))
    logits = np.linspace(-3, 3, 10, dtype=np.float32)
    expected = [
        logit - context[prompt:].count(token) * frequency - (token in context[prompt:]) * presence
        for token, logit in enumerate(logits.tolist())
    ]
    sampler = Sampler(prompt, frequency_penalty=frequency, presence_penalty=presence)
    np.testing.assert_allclose(sampler.process(logits, np.array(context, np.int64)), expected, atol=1e-5)
    np.testing.assert_array_equal(logits, np.linspace(-3, 3, 10, dtype=np.float32))
    assert sampler.only_masks == (frequency == presence == 0)


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_likely_tokens_that_reach_the_mass(values: list[float], mass: float) -> None:
    scores = np.array(values, np.float32)
    kept = np.isfinite(warped(Warping(1.0, 0, mass, 0.0), scores))
    probabilities = softmax(scores)
    assert probabilities[kept].sum() >= mass - 1e-6
    assert probabilities[kept].min() >= probabilities[~kept].max(initial=0)
    assert probabilities[kept].sum() - probabilities[kept].min() < mass + 1e-6


DRAWS = 10_000
TARGET = np.array([0.35, 0.25, 0.15, 0.1, 0.08, 0.05, 0.02, 0.0])
DRAFT = np.array([0.05, 0.45, 0.1, 0.02, 0.2, 0.1, 0.04, 0.04])


def test_seeds_samples_and_positions_are_independent() -> None:
    draws = [[race(TARGET, seed, position) for position in range(2000)] for seed in ((0, 0), (1, 0), (0, 1))]
    collision = float((TARGET**2).sum())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        same = np.mean(np.equal(draws[first], draws[second]))
        assert abs(same - collision) < 0.05
    repeated = np.mean(np.equal(draws[0][1:], draws[0][:-1]))
    assert abs(repeated - collision) < 0.05


def test_speculative_sampling_keeps_the_deep_distribution_and_accepts_drafts() -> None:
    """A draft is the shallow draw of a position; what becomes final is the deep draw of the same position."""
    deep = [race(TARGET, (3, 0), position) for position in range(DRAWS)]
    shallow = [race(DRAFT, (3, 0), position) for position in range(DRAWS)]
    kept = np.equal(deep, shallow)
    final = np.where(kept, shallow, deep)
    counts = np.bincount(final, minlength=len(TARGET))
    assert chisquare(counts[TARGET > 0], DRAWS * TARGET[TARGET > 0]).pvalue > 0.001
    distance = np.abs(TARGET - DRAFT).sum() / 2
    assert (1 - distance) / (1 + distance) - 0.01 < kept.mean() < 1 - distance + 0.01
    # Given that it was kept, and given that it was not, a token is not distributed so: the test can fail.
    assert chisquare(np.bincount(np.array(deep)[kept], minlength=8)[:7], kept.sum() * TARGET[:7]).pvalue < 1e-6


def test_warped_distribution_matches_transformers() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).eval()
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    extras: dict[str, Any] = {"repetition_penalty": 1.4, "sequence_bias": {(3,): 2.0, (5, 6): 3.0}, "min_new_tokens": 2}
    config = GenerationConfig(do_sample=True, eos_token_id=9, max_new_tokens=4, **settings, **extras)
    prompt = torch.tensor([[4, 5, 8]])
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        pad_token_id=0,
    )
    sampler = Sampler(
        3,
        frozenset({9}),
        extras["min_new_tokens"],
        repetition_penalty=1.4,
        sequence_bias=extras["sequence_bias"],
    )
    warping = Warping(0.6, 20, 0.8, 0.05)
    assert len(out.scores) > 2
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        processed = sampler.process(logits[0].numpy(), out.sequences[0, : 3 + step].numpy())
        ours = softmax(warped(warping, processed))
        np.testing.assert_allclose(ours, scores[0].double().softmax(-1).numpy(), atol=1e-6)


def test_custom_processors_run_last_in_order_on_copies() -> None:
    seen: list[Any] = []

    def first(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), scores.tolist()))
        scores[0, 2] += 10
        ids[:] = 0
        return scores

    def second(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), scores.tolist()))
        return scores.astype(np.float64)

    logits, context = np.array([1.0, 4.0, 2.0], np.float32), np.array([1, 1])
    sampler = Sampler(1, repetition_penalty=2.0, processors=(first, second))
    assert sampler(logits, context) == 2
    assert seen == [([[1, 1]], [[1.0, 2.0, 2.0]]), ([[1, 1]], [[1.0, 2.0, 12.0]])]
    assert logits.tolist() == [1.0, 4.0, 2.0]
    assert context.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3, np.float32), r"returned float32 \[3\]; return floats \[1, 3\]"),
        (np.zeros((1, 4), np.float32), r"returned float32 \[1, 4\]"),
        (np.zeros((1, 3), np.int64), "returned int64"),
        (None, "returned object"),
        (np.array([[0, np.nan, 1]]), "left no token to choose"),
        (np.full((1, 3), -np.inf), "left no token to choose"),
    ],
)
def test_output_of_a_processor_is_validated(returned: Any, message: str) -> None:
    def picky(ids: np.ndarray, scores: np.ndarray) -> Any:
        return returned

    with pytest.raises(OptionError, match=f"logits_processor picky {message}"):
        Sampler(1, processors=(picky,))(np.zeros(3, np.float32), np.array([0]))


@given(
    st.lists(st.sampled_from([-np.inf, UNKNOWN, -1.5, 0.0, 1.0, 1.25, 7.0]), min_size=1, max_size=40),
    st.integers(1, 30),
)
def test_top_tokens_are_sorted_and_begin_with_the_argmax(values: list[float], count: int) -> None:
    logits = np.array(values, np.float32)
    best = likeliest(logits, count).tolist()
    known = [token for token in range(len(logits)) if logits[token] > UNKNOWN]
    assert best == sorted(known, key=lambda token: (-logits[token], token))[:count]
    assert not known or best[0] == logits.argmax()


@given(
    drafts=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6),
    final=st.lists(st.integers(0, 9), min_size=6, max_size=6),
)
def test_choice_sees_final_tokens_and_its_own_drafts(drafts: list[list[int]], final: list[int]) -> None:
    seen: list[list[int]] = []

    def watch(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(ids[0].tolist())
        return scores

    output = Response(np.array([7, 8]), 10, sampler=Sampler(2, processors=(watch,)))
    said = Prediction(0, logits=np.zeros(10, np.float32))
    for index, ahead in enumerate(drafts):
        output.choose(said, ahead)
        assert seen[-1] == [7, 8, *final[:index], *ahead]
        assert output.add(final[index], False, None, said).id == final[index] == output.newest


def test_draft_ends_at_end_of_sequence_or_the_token_limit() -> None:
    output = Response(np.array([1, 2]), 4, eos=frozenset({9}))
    for ahead, ends in (([5], False), ([9], True), ([9, 5], False), ([5] * 3, False), ([5] * 4, True)):
        assert output.ends(ahead) == ends
    output.add(5, False, None, Prediction(5))
    assert [output.ends([5] * 2), output.ends([5] * 3)] == [False, True]


def test_penalty_of_tokens_outside_an_exit_vocabulary_does_not_overflow() -> None:
    logits = np.array([1.0, UNKNOWN, -2.0], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        token = Sampler(0, repetition_penalty=1e6, warping=Warping(0.5, 0, 1.0, 0.0))(logits, np.array([0, 1, 2]))
    assert token == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warping", [Warping(0.7, 3, 1.0, 0.0), Warping(1.0, 0, 0.9, 0.0), Warping(1.0, 0, 1.0, 0.1)])
def test_scores_outside_an_exit_vocabulary_cause_no_warnings(warping: Warping) -> None:
    logits = np.full(1024, UNKNOWN, np.float32)
    logits[[3, 500]] = 1.0, 1e32
    sampler = Sampler(prompt_length=0, repetition_penalty=1.3, warping=warping)
    assert sampler(logits, np.array([3, 7])) == 500


@pytest.mark.filterwarnings("error")
def test_a_tiny_probability_causes_no_warning() -> None:
    tiny = np.array([1.0, 5e-324, 0.0])
    assert {race(tiny, (seed, 0), 0) for seed in range(50)} == {0}
