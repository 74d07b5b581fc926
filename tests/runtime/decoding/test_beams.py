"""Beam search against all sequences there are, and against transformers on the same checkpoints."""

from __future__ import annotations

import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, Bundles, Model
from exit_layer_case import EXIT_CASES, with_feature
from hypothesis import given
from hypothesis import strategies as st

from runtime import CapacityError, OptionError, Session
from runtime.decoding.beams import BeamRows, BeamSearch, Scores
from runtime.decoding.calls import Waits, finish
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import OnnxEngine
from runtime.text.sampler import log_softmax

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 0


class Language:
    """Log-probabilities of every token after every sequence, drawn by a hash of the sequence."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed

    def after(self, sequence: tuple[int, ...]) -> np.ndarray:
        source = np.random.default_rng([self.seed, *(token + 1 for token in sequence)])
        return log_softmax(source.normal(size=self.vocabulary) * 2)

    def score(self, sequences: np.ndarray, sources: np.ndarray) -> Waits[Scores]:
        yield None
        rows = np.stack([self.after(tuple(row)) for row in sequences.tolist()])
        return Scores.of(rows)

    def total(self, sequence: tuple[int, ...]) -> float:
        return sum(float(self.after(sequence[:index])[token]) for index, token in enumerate(sequence))

    def finished(self, limit: int) -> list[tuple[int, ...]]:
        """All sequences that end, by end of sequence or by length."""
        whole = [s for n in range(1, limit + 1) for s in product(range(self.vocabulary), repeat=n)]
        return [s for s in whole if EOS not in s[:-1] and (s[-1] == EOS or len(s) == limit)]


@given(st.integers(0, 500), st.sampled_from([0.0, 0.7, 1.0, 2.0]))
def test_wide_beams_find_the_best_sequences(seed: int, penalty: float) -> None:
    language, limit = Language(3, seed), 4
    best = sorted((-language.total(s) / len(s) ** penalty, s) for s in language.finished(limit))
    search = BeamSearch(40, limit, frozenset({EOS}), penalty, "never")
    found = finish(search.search(language.score))
    assert [hypothesis.tokens for hypothesis in found[:5]] == [sequence for _, sequence in best[:5]]
    for hypothesis, (score, sequence) in zip(found[:5], best, strict=False):
        assert hypothesis.score == pytest.approx(-score)
        assert sum(hypothesis.logprobs) == pytest.approx(language.total(sequence))


@given(st.integers(0, 500), st.integers(1, 5), st.sampled_from([True, False, "never"]))
def test_beams_are_distinct_and_sorted_by_score(seed: int, beams: int, early: Any) -> None:
    found = finish(BeamSearch(beams, 6, frozenset({EOS}), 1.0, early).search(Language(4, seed).score))
    assert len({hypothesis.tokens for hypothesis in found}) == len(found) == beams
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for hypothesis in found:
        assert EOS not in hypothesis.tokens[:-1]
        assert hypothesis.tokens[-1] == EOS or len(hypothesis.tokens) == 6


@given(st.integers(0, 500), st.integers(1, 5), st.sampled_from([3, 64, 200, 1000]))
def test_candidates_are_the_highest_scoring_tokens(seed: int, beams: int, vocabulary: int) -> None:
    source = np.random.default_rng(seed)
    logits, totals = source.normal(size=(beams, vocabulary)), source.normal(size=beams)
    logits[source.random(logits.shape) < 0.1] = -np.inf
    logits[np.isneginf(logits).all(axis=1)] = 0.0  # some token may always follow
    scores = Scores.of(logits) if seed % 2 else Scores(logits, np.zeros(beams), log_softmax(logits))
    found, rows, tokens = BeamSearch(beams, 6, frozenset({EOS}))._candidates(totals, scores)
    every = totals[:, None] + log_softmax(logits)
    best = np.sort(every, axis=None)[::-1][: min(2 * beams, every.size)]
    np.testing.assert_allclose(found, best)
    np.testing.assert_allclose(every[rows, tokens], best)


SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 5, "length_penalty": -0.5, "early_stopping": "never"},
    {"num_beams": 2, "length_penalty": 0.0, "repetition_penalty": 1.5, "min_new_tokens": 8},
    {"num_beams": 3, "sequence_bias": {(1,): 4.0}, "early_stopping": "never"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        *(("t5-relu-tied", "ort"), ("t5-deep-decoder", "ort"), ("umt5", "standard")),
        *(("t5-relu-tied-exit-layers", "ort"), ("t5-relu-tied-feature-1", "ort")),
    ],
)
def test_beams_match_transformers(
    name: str, dialect: str, settings: dict[str, Any], bundle: Bundles, source_model: Model
) -> None:
    cases = *BY_NAME.values(), *EXIT_CASES, with_feature("t5-relu-tied", 1)
    case = next(case for case in cases if case.name == name)
    with Session(bundle(case, 1, dialect=dialect), threads=1, slots=1) as session:
        session.generate(PROMPTS[0], mode="lossless", max_new_tokens=2)  # leaves the slot's decoder ready for exits
        for prompt in PROMPTS[:2]:
            ids = torch.tensor([prompt])
            theirs = source_model(case).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=12,
                num_return_sequences=settings["num_beams"],
                eos_token_id=list(session.manifest.eos_token_ids),
                use_cache=False,
                return_dict_in_generate=True,
                output_scores=True,
                **settings,
            )
            ours = session.generate_best(prompt, settings["num_beams"], mode="full", max_new_tokens=12, **settings)
            for result, sequence in zip(ours, theirs.sequences[:, 1:].tolist(), strict=True):
                ended = [index for index, token in enumerate(sequence) if token in session.manifest.eos_token_ids]
                assert list(result.token_ids) == sequence[: ended[0] + 1 if ended else None]
            best = session.generate(prompt, mode="full", max_new_tokens=12, **settings)
            assert best.token_ids == ours[0].token_ids
            assert best.logprobs is None
            if "repetition_penalty" not in settings and "sequence_bias" not in settings:
                scale = [len(r.token_ids) ** settings.get("length_penalty", 1.0) for r in ours]
                scores = [sum(r.logprobs or ()) / s for r, s in zip(ours, scale, strict=True)]
                assert scores == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-3)


def test_cancelled_beam_search_releases_its_slot(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["t5-relu-tied"], 1), threads=1, slots=1) as session:
        cancel = threading.Event()
        cancel.set()
        options: dict[str, Any] = {"mode": "full", "num_beams": 3}
        assert session.generate(PROMPTS[0], cancel=cancel, **options).finish_reason == "cancelled"
        assert session.generate_best(PROMPTS[0], 2, cancel=cancel, **options) == []
        tokens = list(session.stream(PROMPTS[0], max_new_tokens=6, **options))
        assert 0 < len(tokens) <= 6
        assert session.generate(PROMPTS[0], max_new_tokens=3).token_ids
        with pytest.raises(OptionError, match="num_return_sequences is 4"):
            session.generate_best(PROMPTS[0], 4, **options)


def test_deadline_holds_during_a_long_beam_step(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits goes at the deadline; the search ends between two engine calls."""
    stepping, returns, ended = BeamRows.stepping, threading.Event(), threading.Event()
    went_on = list[bool]()

    def slow(rows: BeamRows, tokens: np.ndarray, sources: np.ndarray) -> Any:
        try:
            assert returns.wait(60)  # an engine call
            yield None
            went_on.append(True)
            return (yield from stepping(rows, tokens, sources))
        finally:
            ended.set()

    monkeypatch.setattr(BeamRows, "stepping", slow)
    options: dict[str, Any] = {"mode": "full", "num_beams": 256, "max_new_tokens": 100, "deadline": 0.5}
    with Session(bundle(BY_NAME["t5-relu-tied"], 1), threads=1, slots=1) as session:
        result = session.generate(PROMPTS[0], **options)
        assert not ended.is_set()
        assert (result.finish_reason, result.token_ids) == ("deadline", ())
        returns.set()
        assert ended.wait(60)
        assert not went_on, "a step went on after the call in which the deadline passed"
        monkeypatch.undo()
        assert session.generate(PROMPTS[0], max_new_tokens=3).stats.tokens == 3


