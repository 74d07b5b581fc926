from __future__ import annotations

from dataclasses import replace

from freeexport.traces.share import Share
from freeexport.traces.verdict import ExitFacts, verdict

UNKNOWN = ExitFacts("out", 10, 30)
TIMED = replace(UNKNOWN, basis="measured", break_even=0.3)
EXITS = replace(
    TIMED,
    threshold=0.9,
    exit_rate=Share(0.6, 229, 0.52, 0.67),
    exit_agreement=Share(0.99, 137, 0.95, 1.0),
    speedup=1.4,
)


def test_an_exit_that_pays_says_how_much_with_how_sure() -> None:
    said = verdict(EXITS)
    assert said.level == "good"
    assert said.text.startswith("pays: 1.40x the speed of mode full, predicted by the engines' measured times; ")
    assert "60.0% (95% interval 52.0% to 67.0%) of 229 tokens exit" in said.text
    assert "99.0% (95% interval 95.0% to 100.0%) of them agree" in said.text
    assert said.next_step == "freeexport bench out --threshold 0.9"
    assert str(said) == f"{said.text}. Next: {said.next_step}"


def test_an_untrained_exit_is_to_be_trained_whatever_its_speed_would_be() -> None:
    said = verdict(replace(TIMED, trained=False, agreement=Share(0.04, 252, 0.02, 0.08)))
    assert said.level == "bad"
    assert "untrained" in said.text
    assert "4.0% (95% interval 2.0% to 8.0%) of the model's own tokens" in said.text
    assert "early tokens will be poor" in said.text
    assert "freeexport train" in said.next_step
    assert "lossless" in said.next_step
    assert verdict(replace(TIMED, trained=False)).level == "bad"


def test_an_exit_without_exit_json_that_agrees_is_not_called_untrained() -> None:
    assert "untrained" not in verdict(replace(TIMED, trained=False, agreement=Share(0.93, 252))).text


def test_an_exit_that_is_not_calibrated_is_to_be_calibrated() -> None:
    said = verdict(replace(TIMED, trained=True))
    assert said.level == "neutral"
    assert "once 30.0% of the tokens exit" in said.text
    assert said.next_step == "freeexport calibrate out --data FILE"


def test_a_busy_machine_gives_no_prediction() -> None:
    for facts in (replace(EXITS, basis="busy"), replace(TIMED, basis="busy")):
        said = verdict(facts)
        assert said.level == "neutral"
        assert "not measured: machine busy" in said.text
        assert "x the speed" not in said.text
        assert "30.0%" not in said.text
        assert said.next_step == "freeexport calibrate out --data FILE, on an idle machine"


def test_an_exit_that_never_pays_says_so_before_any_calibration() -> None:
    said = verdict(replace(TIMED, break_even=None))
    assert said.level == "bad"
    assert "saves nothing even if every token exited" in said.text
    assert "--exit-layer" in said.next_step


def test_too_few_exits_say_how_many_would_pay() -> None:
    said = verdict(replace(EXITS, speedup=0.9, break_even=0.7))
    assert said.level == "bad"
    assert said.text.startswith("does not pay: 0.90x")
    assert "exits pay once 70.0% of the tokens exit" in said.text


def test_data_that_leave_it_open_are_too_few() -> None:
    said = verdict(replace(EXITS, break_even=0.55))
    assert said.level == "neutral"
    assert said.text.startswith("may pay: 1.40x")
    assert said.next_step == "give more data"


def test_what_was_measured_counts_more_than_what_was_predicted() -> None:
    assert verdict(replace(EXITS, measured=0.95)).level == "bad"
    said = verdict(replace(EXITS, measured=1.2, break_even=0.55))
    assert said.level == "good"
    assert said.text.startswith("pays: 1.20x the speed of mode full, measured (1.40x predicted")
    assert verdict(replace(EXITS, measured=1.2, basis="unknown")).level == "good"


def test_never_says_why() -> None:
    said = verdict(replace(EXITS, threshold=1.0, why_never="no token agrees"))
    assert said.level == "bad"
    assert "never exits: no token agrees" in said.text
    untrained = verdict(replace(EXITS, threshold=1.0, why_never="no token agrees", trained=False))
    assert "untrained" in untrained.text
    assert "lossless" in untrained.next_step


def test_a_checkpoint_is_to_be_converted_next() -> None:
    said = verdict(replace(EXITS, basis="sizes", checkpoint=True))
    assert "by the sizes of layers and head" in said.text
    assert said.next_step == "freeexport convert out OUT --exit-layer 10, then calibrate the bundle"
