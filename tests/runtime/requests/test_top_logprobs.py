"""The likeliest tokens with each token: of the decoder that decided it, as transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import BY_NAME, PROMPTS, Bundles, Case, Model
from draft_plans import draft_exits
from exit_layer_case import EXIT_CASES, EXIT_LAYER
from exit_vocabulary_case import KNOWN, with_exit_vocabulary
from reference import Run

from runtime import GenerationResult, Session

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = BY_NAME["llama-tied"], BY_NAME["t5-relu-tied"]
COUNT, TOKENS = 6, 20
# Modes, and whether an exited token's probabilities are the shallow decoder's.
MODES = {
    "full": {"mode": "full"},
    "free": {"mode": "free", "drafts": "exit", "threshold": 0.3},
    "exits": {"mode": "free", "drafts": "exit", "threshold": 0.0},
    "stack": {"mode": "free", "drafts": "exit", "threshold": 0.1, "max_pending": 3},
    "shallow": {"mode": "shallow"},
    "lossless": {"mode": "lossless", "threshold": 0.05, "drafts": "exit"},
    "rollback": {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 3.0},
}
JUDGED = ("lossless", "rollback")


@pytest.fixture
def longest_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long lossless drafts are is otherwise a matter of timing."""
    draft_exits(monkeypatch)


def same_as_transformers(ours: GenerationResult, run: Run, judged: bool) -> None:
    shallow, deep = run.logits(ours.token_ids[:-1])
    assert ours.top_logprobs is not None
    assert ours.logprobs is not None
    for step, best in enumerate(ours.top_logprobs):
        by_shallow = ours.exited[step] and not judged
        expected = (shallow if by_shallow else deep)[step].log_softmax(-1)
        ids, found = zip(*best, strict=True)
        assert len(set(ids)) == COUNT
        # Two that are as good as equal may change places.
        assert list(found) == pytest.approx(expected.topk(COUNT).values.tolist(), abs=1e-3)
        assert list(found) == pytest.approx(expected[list(ids)].tolist(), abs=1e-3)
        assert ours.logprobs[step] == pytest.approx(float(expected[ours.token_ids[step]]), abs=1e-3)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_top_logprobs_come_from_the_decoder_that_decided_the_token(
    case: Case, name: str, bundle: Bundles, source_model: Model, longest_drafts: None
) -> None:
    options: dict[str, Any] = {**MODES[name], "max_new_tokens": TOKENS, "ignore_eos": True}
    exits = 0
    with Session(bundle(case, 2), threads=1, slots=1) as session:
        for prompt in PROMPTS[:3]:
            ours = session.generate(prompt, top_logprobs=COUNT, **options)
            same_as_transformers(ours, Run(source_model(case), prompt, 2), name in JUDGED)
            assert ours.token_ids == session.generate(prompt, **options).token_ids
            exits += sum(ours.exited)
            if name == "rollback":  # a draft that the deep decoder finds likely need not be its first choice
                continue
            assert ours.token_ids == tuple(best[0][0] for best in ours.top_logprobs or ())
            assert ours.logprobs == tuple(best[0][1] for best in ours.top_logprobs or ())
    assert (exits > 0) == (name != "full")


def test_exit_layers_have_their_own_top_logprobs(bundle: Bundles, source_model: Model) -> None:
    case = EXIT_CASES[0]
    with Session(bundle(case, EXIT_LAYER), threads=1, slots=1) as session:
        options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": 0.05, "top_logprobs": COUNT}
        ours = session.generate(PROMPTS[2], max_new_tokens=TOKENS, ignore_eos=True, **options)
    assert any(ours.exited)
    same_as_transformers(ours, Run(source_model(case), PROMPTS[2], EXIT_LAYER), False)


def test_top_logprobs_of_an_exit_vocabulary_name_only_its_tokens(bundle: Bundles) -> None:
    with Session(bundle(with_exit_vocabulary("llama-tied"), EXIT_LAYER), threads=1, slots=1) as session:
        options: dict[str, Any] = {"mode": "free", "drafts": "exit", "threshold": 0.0, "top_logprobs": COUNT}
        ours = session.generate(PROMPTS[0], max_new_tokens=TOKENS, ignore_eos=True, **options)
    exited = [best for best, exited in zip(ours.top_logprobs or (), ours.exited, strict=True) if exited]
    assert exited
    assert {token for best in exited for token, _ in best} <= set(KNOWN)
