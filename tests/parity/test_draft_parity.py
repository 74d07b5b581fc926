"""Modes whose exits are drafts, `rollback` and `lossless`, against a slow reference on Hugging Face modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, CASES, PROMPTS, VOCAB_SIZE, Bundles, Case, Model
from draft_plans import draft_exits, draft_texts
from exit_layer_case import EXIT_CASES
from reference import (
    Run,
    assert_same_tokens,
    draft_decode,
    free_decode,
    only_the_deep_choice_stays,
    replay,
    separating_threshold,
    unlikely_goes,
)

from runtime import Session

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 18
each_case = pytest.mark.parametrize("case", [*CASES, *EXIT_CASES], ids=lambda case: case.name)
few_cases = pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in ("t5-deep-decoder", "umt5", "llama-tied", "qwen3")], ids=lambda case: case.name
)


@contextmanager
def opened(bundle: Bundles, case: Case, exit_layer: int) -> Iterator[Session]:
    with Session(bundle(case, exit_layer), slots=1, threads=1) as session:
        yield session


def thresholds(session: Session, model: Any, prompt: tuple[int, ...], exit_layer: int) -> tuple[float, float]:
    """Thresholds with exits and with rollbacks, both far from any value seen on the greedy continuation."""
    guide = session.generate(prompt, mode="full", max_new_tokens=TOKENS, ignore_eos=True).token_ids
    exits = separating_threshold(replay(model, prompt, guide, exit_layer, 1.0), quantile=0.3)
    shallow, deep = Run(model, prompt, exit_layer).logits(guide[:-1])
    nlls = sorted((-deep.double().log_softmax(-1)).gather(1, shallow.argmax(-1, keepdim=True))[:, 0].tolist())
    gaps = np.diff(nlls[TOKENS // 3 : 2 * TOKENS // 3])
    widest = TOKENS // 3 + int(gaps.argmax())
    return exits, (nlls[widest] + nlls[widest + 1]) / 2


@each_case
def test_rollback_rejects_the_drafts_that_the_reference_rejects(
    case: Case, bundle: Bundles, source_model: Model
) -> None:
    model, rejected, kept = source_model(case), 0, 0
    for exit_layer in dict.fromkeys((case.exit_layers[0], case.exit_layers[-1])):
        with opened(bundle, case, exit_layer) as session:
            for prompt, max_pending in ((PROMPTS[0], 16), (PROMPTS[2], 3)):
                threshold, limit = thresholds(session, model, prompt, exit_layer)
                options: dict[str, Any] = {"threshold": threshold, "rollback_threshold": limit, "ignore_eos": True}
                options |= {"max_pending": max_pending, "max_new_tokens": TOKENS}
                ours = session.generate(prompt, mode="rollback", **options)
                reference = draft_decode(
                    *(model, prompt, exit_layer, threshold, unlikely_goes(limit), TOKENS, max_pending),
                    expected=ours.token_ids,
                )
                if assert_same_tokens(ours, reference) is None:
                    assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
                rejected += ours.stats.rejected
                kept += ours.stats.exits
    assert rejected
    assert kept


def test_drafted_end_of_sequence_is_verified_first(bundle: Bundles, source_model: Model) -> None:
    case = BY_NAME["llama-untied-many-eos"]
    model, endings = source_model(case), set()
    with opened(bundle, case, 1) as session:
        for threshold in (0.0, 0.2):
            for limit in (2.0, 50.0):
                for prompt in PROMPTS:
                    ours = session.generate(
                        prompt, mode="rollback", threshold=threshold, rollback_threshold=limit, max_new_tokens=20
                    )
                    eos = session.manifest.eos_token_ids
                    reference = draft_decode(
                        *(model, prompt, 1, threshold, unlikely_goes(limit), 20), eos_ids=eos, expected=ours.token_ids
                    )
                    if assert_same_tokens(ours, reference) is None:
                        assert ours.finish_reason == reference.finish_reason
                        endings.add((ours.finish_reason, ours.exited[-1]))
    assert endings >= {("eos", True), ("eos", False), ("length", True), ("length", False)}


def test_rollback_without_a_limit_equals_free_and_with_limit_zero_equals_full(bundle: Bundles) -> None:
    with opened(bundle, BY_NAME["llama-tied"], 2) as session:
        for prompt in PROMPTS:
            options: dict[str, Any] = {"threshold": 0.3, "max_new_tokens": 40, "ignore_eos": True}
            free = session.generate(prompt, mode="free", drafts="exit", **options)
            never = session.generate(prompt, mode="rollback", rollback_threshold=1e9, **options)
            assert never.token_ids == free.token_ids
            # The last token of the request is verified at once: free leaves a stack behind.
            assert never.exited[:-1] == free.exited[:-1]
            always = session.generate(prompt, mode="rollback", rollback_threshold=0.0, **options)
            assert always.token_ids == session.generate(prompt, mode="full", **options).token_ids
            assert not any(always.exited)


@few_cases
@pytest.mark.parametrize("max_pending", [2, 5, 16])
def test_lossless_accepts_the_drafts_that_the_reference_accepts(
    case: Case, max_pending: int, bundle: Bundles, source_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_exits(monkeypatch)
    model, exit_layer, rejected = source_model(case), case.exit_layers[-1], 0
    exited = False
    with opened(bundle, case, exit_layer) as session:
        for prompt in PROMPTS[::2]:
            threshold, _ = thresholds(session, model, prompt, exit_layer)
            options: dict[str, Any] = {"threshold": threshold, "max_pending": max_pending, "ignore_eos": True}
            ours = session.generate(prompt, mode="lossless", max_new_tokens=TOKENS, **options)
            reference = draft_decode(
                *(model, prompt, exit_layer, threshold, only_the_deep_choice_stays, TOKENS, max_pending),
                expected=ours.token_ids,
            )
            # The shallow head sees neither the prompt, as in full, nor the row behind a draft that cannot grow.
            for index, confidence in enumerate(ours.confidence[: len(reference.confidence)]):
                if confidence is None:
                    reference.confidence[index] = None
            if assert_same_tokens(ours, reference) is None:
                assert ours.stats.sync_sizes == Counter(reference.sync_sizes)
            exited |= any(ours.exited)
            rejected += ours.stats.rejected
            greedy = free_decode(model, prompt, exit_layer, 1.0, TOKENS, eos_ids=(), expected=ours.token_ids)
            assert ours.token_ids == tuple(greedy.token_ids)
    assert rejected
    assert exited


def prompts(count: int, seed: int) -> list[list[int]]:
    source = np.random.default_rng(seed)
    return [source.integers(3, VOCAB_SIZE, source.integers(1, 40)).tolist() for _ in range(count)]


@each_case
def test_lossless_equals_full(
    case: Case, bundle: Bundles, source_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts as the rule chooses them, then the longest."""
    drafts, given = 0, prompts(5, seed=len(case.name))
    differences: set[tuple[int, int, tuple[int, ...]]] = set()
    with opened(bundle, case, case.exit_layers[-1]) as session:
        whole = [session.generate(prompt, mode="full", max_new_tokens=TOKENS) for prompt in given]
        for longest in (False, True):
            if longest:
                draft_exits(monkeypatch)
            for number, full in enumerate(whole):
                for threshold in (0.0, 0.2, 0.6):
                    options: dict[str, Any] = {"threshold": threshold, "max_new_tokens": TOKENS}
                    ours = session.generate(given[number], mode="lossless", **options)
                    drafts += ours.stats.exits + ours.stats.rejected
                    if (ours.token_ids, ours.text) != (full.token_ids, full.text):
                        ids = full.token_ids
                        differences.add((number, first_difference(ours.token_ids, ids), ids))
    assert drafts
    for number, index, ids in differences:  # ties of the source model, if any
        _, deep = Run(source_model(case), given[number], 1).logits(ids[:index])
        best, second = torch.topk(deep[-1], 2).values.tolist()
        assert best - second < 1e-4
    assert len(differences) <= 1


