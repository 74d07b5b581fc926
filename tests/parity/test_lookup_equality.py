"""Drafts from text give the tokens of mode full: 500 random prompts in each of 8 families (slow)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, VOCAB_SIZE, Bundles
from draft_plans import draft_candidates

from runtime import Session

FAMILIES = ("t5-relu-tied", "byt5-deep-encoder", "mt5", "umt5", "llama-tied", "mistral-window", "qwen2-tied", "qwen3")
PROMPTS, TOKENS = 500, 24
# Two logits nearer than this may change places between k rows and one.
TIE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_lossless_with_every_source_is_full(name: str, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found is drafted, whether it pays or not. A first difference may only be a tie."""
    draft_candidates(monkeypatch)
    chance, drafted, ties = np.random.default_rng(len(name)), 0, 0
    with Session(bundle(BY_NAME[name], 1), threads=1, slots=1) as session:
        for _ in range(PROMPTS):
            prompt = chance.integers(3, VOCAB_SIZE, chance.integers(1, 20)).tolist() * int(chance.integers(1, 4))
            options: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": bool(chance.random() < 0.5)}
            full = session.generate(prompt, mode="full", **options)
            wrong = chance.random(len(full.token_ids)) < 0.2
            expected = np.where(wrong, chance.integers(3, VOCAB_SIZE, len(wrong)), full.token_ids).tolist()
            for more in ({"drafts": "lookup"}, {"predicted_output": expected}):
                ours = session.generate(prompt, mode="lossless", **more, **options)
                drafted += sum(counts.proposed for counts in ours.stats.drafts.values())
                if (ours.token_ids, ours.finish_reason) != (full.token_ids, full.finish_reason):
                    assert gap(session, prompt, full.token_ids, ours.token_ids) < TIE
                    ties += 1
    assert drafted > 10 * PROMPTS
    assert ties <= PROMPTS // 100


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
