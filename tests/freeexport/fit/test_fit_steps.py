"""Runs of `fit`: whole ones of tiny models, interrupted ones, and what they end with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import error, invoke, succeed
from killed_process import killed_before

from freeexport.fit import exit_choice, recipe
from freeexport.fit.fit_options import FitOptions
from freeexport.fit.recipe import conclude, fit, pending_steps, planned, run_of, steps_of
from freeexport.system import steps
from freeexport.system.child import ChildError
from freeexport.system.output import OutputError
from runtime import Bundle, Session
from runtime.errors import FreeExportError, OptionError

Options = Callable[..., FitOptions]
ORDER = ["given", "joint", "exit", "trained", "calibrate", "evaluate"]


def run_here(module: str, *arguments: str, **shown: Any) -> str:
    """Run a command in this process."""
    result = invoke(*arguments)
    if result.exit_code:
        raise ChildError(result.stderr)
    return result.stdout


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(recipe, "run_child", run_here)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("llama-tied", "feature"),
        pytest.param("llama-tied", "state", marks=pytest.mark.slow),
        pytest.param("t5-deep-decoder", "feature", marks=pytest.mark.slow),
    ],
)
def test_run_ends_with_a_bundle_a_report_and_a_summary(
    name: str, reads: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reads == "feature":
        monkeypatch.setattr(exit_choice, "FEATURE_RATES", dict.fromkeys(exit_choice.FEATURE_RATES, 0.99))
    given = options(name, quality=0.5)
    verdict = fit(given, planned(given, keep=True))
    assert re.search(r"\d\.\d\dx a request .*95 %: .* 100 lines", verdict.text)
    assert verdict.next_step.startswith(f"freeexport serve {given.out}")
    page = (given.out.with_name("out.report") / "report.html").read_text()
    assert f"{name}, fitted to task.jsonl" in page
    for step in steps_of(given, planned(options(name, quality=0.5, overwrite=False), keep=False)):
        assert f"freeexport {step.arguments[0]} " in page
        assert step.name != "exit" or step.arguments[step.arguments.index("--exit-input") + 1] == reads
    assert Bundle.open(given.out, verify="full").manifest.verified
    with Session(given.out, threads=1, slots=1) as session:
        assert session.generate("abc", max_new_tokens=4).token_ids
    with pytest.raises(OutputError, match="exists; choose another path, or replace it with --overwrite"):
        planned(given, keep=True)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_existing_exit_competes_with_its_further_trained_version(with_exit: Options) -> None:
    given = with_exit(quality=0.5)
    verdict = fit(given, planned(given, keep=True))
    report = json.loads((given.report / "evaluation.json").read_text())
    methods = {(row["bundle"], row["method"]) for row in report["rows"]}
    assert methods == {
        (name, method) for name in ("given", "trained") for method in ("full", "static", "free", "lossless")
    }
    assert Bundle.open(given.work / "given").manifest.exit_trained
    assert Bundle.open(given.work / "given").calibration is not None
    assert Bundle.open(given.out).manifest.exit_layer == 2
    assert verdict.next_step.startswith(f"freeexport serve {given.out}")


@pytest.mark.usefixtures("here")
def test_without_data_the_model_is_converted_unchanged(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(data=None)
    verdict = fit(given, planned(given, keep=True))
    said = "there are no data to train an exit on; mode lossless: the tokens of mode full, with drafts from the text: "
    assert verdict.text.startswith(said)
    assert re.search(r": (lossless|nothing) is (the fastest|faster than full).* on built-in prompts", verdict.text)
    assert "verified: yes" in capsys.readouterr().out
    assert verdict.next_step == f"freeexport serve {given.out}"
    assert Bundle.open(given.out).manifest.verified
    assert not given.out.with_name("out.work").exists()


class Stop(Exception):
    """The steps are done."""


def stop(options: Any) -> None:
    raise Stop


def pretended(log: Path) -> Callable[..., str]:
    """Commands that write nothing but their output's name, and a line in the log."""

    def run(module: str, *arguments: str, **shown: Any) -> str:
        with log.open("a") as file:
            file.write(json.dumps(arguments) + "\n")
        if arguments[0] in ("train", "convert"):
            Path(arguments[2]).mkdir()
        return ""

    return run


