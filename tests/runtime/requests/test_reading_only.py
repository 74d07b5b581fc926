"""Requests of no tokens: the prompt is read, kept for later requests, and scored; nothing is generated."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles
from exit_layer_case import with_feature

from runtime import OptionError, Session

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [3 + (29 * step + 7) % 90 for step in range(70)]
MODES: list[dict[str, Any]] = [
    {},
    {"mode": "full"},
    {"mode": "free", "threshold": 0.3},
    {"mode": "lossless", "drafts": "exit"},
    {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 3.0},
    {"mode": "shallow"},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_later_request_reuses_a_prompt_that_was_only_read(options: dict[str, Any], bundle: Bundles) -> None:
    path = bundle(with_feature("llama-tied", 1), 1, precision="int8", capacity=128)
    asked: dict[str, Any] = {"max_new_tokens": 12, "output_logprobs": True, **options}
    with Session(path, prefix_cache_mb=64) as session, Session(path) as plain:
        read = session.generate(PROMPT, max_new_tokens=0, **options)
        assert (read.token_ids, read.text, read.finish_reason) == ((), "", "length")
        assert (read.stats.tokens, read.stats.tokens_per_second) == (0, 0.0)
        ours = session.generate(PROMPT, **asked)
        alone = plain.generate(PROMPT, **asked)
        assert ours.stats.cached_tokens == 64
        assert (ours.token_ids, ours.logprobs) == (alone.token_ids, alone.logprobs)


def test_reading_changes_neither_learned_state_nor_request_counts(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["llama-tied"], 1), prefix_cache_mb=64, threshold="adaptive") as session:
        before = session.adaptive_state()
        for mode in ("free", "lossless"):
            session.generate(PROMPT, mode=mode, max_new_tokens=0)
        assert session.adaptive_state() == before
        metrics = session.metrics()
        assert metrics.prefill_only_tokens == 70 + 6
        assert (metrics.prompt_tokens, metrics.prefix_cache_hits, sum(metrics.finished.values())) == (0, 0, 0)
        session.generate(PROMPT, max_new_tokens=1)
        metrics = session.metrics()
        assert (metrics.prompt_tokens, metrics.prefix_cache_hits, sum(metrics.finished.values())) == (70, 64, 1)


def test_stream_of_a_read_only_request_has_no_tokens(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["llama-tied"], 1)) as session:
        stream = session.stream(PROMPT, max_new_tokens=0)
        assert list(stream) == []
        assert stream.result.finish_reason == "length"


def test_prompt_is_scored_without_generating_a_token(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["llama-tied"], 1)) as session:
        scored = session.generate(PROMPT, prompt_logprobs=2, max_new_tokens=0).prompt_logprobs
        assert scored is not None
        assert scored == session.generate(PROMPT, prompt_logprobs=2, max_new_tokens=3).prompt_logprobs


def test_encoder_output_is_cached(t5: Any) -> None:
    with Session(t5, prefix_cache_mb=16) as session:
        read = session.generate([5, 6, 7], max_new_tokens=0)
        assert (read.token_ids, read.finish_reason) == ((), "length")
        assert session.generate([5, 6, 7], max_new_tokens=4).stats.cached_tokens == 3


def test_beams_and_several_continuations_require_tokens(bundle: Bundles) -> None:
    with Session(bundle(BY_NAME["llama-tied"], 1)) as session:
        with pytest.raises(OptionError, match="num_beams is 2 with max_new_tokens 0"):
            session.generate(PROMPT, max_new_tokens=0, num_beams=2)
        with pytest.raises(OptionError, match="max_new_tokens is 0 with num_return_sequences"):
            session.generate_best(PROMPT, 2, max_new_tokens=0, temperature=1.0)
