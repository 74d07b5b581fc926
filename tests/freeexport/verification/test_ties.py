"""Tokens compared up to ties: what noise excuses and what it does not, on made scores and on a stand-in of a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles
from command_line import error, invoke, succeed
from fake_device import Machine

from freeexport.verification.ties import (
    Difference,
    Noise,
    ScoredTokens,
    SettingTies,
    compare_up_to_ties,
    first_difference,
)
from runtime.result import PassStats, Stats

LLAMA = BY_NAME["llama-tied"]


def tokens(*positions: Mapping[int, float]) -> ScoredTokens:
    """The likeliest token at each position."""
    ranked = [tuple(sorted(scores.items(), key=lambda each: -each[1])) for scores in positions]
    return ScoredTokens([scores[0][0] for scores in ranked], ranked)


def test_noise_is_the_change_of_the_margin_between_the_top_two() -> None:
    alone = tokens({1: -0.5, 2: -1.0}, {3: -0.1, 4: -3.0}, {5: -0.7, 6: -0.71})
    together = tokens({1: -0.6, 2: -1.0}, {3: -0.1, 4: -3.3}, {6: -0.7, 5: -0.71})
    noise = Noise.between([(alone, together)])
    # The third position, which changed its token, does not excuse itself.
    assert noise.positions == 2
    assert noise.largest == pytest.approx(0.3)
    assert noise.typical == pytest.approx(np.sqrt((0.1**2 + 0.3**2) / 2))


def test_token_may_differ_only_if_both_scores_are_within_the_noise() -> None:
    expected = tokens({1: -0.5, 2: -1.0}, {5: -0.7, 6: -0.8, 7: -2.0})
    noise = Noise(0.1, 0.2, 50)
    row = SettingTies("lossless")
    row.add(0, expected, [1, 5], noise)
    row.add(1, expected, [1, 6], noise)
    assert (row.tokens, row.faults) == (4, [])
    assert [(tie.request, tie.position) for tie in row.ties] == [(1, 1)]
    row.add(2, expected, [1, 7], noise)
    row.add(3, expected, [1, 99], noise)
    row.add(4, expected, [1], noise)
    assert [(fault.request, fault.other) for fault in row.faults] == [(2, 7), (3, 99), (4, None)]
    assert [fault.gap for fault in row.faults] == [pytest.approx(1.3), inf, inf]


def test_no_tokens_are_tied_without_noise() -> None:
    found = first_difference(0, tokens({1: -0.5, 2: -0.5}), [2])
    assert found == Difference(0, 0, 1, 2, 0.0)
    assert not found.tied(Noise(0.0, 0.0, 9))
    assert found.tied(Noise(1e-4, 1e-3, 9))


@pytest.mark.parametrize(("typical", "positions", "plausible"), [(0.01, 9, True), (0.5, 9, False), (0.0, 0, False)])
def test_noise_beyond_rounding_fails(typical: float, positions: int, plausible: bool) -> None:
    assert Noise(typical, 2 * typical, positions).plausible("fp16") == plausible


class NoisySession:
    """Greedy tokens from fixed logits. In passes over several rows, noise is added to the logits of `rows`."""

    capacity = 100
    manifest = SimpleNamespace(encoder_decoder=False, float_type="fp16")

    def __init__(self, logits: np.ndarray, noise: np.ndarray) -> None:
        self.logits = logits
        self.noise = noise

    def generate(self, prompt: Any, **options: Any) -> Any:
        if isinstance(prompt[0], list):
            return [self.generate(one, **options) for one in prompt]
        several = options["mode"] != "full"
        logits = self.logits + (self.noise if several else 0)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        best = np.argsort(-scores, axis=-1)
        top = tuple(tuple((int(t), float(s[t])) for t in order) for order, s in zip(best, scores, strict=True))
        stats = Stats(longer_passes={4: PassStats(3)} if several else {})
        return SimpleNamespace(token_ids=tuple(int(order[0]) for order in best), top_logprobs=top, stats=stats)


def compared(noise: np.ndarray, logits: np.ndarray | None = None) -> Any:
    draw = np.random.default_rng(0)
    given = draw.normal(0, 3, (40, 12)) if logits is None else logits
    session: Any = NoisySession(given, noise)
    return compare_up_to_ties(session, [[1, 2], [3]], 40)


def test_rounding_noise_passes_and_its_ties_are_counted() -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(0, 3, (40, 12))
    logits[30] = np.array([5.0, 4.9999, *[0.0] * 10])
    noise = draw.normal(0, 0.01, (40, 12))
    noise[30, :2] = -0.01, 0.01
    report = compared(noise, logits)
    assert report.passed, report.line
    assert {len(row.ties) for row in report.rows if row.setting.startswith("lossless")} == {2}
    assert "ties; noise" in report.line
    json.dumps(report.to_json(), allow_nan=False)


def test_fault_of_one_row_fails() -> None:
    noise = np.random.default_rng(1).normal(0, 0.01, (40, 12))
    noise[35] += np.roll(np.linspace(-9, 9, 12), 3)
    report = compared(noise)
    assert not report.passed
    assert "at position 35" in report.line


def test_fault_of_every_row_is_not_treated_as_noise() -> None:
    report = compared(np.random.default_rng(1).normal(0, 0.6, (40, 12)))
    assert not report.passed
    assert "fp16 cannot explain" in report.line


def test_verify_compares_the_tokens_of_a_device(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(LLAMA, target="cuda", precision="fp16")
    Machine(monkeypatch)
    assert "cuda:3 does not exist" in error(invoke("verify", path, "--device", "cuda:3"))
    refused = invoke("verify", path, "--equal", 100, "--device", "cuda")
    assert (refused.exit_code, "--equal compares bits" in refused.stderr) == (2, True)
    report = json.loads(succeed("verify", path, "--quick", "--device", "cuda", "--json").stdout)
    assert report["passed"]
    assert report["device"]["device"] == "cuda:0"
    assert report["device"]["noise"]["positions"] > 0
    assert {row["setting"] for row in report["device"]["settings"]} >= {"lossless, both drafts", "full, batch 4"}
