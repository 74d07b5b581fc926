"""Sampling and control through a session: which decoder a token is drawn from, seeds, several samples, log-probs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, PROMPTS, VOCAB_SIZE, Bundles, Model, Sessions
from draft_plans import draft_exits
from reference import Run
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import GenerationResult, OptionError, Session
from runtime.errors import BundleError
from runtime.requests.session_state import read_defaults
from runtime.text.sampler import race

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA, T5 = "llama-tied", "t5-relu-tied"
both = pytest.mark.parametrize("name", [LLAMA, T5])
DRAW: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 11}


def context_of(prompt: tuple[int, ...], name: str) -> list[int]:
    """The ids that the decoder has read before the first token."""
    return [0] if name == T5 else list(prompt)


@both
@pytest.mark.parametrize("mode", ["free", "full", "shallow"])
def test_tokens_are_sampled_with_the_probabilities_of_transformers(
    name: str, mode: str, sessions: Sessions, source_model: Model
) -> None:
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.95),
        ]
    )
    options: dict[str, Any] = {"mode": mode, "threshold": 0.3, "max_new_tokens": 30, "ignore_eos": True}
    if mode == "free":
        options["drafts"] = "exit"
    ours = sessions(name).generate(PROMPTS[0], **options, **DRAW)
    logits = Run(source_model(BY_NAME[name]), PROMPTS[0], 2).logits(ours.token_ids[:-1])
    drawn = []
    for step, exited in enumerate(ours.exited):
        context = context_of(PROMPTS[0], name) + list(ours.token_ids[:step])
        scores = processors(torch.tensor([context]), logits[0 if exited else 1][step][None])
        drawn.append(race(scores[0].double().softmax(-1).numpy(), (DRAW["seed"], 0), len(context)))
    assert tuple(drawn) == ours.token_ids
    assert any(ours.exited) == (mode != "full")
    greedy = sessions(name).generate(PROMPTS[0], **options)
    assert greedy.token_ids != ours.token_ids


@both
def test_lossless_samples_the_tokens_of_full_for_the_same_seed(
    name: str, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_exits(monkeypatch)
    session, kept, rejected = sessions(name), 0, 0
    for seed in range(10):
        options: dict[str, Any] = {**DRAW, "seed": seed, "max_new_tokens": 20, "output_logprobs": True}
        full = session.generate(PROMPTS[seed % 3], mode="full", **options)
        ours = session.generate(PROMPTS[seed % 3], mode="lossless", threshold=0.05, **options)
        assert (ours.token_ids, ours.text) == (full.token_ids, full.text)
        assert ours.logprobs == pytest.approx(full.logprobs, abs=1e-4)
        kept += ours.stats.exits
        rejected += ours.stats.rejected
    assert kept
    assert rejected


def test_rollback_with_sampling_keeps_a_shallow_token_unless_it_is_unlikely(
    sessions: Sessions, source_model: Model
) -> None:
    ours = sessions(LLAMA).generate(
        PROMPTS[0], mode="rollback", threshold=0.1, rollback_threshold=3.0, max_new_tokens=40, ignore_eos=True, **DRAW
    )
    _, deep = Run(source_model(BY_NAME[LLAMA]), PROMPTS[0], 2).logits(ours.token_ids[:-1])
    nll = -deep.log_softmax(-1)[torch.arange(40), torch.tensor(ours.token_ids)]
    exited = torch.tensor(ours.exited)
    assert exited.any()
    assert ours.stats.rejected
    assert nll[exited].max() <= 3.0 + 1e-4


@both
def test_equal_seeds_give_equal_tokens_and_other_seeds_do_not(name: str, sessions: Sessions) -> None:
    def ask(**options: Any) -> GenerationResult:
        chosen = {"temperature": 1.0, "max_new_tokens": 12, "threshold": 0.3, "ignore_eos": True, **options}
        return sessions(name).generate(PROMPTS[0], **chosen)

    assert ask(seed=1).token_ids == ask(seed=1).token_ids
    assert len({ask(seed=seed).token_ids for seed in range(6)}) == 6
    assert ask().token_ids != ask().token_ids
    assert ask(temperature=0, seed=1).token_ids == ask(temperature=None).token_ids


def test_generation_config_values_apply_once_sampling_is_requested(bundle: Bundles, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle(BY_NAME[LLAMA], 2), tmp_path / "copy"))
    file = path / "generation_config.json"
    size = file.stat().st_size
    file.write_text(json.dumps({"top_k": 1, "do_sample": True, "temperature": 3.0}).ljust(size))
    with Session(path, threads=1, slots=1) as session:
        options: dict[str, Any] = {"mode": "full", "max_new_tokens": 20}
        greedy = session.generate(PROMPTS[0], **options).token_ids
        # The file asks for sampling: that does not count. With sampling, its top_k of one is greedy again.
        assert session.generate(PROMPTS[0], do_sample=True, **options).token_ids == greedy
        assert session.generate(PROMPTS[0], do_sample=True, top_k=50, seed=1, **options).token_ids != greedy


@both
@pytest.mark.parametrize("mode", ["free", "lossless", "full"])
def test_several_samples_are_sorted_by_score(name: str, mode: str, sessions: Sessions) -> None:
    session = sessions(name)
    options: dict[str, Any] = {**DRAW, "mode": mode, "threshold": 0.3, "max_new_tokens": 10}
    results = session.generate_best(PROMPTS[0], 5, **options)
    assert len({result.token_ids for result in results}) == 5
    means = [sum(result.logprobs or ()) / len(result.token_ids) for result in results]
    assert means == sorted(means, reverse=True)
    # The first one drawn is what `generate` draws, and each is what it is among fewer.
    assert session.generate(PROMPTS[0], **options).token_ids in {result.token_ids for result in results}
    fewer = {result.token_ids for result in session.generate_best(PROMPTS[0], 3, **options)}
    assert fewer < {result.token_ids for result in results}
    assert sum(result.stats.prefill_seconds + result.stats.encode_seconds > 0 for result in results) == 1
    assert sum(result.stats.encode_seconds > 0 for result in results) == (name == T5)


def test_several_samples_require_sampling_and_release_the_slot(sessions: Sessions) -> None:
    session = sessions(LLAMA)
    for count, options in ((2, {}), (0, {"do_sample": True}), (1025, DRAW), (True, DRAW), (2, {"temperature": 0})):
        with pytest.raises(OptionError, match=f"num_return_sequences is {count}"):
            session.generate_best(PROMPTS[0], count, **options)

    def broken(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.generate_best(PROMPTS[0], 2, do_sample=True, logits_processor=broken)
    assert len(session.generate(PROMPTS[0], max_new_tokens=2).token_ids) == 2


@both
def test_log_probabilities_match_the_source_model(name: str, sessions: Sessions, source_model: Model) -> None:
    for mode in ("free", "rollback", "lossless", "full"):
        ours = sessions(name).generate(
            PROMPTS[0],
            mode=mode,
            threshold=0.3,
            rollback_threshold=3.0,
            max_new_tokens=25,
            ignore_eos=True,
            output_logprobs=True,
        )
        shallow, deep = Run(source_model(BY_NAME[name]), PROMPTS[0], 2).logits(ours.token_ids[:-1])
        spoke = [shallow if exited and mode == "free" else deep for exited in ours.exited]
        expected = [float(logits[step].log_softmax(-1)[ours.token_ids[step]]) for step, logits in enumerate(spoke)]
        assert ours.logprobs == pytest.approx(expected, abs=1e-3)
        plain = sessions(name).generate(
            PROMPTS[0], mode=mode, threshold=0.3, rollback_threshold=3.0, max_new_tokens=25, ignore_eos=True
        )
        assert plain.token_ids == ours.token_ids
        assert plain.logprobs is None


@pytest.mark.parametrize("mode", ["free", "lossless", "full"])
def test_logits_processor_forces_full_logits_in_every_mode(mode: str, sessions: Sessions) -> None:
    def even(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        assert ids.shape[0] == 1
        assert scores.shape == (1, VOCAB_SIZE)
        scores[:, 1::2] = -np.inf
        return scores

    for options in ({}, DRAW):
        result = sessions(LLAMA).generate(
            PROMPTS[0], mode=mode, threshold=0.2, max_new_tokens=20, logits_processor=even, **options
        )
        assert all(token % 2 == 0 for token in result.token_ids)


def test_bias_beyond_the_vocabulary_is_refused(sessions: Sessions) -> None:
    with pytest.raises(OptionError, match=f"sequence_bias names token {VOCAB_SIZE}"):
        sessions(LLAMA).generate(PROMPTS[0], sequence_bias={(1, VOCAB_SIZE): 1.0})
    chosen = sessions(LLAMA).generate(PROMPTS[0], sequence_bias={77: 1e6}, max_new_tokens=5)
    assert chosen.token_ids == (77,) * 5


# Values that a bundle recommends


def written(directory: Path, content: Any) -> Path:
    (directory / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_only_sampling_values_of_generation_config_are_read(tmp_path: Path) -> None:
    content = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": None,
        "top_p": 0.9,
        "eos_token_id": 2,
        "max_length": 4096,
    }
    assert read_defaults(written(tmp_path, content)) == {"temperature": 0.6, "top_p": 0.9}


UNUSABLE = [
    {"temperature": 1e-38},
    {"temperature": 10**400},
    {"repetition_penalty": float("nan")},
    {"repetition_penalty": [1]},
    {"top_k": True},
    {"top_k": [0] * 20_000},
    '{"min_p": 1e999}',
    "[" * 100_000,
]


@pytest.mark.parametrize("content", [{"top_p": 3}, {"temperature": "hot"}, {"top_k": -1}, [1], "{", "\0", *UNUSABLE])
def test_unreadable_generation_config_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"generation_config\.json") as refused:
        read_defaults(written(tmp_path, content))
    assert len(str(refused.value)) < 600


def test_unlisted_generation_config_is_not_read(tmp_path: Path) -> None:
    assert read_defaults(written(tmp_path, {"temperature": 0.6}), {"deep.onnx": None}) == {}