def test_beam_caches_grow_with_their_sequences(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, stepping = list[int](), BeamRows.stepping

    def watched(self: BeamRows, tokens: np.ndarray, sources: np.ndarray) -> Any:
        logits = yield from stepping(self, tokens, sources)
        rows.append(self._caches[0].rows)
        return logits

    options: dict[str, Any] = {"mode": "full", "num_beams": 3, "max_new_tokens": 21, "ignore_eos": True}
    with Session(bundle(BY_NAME["t5-relu-tied"], 1), threads=1, slots=1) as session:
        whole = session.generate(PROMPTS[0], **options)
        monkeypatch.setattr("runtime.decoding.beams.FIRST_ROWS", 4)
        monkeypatch.setattr(BeamRows, "stepping", watched)
        grown = session.generate(PROMPTS[0], **options)
    assert grown.token_ids == whole.token_ids
    assert sorted(set(rows)) == [4, 8, 16, 22]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_beams_share_prompt_keys_and_copy_only_diverging_rows(
    precision: Any, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies for every beam, as bundles of earlier versions need them, tokens and scores are the same."""
    copied = list[int]()
    copy_rows = KVCache.copy_rows

    def counted(cache: KVCache, source: int, target: int, first: int = 0) -> None:
        copied.append(first)
        copy_rows(cache, source, target, first)

    options: dict[str, Any] = {"mode": "full", "num_beams": 4, "max_new_tokens": 16, "ignore_eos": True}
    with Session(bundle(BY_NAME["t5-heads-of-40"], 1, precision=precision), threads=1, slots=1) as session:
        with monkeypatch.context() as patched:
            patched.setattr("runtime.decoding.beams._repeated", None)
            patched.setattr(KVCache, "copy_rows", counted)
            ours = session.generate_best(PROMPTS[0], 4, **options)
        assert any(copied), "whole rows are copied"
        monkeypatch.setattr(OnnxEngine, "shares_prompts", False)
        monkeypatch.setattr(KVCache, "copy_rows", lambda cache, source, target, first: copy_rows(cache, source, target))
        copies = session.generate_best(PROMPTS[0], 4, **options)
    assert [result.token_ids for result in ours] == [result.token_ids for result in copies]
    assert [result.logprobs for result in ours] == [
        pytest.approx(result.logprobs, abs=0 if precision == "int8" else 1e-5) for result in copies
    ]


def test_beams_are_refused_if_their_caches_exceed_memory(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(bundle(BY_NAME["t5-relu-tied"], 1), threads=1, slots=1) as session:
        monkeypatch.setattr(
            "runtime.engines.kv_cache.available_memory", lambda: 256 * 21 * session.manifest.kv_bytes_per_token
        )
        assert session.generate(PROMPTS[0], mode="full", num_beams=256, max_new_tokens=20).token_ids
        with pytest.raises(CapacityError, match=r"256 beams of 22 positions need .* lower num_beams or max_new_tokens"):
            session.generate(PROMPTS[0], mode="full", num_beams=256, max_new_tokens=21)


def test_beam_search_on_a_decoder_only_bundle_is_refused(bundle: Bundles) -> None:
    with (
        Session(bundle(BY_NAME["llama-tied"], 1), threads=1, slots=1) as session,
        pytest.raises(OptionError, match="beam search is for encoder-decoders"),
    ):
        session.generate(PROMPTS[0], mode="full", num_beams=2)
