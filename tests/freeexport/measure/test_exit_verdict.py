from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from freeexport.measure.exit_verdict import ExitFacts, Share, share, verdict

UNKNOWN = ExitFacts("out", 10, 30)
TIMED = replace(UNKNOWN, basis="measured", break_even=0.3)
EXITS = replace(
    TIMED,
    threshold=0.9,
    exit_rate=Share(0.6, 229, 0.52, 0.67),
    exit_agreement=Share(0.99, 137, 0.95, 1.0),
    speedup=1.4,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Brown, Cai and DasGupta's formula (2001), by hand.
    [(30, 229, 0.0934, 0.1809), (0, 100, 0.0, 0.0370), (100, 100, 0.9630, 1.0)],
)
def test_independent_tokens_have_wilsons_interval(hits: int, count: int, low: float, high: float) -> None:
    found = share([hits], [count])
    assert found is not None
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


def test_no_tokens_have_no_share() -> None:
    assert share([], []) is None
    assert share([0, 0], [0, 0]) is None


def test_an_exit_that_pays_says_how_much_with_how_sure() -> None:
    found = verdict(EXITS)
    assert found.level == "good"
    assert found.text.startswith("pays: 1.40x the speed of mode full, predicted by the engines' measured times; ")
    assert "60.0% (95% interval 52.0% to 67.0%) of 229 tokens exit" in found.text
    assert "99.0% (95% interval 95.0% to 100.0%) of them agree" in found.text
    assert str(found) == f"{found.text}. Next: freeexport bench out --threshold 0.9"


def test_an_untrained_exit_is_to_be_trained_whatever_its_speed_would_be() -> None:
    found = verdict(replace(TIMED, trained=False, agreement=Share(0.04, 252, 0.02, 0.08)))
    assert found.level == "bad"
    assert "untrained" in found.text
    assert "4.0% (95% interval 2.0% to 8.0%) of the model's own tokens" in found.text
    assert "freeexport train" in found.next_step
    assert "lossless" in found.next_step
    assert "untrained" not in verdict(replace(TIMED, trained=False, agreement=Share(0.93, 252))).text


def test_an_exit_that_is_not_calibrated_is_to_be_calibrated() -> None:
    found = verdict(replace(TIMED, trained=True, data="lines.jsonl"))
    assert found.level == "neutral"
    assert "once 30.0% of the tokens exit" in found.text
    assert found.next_step == "freeexport calibrate out --data lines.jsonl"
    assert "not measured" in verdict(UNKNOWN).text


def test_times_of_a_busy_machine_are_given_and_marked() -> None:
    found = verdict(replace(EXITS, basis="busy"))
    assert found.level == "neutral"
    assert found.text.startswith("may pay: 1.40x the speed of mode full, predicted by times taken on a busy machine")
    assert found.next_step.endswith("on an idle machine")
    assert "30.0%" in verdict(replace(TIMED, basis="busy")).text
    # It is slower whatever the machine does.
    assert verdict(replace(EXITS, basis="busy", speedup=0.7)).level == "bad"


def test_an_exit_that_never_pays_says_so_before_any_calibration() -> None:
    found = verdict(replace(TIMED, break_even=None))
    assert found.level == "bad"
    assert "saves nothing even if every token exited" in found.text
    assert "evaluate CHECKPOINT --layers" in found.next_step


def test_too_few_exits_say_how_many_would_pay() -> None:
    found = verdict(replace(EXITS, speedup=0.9, break_even=0.7))
    assert found.level == "bad"
    assert found.text.startswith("does not pay: 0.90x")
    assert "exits pay once 70.0% of the tokens exit" in found.text


def test_data_that_leave_it_open_are_too_few() -> None:
    found = verdict(replace(EXITS, break_even=0.55))
    assert (found.level, found.next_step) == ("neutral", "give more data")
    assert found.text.startswith("may pay: 1.40x")


def test_what_was_measured_counts_more_than_what_was_predicted() -> None:
    assert verdict(replace(EXITS, measured=0.95)).level == "bad"
    found = verdict(replace(EXITS, measured=1.2, break_even=0.55))
    assert found.level == "good"
    assert found.text.startswith("pays: 1.20x the speed of mode full, measured (1.40x predicted")
    assert verdict(replace(EXITS, measured=1.2, basis="unknown")).level == "good"


def test_never_says_why() -> None:
    found = verdict(replace(EXITS, threshold=1.0, why_never="no token agrees"))
    assert found.level == "bad"
    assert "never exits: no token agrees" in found.text
    untrained = verdict(replace(EXITS, threshold=1.0, why_never="no token agrees", trained=False))
    assert "untrained" in untrained.text
    assert "lossless" in untrained.next_step


@pytest.mark.parametrize(
    "change",
    [{"threshold": 1.0, "speedup": 1.0}, {"speedup": 0.7}, {"break_even": None}, {"threshold": None}],
)
def test_a_comparison_of_layers_never_names_the_command_just_run(change: dict[str, float | None]) -> None:
    facts = replace(EXITS, basis="sizes", checkpoint=True, trained=False, **change)  # type: ignore[arg-type]
    found = verdict(facts)
    assert found.level == "bad"
    assert "--layers" not in found.next_step
    assert "evaluate-exits" not in found.next_step
    assert "freeexport train out OUT" in found.next_step
    assert "lossless" in found.next_step
    assert "--exit-vocab" not in found.next_step
    # As of Flan-T5: the head is 65.8 MB, a layer 11.
    assert "--exit-vocab N" in verdict(replace(facts, heavy_head=True)).next_step


def test_a_checkpoint_is_to_be_converted_next() -> None:
    found = verdict(replace(EXITS, basis="sizes", checkpoint=True))
    assert "by the sizes of layers and head" in found.text
    assert found.next_step == "freeexport convert out OUT --exit-layer 10, then calibrate the bundle"
