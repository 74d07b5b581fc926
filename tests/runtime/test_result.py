"""Results as JSON values, and the sums of their statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime import Session
from runtime.result import DraftStats, GenerationResult, PassStats, Segment, Stats, Word

PROMPT = [5, 6, 7]
REQUESTS: dict[str, dict[str, Any]] = {
    "text drafts": {"mode": "lossless", "drafts": "lookup"},
    "all drafts": {"mode": "lossless", "drafts": "auto"},
    "free": {"mode": "free", "threshold": 0.3},
    "rollback": {"mode": "rollback", "threshold": 0.1, "rollback_threshold": 0.0},
    "log-probabilities": {"mode": "full", "output_logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1},
}


@pytest.mark.parametrize("options", REQUESTS.values(), ids=REQUESTS)
def test_result_converts_to_json(options: dict[str, Any], chat: Path) -> None:
    with Session(chat, threads=1, slots=1) as session:
        repeated = session.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids
        if "drafts" in options:
            options = options | {"predicted_output": list(repeated)}
        result = session.generate(PROMPT, max_new_tokens=20, ignore_eos=True, **options)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["token_ids"] == list(result.token_ids)
    assert written["stats"]["mode"] == options["mode"]
    assert written["stats"]["drafts"].keys() == result.stats.drafts.keys()
    for source, counts in result.stats.drafts.items():
        assert written["stats"]["drafts"][source]["proposed"] == counts.proposed > 0
    if "drafts" in options:
        assert written["stats"]["drafts"]
    if "top_logprobs" in options:
        best_id, best = written["top_logprobs"][0][0]
        assert (best_id, best) == pytest.approx((result.token_ids[0], result.logprobs[0]))  # type: ignore[index]
        assert written["prompt_logprobs"]["logprobs"][0] is None


def test_speech_result_converts_to_json() -> None:
    word = Word("Hello", 0.0, 0.5, 0.9)
    segment = Segment(0.0, 1.0, "Hello", (5,), 0.0, -0.1, 1.0, None, (word,))
    result = GenerationResult("Hello", (5,), (False,), (None,), "eos", Stats("full"), segments=(segment,))
    written = json.loads(json.dumps(result.to_dict()))
    assert written["segments"][0]["words"] == [{"text": "Hello", "start": 0.0, "end": 0.5, "probability": 0.9}]


def test_drafts_are_counted_by_position_up_to_the_first_rejection() -> None:
    counts = DraftStats()
    counts.add(3, 2)
    counts.add(4, 0)
    counts.add(2, 2)
    assert counts == DraftStats(drafts=3, proposed=9, accepted=4, by_position=[(2, 3), (2, 2), (0, 1)])
    assert counts.mean_accepted == 4 / 3


def test_joined_statistics_add_drafts_and_passes_of_all_parts() -> None:
    first = Stats("lossless", tokens=4, longer_passes={3: PassStats(1, 0.5)}, queue_seconds=1.0)
    second = Stats("lossless", tokens=5, longer_passes={3: PassStats(2, 0.5)}, queue_seconds=2.0)
    first.count_draft("lookup", 2, 1)
    second.count_draft("lookup", 3, 3)
    second.count_draft("exit", 1, 0)
    whole = Stats.joined([first, second])
    assert (whole.tokens, whole.queue_seconds) == (9, 1.0)
    assert whole.longer_passes == {3: PassStats(3, 1.0)}
    assert whole.drafts == {
        "lookup": DraftStats(drafts=2, proposed=5, accepted=4, by_position=[(2, 2), (1, 2), (1, 1)]),
        "exit": DraftStats(drafts=1, proposed=1, accepted=0, by_position=[(0, 1)]),
    }
    assert first.drafts["lookup"].proposed == 2  # the parts do not change


def test_interrupted_result_is_not_complete() -> None:
    for reason in ("cancelled", "deadline"):
        result = GenerationResult("", (), (), (), reason, Stats())  # type: ignore[arg-type]
        assert (result.complete, result.interrupted) == (False, True)