def test_killed_run_continues_without_repeating_training(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, log = options(), tmp_path / "log"

    monkeypatch.setattr(recipe, "run_child", pretended(log))
    monkeypatch.setattr(recipe, "evaluate", stop)

    def work() -> None:
        try:
            fit(given, planned(given, keep=True))
        except Stop:
            return

    wanted = [step.arguments for step in steps_of(given, planned(given, keep=True))]
    # A run is killed after a command and before its mark, the next one after a mark and before the next command.
    places: dict[Any, tuple[str, ...]] = {recipe: ("run_child",), steps: ("write_whole",)}
    assert [killed_before(change, places, work) for change in (1, 2) * 8].count(True) >= len(ORDER)
    made = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    assert list(dict.fromkeys(made)) == wanted
    assert [one for one in made if one[0] == "train"] == [one for one in wanted if one[0] == "train"]
    assert all(run_of(given).finished(name) for name in ("calibrate", "evaluate"))


def test_interrupted_training_is_resumed(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options()
    joint = steps_of(given, planned(given, keep=True))[1]
    assert recipe._resumed(joint) == joint.arguments
    monkeypatch.setattr(recipe, "last_checkpoint", lambda directory: directory / "checkpoint-1")
    assert recipe._resumed(joint) == (*joint.arguments, "--resume")


def test_changed_metric_recalibrates_and_reevaluates_without_training(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options()
    every = steps_of(given, planned(given, keep=True))
    monkeypatch.setattr(recipe, "run_child", pretended(tmp_path / "log"))
    monkeypatch.setattr(recipe, "evaluate", stop)
    assert [step.name for step in pending_steps(every, run_of(given))] == ORDER
    with pytest.raises(Stop):
        fit(given, planned(given, keep=True))
    assert pending_steps(every, run_of(given)) == []
    other = options(metric="exact")
    again = pending_steps(steps_of(other, planned(other, keep=True)), run_of(other))
    assert [step.name for step in again] == ["calibrate", "evaluate"]


@pytest.mark.parametrize("change", [{"budget": 100.0}, {"threads": 2}])
def test_run_with_other_options_is_not_mixed_with_an_earlier_one(options: Options, change: dict[str, Any]) -> None:
    planned(options(), keep=True)
    assert planned(options(**change), keep=False).seconds
    problem = f"holds another run, with other {next(iter(change))}; .* start anew with --overwrite"
    with pytest.raises(OptionError, match=problem):
        planned(options(**change), keep=True)
    assert planned(options(**change, overwrite=True), keep=True).seconds


def test_foreign_directory_is_not_replaced(options: Options) -> None:
    given = options(overwrite=True)
    for name in ("out", "out.work", "out.report"):
        place = given.out.with_name(name)
        place.mkdir()
        (place / "mine").touch()
        with pytest.raises(OutputError, match="was not written by this command"):
            planned(given, keep=True)
        (place / "mine").unlink()
        place.rmdir()


def test_failed_step_says_that_the_run_can_continue(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: str, **shown: Any) -> str:
        raise ChildError("disk full while writing out; free some space and run again")

    monkeypatch.setattr(recipe, "run_child", full)
    given = options()
    with pytest.raises(FreeExportError, match=r"given failed: disk full .* give the same command again to go on"):
        fit(given, planned(given, keep=True))


def row(
    bundle: str, method: str, value: float = 0.8, speed: float = 1.0, low: float = 0.99, support: float = 250.0,
    **more: Any,
) -> Any:  # fmt: skip
    scores = {"value": value, "relative": 1.0, "low": low, "high": 1.0, "support": support}
    return {"bundle": bundle, "method": method, "calibrated": False, "lines": 312, "same": 1.0,
            "request_speed": speed, "request_low": speed - 0.05, "request_high": speed + 0.05,
            "scores": {"chrf": scores}, **more}  # fmt: skip


FREE = {"calibrated": True, "same": 0.6}


@pytest.mark.parametrize(
    ("rows", "quality", "bundle", "text", "mode"),
    [
        (
            [row("trained", "full"), row("trained", "lossless", speed=2.04)],
            0.99, "trained", "2.04x a request with every token equal (95 %: 1.99 to 2.09, 312 lines)",
            " --mode lossless",
        ),
        (
            [row("trained", "full"), row("trained", "lossless", speed=1.5), row("trained", "free", speed=2.0, **FREE)],
            0.99, "trained", "2.00x a request at 100.0 % of the full model's chrf (99.0 to 100.0) (95 %: ", "",
        ),
        (  # FREE keeps too little, and a threshold that was not calibrated is no candidate
            [row("trained", "full"), row("trained", "lossless", speed=1.5),
             row("trained", "free", speed=3.0, low=0.9, **FREE), row("trained", "free", speed=2.5)],
            0.99, "trained", "1.50x a request with every token equal", " --mode lossless",
        ),
        (  # fast, but the model as it came does the task badly
            [row("trained", "full"), row("trained", "lossless", speed=1.5), row("given", "full", value=0.1),
             row("given", "lossless", value=0.1, speed=3.0)],
            0.99, "trained", "1.50x a request with every token equal", " --mode lossless",
        ),
        (  # training made the model worse
            [row("trained", "full", value=0.5), row("trained", "lossless", value=0.5, speed=3.0),
             row("given", "full"), row("given", "lossless", speed=1.2)],
            0.99, "given", "1.20x a request with every token equal", "",
        ),
        (
            [row("trained", "full"), row("trained", "lossless", speed=0.9)],
            0.99, "trained", "nothing is surely faster than the full model: of the settings that keep 99 % of the chrf "
            "of the trained model, the best gives 0.90x", " --mode full",
        ),
        (  # 3 lines of 312 are right, so that the interval of free says nothing
            [row("trained", "full", value=0.01, support=3),
             row("trained", "lossless", value=0.01, speed=1.5, support=3),
             row("trained", "free", value=0.01, speed=2.0, low=1.0, support=3, **FREE)],
            0.99, "trained", "1.50x a request with every token equal (95 %: 1.45 to 1.55, 312 lines); no verdict on "
            "quality: chrf of the full model rests on 3 of 312 lines, too few to see a loss of 1 %", " --mode lossless",
        ),
        (
            [row("trained", "full", support=3), row("trained", "lossless", speed=0.59, support=3)],
            0.99, "trained", "of the settings that keep every token of the trained model, the best gives 0.59x",
            " --mode full",
        ),
    ],
    ids=["lossless", "free", "free loses quality", "worse as it came", "worse trained", "loss", "few", "few, loss"],
)  # fmt: skip
def test_summary_and_command_are_of_the_fastest_acceptable_setting(
    rows: Sequence[Any], quality: float | None, bundle: str, text: str, mode: str, options: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    threshold = {"trained": 0.9, "given": 1.0}
    monkeypatch.setattr(
        recipe.Bundle, "open", lambda path: SimpleNamespace(manifest=SimpleNamespace(threshold=threshold[path.name]))
    )
    given = options(quality=quality)
    served, verdict = conclude(rows, given)
    assert served.name == bundle
    assert text in verdict.text
    assert verdict.next_step == f"freeexport serve {given.out}{mode}"
    assert verdict.level == ("neutral" if "the best gives" in text else "good")


def test_dry_run_prints_the_plan_and_stops(options: Options, tmp_path: Path) -> None:
    given = options()
    arguments = ["fit", given.model, str(given.out), "--data", str(given.data), "--metric", "chrf", "--budget", "1h30m"]
    result = succeed(*arguments, "--plan")
    assert "of 90 min" in result.stdout
    assert "expected, a request" in result.stdout
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_too_small_budget_prints_a_plan_and_starts_nothing(options: Options, tmp_path: Path) -> None:
    given = options()
    arguments = ["fit", given.model, str(given.out), "--data", str(given.data), "--metric", "chrf"]
    assert "missing " in succeed(*arguments, "--budget", "60s", "--plan").stdout
    result = invoke(*arguments, "--budget", "60s")
    assert "expected, a request" in result.stdout
    needed = re.search(r"give --budget (\d+min) or more", error(result))
    assert needed is not None
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())
    for budget in (needed[1], needed[1].replace("min", " min")):
        assert "missing " not in succeed(*arguments, "--budget", budget, "--plan").stdout


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--metric", "chrf", "--quality", "0.9", "--lossless"], "are mutually exclusive"),
        ([], "--metric is missing"),
        (["--metric", "chrf", "--budget", "two hours"], "'two hours' is not a duration"),
        (["--metric", "chrf", "--budget", "2h x"], "'2h x' is not a duration"),
    ],
)
def test_unparsable_options_are_refused(more: list[str], problem: str, options: Options) -> None:
    given = options()
    result = invoke("fit", given.model, given.out, "--data", given.data, *more)
    assert result.exit_code == 2
    assert problem in result.stderr
