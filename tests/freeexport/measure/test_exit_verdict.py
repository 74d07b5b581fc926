from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from freeexport.measure.exit_verdict import ExitFacts, Share, share, verdict

UNKNOWN = ExitFacts("out", 10, 30)
TIMED = replace(UNKNOWN, basis="measured", break_even=0.3)
EXITS = replace(
    TIMED, threshold=0.9, exit_rate=Share(0.6, 229, 0.52, 0.67), exit_agreement=Share(0.99, 137, 0.95, 1.0), speedup=1.4
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Brown, Cai and DasGupta's formula (2001), by hand.
    [(30, 229, 0.0934, 0.1809), (0, 100, 0.0, 0.0370), (100, 100, 0.9630, 1.0)],
)
def test_independent_tokens_have_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    found = share([hits], [count])
    assert found is not None
    assert share([0, 0], [0, 0]) is None
    assert (found.value, found.count) == (pytest.approx(hits / count), count)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_sequences_that_are_easy_or_hard_as_a_whole_are_worth_fewer_tokens() -> None:
    clustered, mixed = share([20, 0] * 10, [20] * 20), share([10] * 20, [20] * 20)
    assert clustered is not None
    assert mixed is not None
    assert clustered.value == mixed.value == 0.5
    # Twenty tokens that are all alike are one: twenty sequences, not four hundred tokens.
    assert (clustered.low, clustered.high) == (pytest.approx(0.29, abs=0.01), pytest.approx(0.71, abs=0.01))
    assert (mixed.low, mixed.high) == (pytest.approx(0.451, abs=0.001), pytest.approx(0.549, abs=0.001))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = random.integers(5, 40, 60)
        easy = random.beta(6, 4, 60)  # 0.6 on average
        found = share(random.binomial(sizes, easy), sizes)
        assert found is not None
        held += (found.low or 0) <= 0.6 <= (found.high or 0)
    assert 0.92 < held / 400 < 0.98


POOR = Share(0.04, 252, 0.02, 0.08)
NEVER = replace(EXITS, threshold=1.0, why_never="no token agrees")


@pytest.mark.parametrize(
    ("facts", "level", "text", "next_step"),
    [
        (EXITS, "good", "pays: 1.40x the speed of mode full, predicted by the engines' measured times; ",
         "freeexport bench out --threshold 0.9"),
        (EXITS, "good", "60.0% (95% interval 52.0% to 67.0%) of 229 tokens exit, 99.0% (95% interval 95.0% to 100.0%) "
         "of them agree", ""),
        # Whatever the speed would be, an untrained exit is to be trained.
        (replace(TIMED, trained=False, agreement=POOR), "bad", "is untrained (shallow and deep prediction agree at "
         "4.0% (95% interval 2.0% to 8.0%) of the model's own tokens)", "freeexport train"),
        (replace(TIMED, trained=False, agreement=Share(0.93, 252)), "neutral", "not calibrated", ""),
        (replace(TIMED, trained=True, data="lines.jsonl"), "neutral", "once 30.0% of the tokens exit",
         "freeexport calibrate out --data lines.jsonl"),
        (UNKNOWN, "neutral", "speed not measured", ""),
        (replace(EXITS, basis="busy"), "neutral", "may pay: 1.40x the speed of mode full, predicted by times taken on "
         "a busy machine", "on an idle machine"),
        (replace(TIMED, basis="busy"), "neutral", "30.0%", ""),
        # It is slower whatever the machine does.
        (replace(EXITS, basis="busy", speedup=0.7), "bad", "does not pay: 0.70x", ""),
        (replace(TIMED, break_even=None), "bad", "saves nothing even if every token exited",
         "exit after an earlier layer"),
        (replace(EXITS, speedup=0.9, break_even=0.7), "bad", "exits pay once 70.0% of the tokens exit", ""),
        (replace(EXITS, break_even=0.55), "neutral", "may pay: 1.40x", "give more data"),
        # What was measured counts more than what was predicted.
        (replace(EXITS, measured=0.95), "bad", "0.95x the speed of mode full, measured", ""),
        (replace(EXITS, measured=1.2, break_even=0.55), "good", "pays: 1.20x the speed of mode full, measured (1.40x "
         "predicted", ""),
        (replace(EXITS, measured=1.2, basis="unknown"), "good", "pays: 1.20x", ""),
        (NEVER, "bad", "never exits: no token agrees", ""),
        (replace(NEVER, trained=False), "bad", "is untrained and never exits", "lossless"),
    ],
)  # fmt: skip
def test_a_verdict_says_whether_an_exit_pays_and_what_to_do(
    facts: ExitFacts, level: str, text: str, next_step: str
) -> None:
    found = verdict(facts)
    assert found.level == level
    assert text in found.text
    assert next_step in found.next_step
    assert str(found) == f"{found.text}. Next: {found.next_step}"


def test_a_heavy_head_is_named() -> None:
    facts = replace(EXITS, trained=False, speedup=0.7)
    assert "--exit-vocab" not in verdict(facts).next_step
    assert "--exit-vocab N" in verdict(replace(facts, heavy_head=True)).next_step
