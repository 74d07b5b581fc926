"""A run keeps to its time, says what fits in it, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import Case
from training_case import LLAMA, Runs, logged, run_options, tensors

from freeexport.training import report
from freeexport.training.train import train
from freeexport.training.trainer import Clock, ExitTrainer
from runtime.bundle.costs import Costs

Directory = Callable[[Case], Path]
# A token takes 4 with all layers; 2 of shallow and head when it exits.
COSTS = Costs(2.0, 1.0, {1: 3.0, 8: 4.0}, measured=False)


def pass_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass in evaluations of 10 minutes and steps of one; a wall clock that is set back does not matter."""
    now, wall, step = [0.0], iter(range(10**9, 0, -3600)), ExitTrainer.training_step
    for module in ("trainer", "report"):
        monkeypatch.setattr(f"freeexport.training.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("time.time", lambda: float(next(wall)))

    def slow_step(*arguments: Any, **others: Any) -> Any:
        now[0] += 60.0
        return step(*arguments, **others)

    def slow_evaluation(*arguments: Any) -> float:
        now[0] += 600.0
        return 0.5

    monkeypatch.setattr(ExitTrainer, "training_step", slow_step)
    monkeypatch.setattr("freeexport.training.trainer.oracle_exits", slow_evaluation)


@pytest.mark.parametrize(("limit", "steps"), [(50.0, 29), (5.0, 1)])  # one evaluation uses up the second
def test_time_limit_includes_the_final_evaluation(
    limit: float, steps: int, checkpoint: Directory, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_time(monkeypatch)
    run = run_options(words, steps=None, time_limit=limit, evaluate_every=10_000)
    result = train(str(checkpoint(LLAMA)), tmp_path / "out", run)
    assert result.seconds == 600 + steps * 60 + 600
    assert result.best_step == result.steps == steps
    assert logged(tmp_path / "out", "learning_rate")[-1] < 1e-5  # the schedule ended with the time
    assert logged(tmp_path / "out", "eval_oracle_exits") == [0.5, 0.5]


def test_run_limited_only_by_time_is_evaluated_at_each_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in ("trainer", "report"):
        monkeypatch.setattr(f"freeexport.training.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    for every, evaluated in ((None, [10, 20, 30, 40, 50, 60, 70, 80, 90, 99]), (7, [99])):
        watch = report.Watch(Clock(1000.0, now[0]), None)
        watch._clock._start = now[0]
        watch.trainer = SimpleNamespace(options=SimpleNamespace(evaluate_every=every), tokens_seen=0)
        state = SimpleNamespace(max_steps=10**9, global_step=0)
        watch.on_train_begin(None, state, None)
        found: list[int] = []
        control = SimpleNamespace(should_training_stop=False)
        while not control.should_training_stop:
            control.should_evaluate = False
            watch.on_step_begin(None, state, control)
            now[0] += 10.0
            state.global_step += 1
            watch.on_step_end(None, state, control)
            if control.should_evaluate:
                found.append(state.global_step)
        assert found == evaluated


def test_plan_counts_the_steps_that_fit_in_the_time() -> None:
    clock = Clock(600.0)
    clock.evaluation, clock.saving = 8.0, 2.0
    [line] = report.plan(clock, 10**9, 5, 1.0, 3000.0, 90.0, 50)
    # (600 - 10) seconds of steps that take 1 and a fiftieth of a pause of 10 each.
    assert line == "plan: 496 steps, about 10 min more at 3,000 tokens/s; 5.5 passes over the data"
    line, warning = report.plan(clock, 40, 5, 1.0, 3000.0, 90.0, 50)
    assert line.startswith("plan: 40 steps, about 52 s more")
    assert "hardly learns in 40 steps" in warning
    assert warning.endswith("more --steps or --epochs")
    assert report.plan(clock, 10**9, 5, 60.0, 50.0, 90.0, 50)[1].endswith("or a smaller --batch-tokens")


def test_plan_and_first_evaluation_are_printed_before_the_first_step(
    checkpoint: Directory, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(str(checkpoint(LLAMA)), tmp_path / "out", run_options(words, steps=6, evaluate_every=6))
    lines = [line for line in capsys.readouterr().err.splitlines() if "give --bf16" not in line]
    assert lines[0].startswith("the exit after layer 2 of 5 pays once")
    assert lines[1].startswith("step 0: shallow loss")
    assert lines[2].startswith("plan: 6 steps")
    assert lines[3].startswith("warning: an exit hardly learns in 6 steps")
    [said] = (line for line in lines if line.startswith("step 6: "))
    assert re.sub(r"[\d.]+", "#", said) == "step #: shallow loss #, agreement #, oracle exits #, deep loss #"


def test_run_without_an_exit_reports_the_loss_of_the_whole_model(
    checkpoint: Directory, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(str(checkpoint(LLAMA)), tmp_path / "out", run_options(words, steps=1, evaluate_every=1, loss="deep-ce"))
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+$", "#", line) for line in lines if ": deep loss" in line] == [
        "step 0: deep loss #",
        "step 1: deep loss #",
    ]
    assert not any("exit after layer" in line for line in lines)


def measures(agreement: float, exits: float, deep_loss: float = 1.0) -> dict[str, float]:
    return {"eval_agreement": agreement, "eval_oracle_exits": exits, "eval_deep_loss": deep_loss}


@pytest.mark.parametrize(
    ("before", "after", "costs", "said"),
    [
        (measures(0.3, 0.0), measures(0.9, 0.7), COSTS, "verdict: the exit can pay: up to 1."),
        ({}, measures(0.9, 0.7), COSTS, "verdict: the exit can pay: up to 1."),
        (measures(0.3, 0.0), measures(0.5, 0.1), COSTS, "verdict: the exit does not pay yet: 10.0% of the tokens"),
        (measures(0.6, 0.2), measures(0.6, 0.2), COSTS, "verdict: training made no better exit"),
        (measures(0.3, 0.0), measures(0.9, 0.9), Costs(9.0, 1.0, {1: 3.0, 8: 4.0}), "verdict: the exit cannot pay"),
    ],
)
def test_verdict_states_whether_the_exit_pays(
    before: dict[str, float], after: dict[str, float], costs: Costs, said: str
) -> None:
    lines = report.training_verdict(before, after, costs)
    assert len(lines) == 2
    assert "oracle exits" in lines[0]
    assert "by a threshold chosen on these tokens" in lines[0]
    assert lines[1].startswith(said)


def test_increased_model_loss_is_a_warning() -> None:
    lines = report.training_verdict(measures(0.3, 0.0, 1.0), measures(0.9, 0.7, 1.3), COSTS)
    assert lines[1].startswith("warning: the whole model's loss rose from 1.000 to 1.300; lower --learning-rate")


WORSE = {"evaluate_every": 1, "learning_rate": 0.5, "schedule": "hold", "warmup": 0.0}


@pytest.fixture
def good(run: Runs) -> str:
    """A model that does its task better than before."""
    return str(run(LLAMA, steps=30, evaluate_every=30, learning_rate=3e-3).out)


def test_training_that_only_gets_worse_keeps_the_initial_weights(good: str, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(good, out, run_options(words, steps=50, patience=2, **WORSE))
    assert result.steps < 50
    assert result.best_step == 0
    assert result.metrics == result.before
    assert min(logged(out, "eval_loss")) == result.metrics["eval_loss"]
    assert result.verdict[-1].startswith("kept: the weights from before training")
    # The written weights are those, not the last.
    written, given = tensors(out), tensors(Path(good))
    assert all(np.array_equal(written[name], given[name]) for name in given)


def test_best_evaluation_is_kept(run: Runs, words: Path, tmp_path: Path) -> None:
    out, result = run(LLAMA, steps=6, evaluate_every=2, learning_rate=1e-3)
    evaluated = logged(out, "eval_loss")
    assert result.metrics["eval_loss"] == min(evaluated) < evaluated[0]
    assert result.best_step == 2 * evaluated.index(min(evaluated))
    again = replace(run_options(words), steps=1, evaluate_every=1)
    assert train(str(out), tmp_path / "again", again).before["eval_loss"] == pytest.approx(min(evaluated), rel=1e-4)


def test_run_stops_when_the_loss_of_the_whole_model_rises(
    good: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = run_options(words, steps=50, patience=0, loss="deep-ce", **WORSE)
    result = train(good, tmp_path / "out", given)
    assert 2 <= result.steps < 50
    assert result.best_step == 0
    assert "stopped: the whole model's loss rose at 2 evaluations in a row" in capsys.readouterr().err
    assert result.verdict == ("kept: the weights from before training, as no evaluation was better by loss",)


def test_exit_replaced_by_another_is_named(
    good: str, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(good, tmp_path / "out", run_options(words, steps=1, exit_layer=1))
    assert "was trained for an exit after layer 2; OUT has another, after layer 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        ([0.1], False),
        ([0.1, 0.2], False),
        ([0.1, 0.2, 0.3], True),
        ([0.1, 0.3, 0.2], False),  # it recovers
        ([0.5, 0.1, 0.1005, 0.101], False),  # noise
        ([0.5, 0.1, 0.11, 0.12], True),
        ([0.5, 0.5, 0.5], False),
    ],
)
def test_two_rises_in_a_row_count_as_rising(losses: list[float], rises: bool) -> None:
    assert report.rising(losses) == rises