def first_difference(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int:
    return next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)


# Drafts from text (slow)

FAMILIES = ("t5-relu-tied", "byt5-deep-encoder", "mt5", "umt5", "llama-tied", "mistral-window", "qwen2-tied", "qwen3")
COUNT = 500
# Two logits nearer than this may change places between k rows and one.
TIE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_lossless_with_every_draft_source_equals_full(
    name: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a text proposes is drafted. A first difference may only be a tie."""
    draft_texts(monkeypatch)
    chance, drafted, ties = np.random.default_rng(len(name)), 0, 0
    with Session(bundle(BY_NAME[name], 1), threads=1, slots=1) as session:
        for _ in range(COUNT):
            prompt = chance.integers(3, VOCAB_SIZE, chance.integers(1, 20)).tolist() * int(chance.integers(1, 4))
            options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": bool(chance.random() < 0.5)}
            full = session.generate(prompt, mode="full", **options)
            wrong = chance.random(len(full.token_ids)) < 0.2
            expected = np.where(wrong, chance.integers(3, VOCAB_SIZE, len(wrong)), full.token_ids).tolist()
            for more in ({"drafts": "lookup"}, {"predicted_output": expected}):
                ours = session.generate(prompt, mode="lossless", **more, **options)
                drafted += sum(counts.proposed for counts in ours.stats.drafts.values())
                if (ours.token_ids, ours.finish_reason) != (full.token_ids, full.finish_reason):
                    assert gap(session, prompt, full.token_ids, ours.token_ids) < TIE
                    ties += 1
    assert drafted > 10 * COUNT
    assert ties <= COUNT // 100


def gap(session: Session, prompt: list[int], full: tuple[int, ...], ours: tuple[int, ...]) -> float:
    """Between the two best logits where the tokens first differ."""
    place = next(place for place, (one, other) in enumerate(zip(full, ours, strict=False)) if one != other)
    scores: list[np.ndarray] = []

    def keep(ids: np.ndarray, given: np.ndarray) -> np.ndarray:
        scores.append(given[0].copy())
        return given

    session.generate(prompt, mode="full", max_new_tokens=place + 1, ignore_eos=True, logits_processor=keep)
    second, best = np.partition(scores[-1], -2)[-2:]
    return float(best - second)
