from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, Case
from click.testing import CliRunner, Result
from command_errors import error
from hypothesis import given
from hypothesis import strategies as st

from freeexport.cli import main
from freeexport.measure.layers import Evaluation
from freeexport.measure.layers_report import NO_EXIT, Curve, Exit, LayersOptions, LayersReport, draw, exit_of
from graphs.step_costs import StepCosts

BY_NAME = {case.name: case for case in CASES}
LINES = [
    {"input": "one two three", "target": "abcdef"},
    {"input": "four", "target": "ghij"},
    {"input": "x", "target": "klm"},
]
Directory = Callable[[Case], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(model: Path | str, data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", str(model), "--layers", "--data", str(data), *arguments])


def as_json(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("name", ["t5-deep-decoder", "llama-tied"])
def test_the_report_has_every_layer_but_the_last(name: str, checkpoint: Directory, data: Path) -> None:
    report = as_json(checkpoint(BY_NAME[name]), data, "--max-new-tokens", "5")
    assert [one["exit_layer"] for one in report["exits"]] == list(range(1, BY_NAME[name].layers))
    # The model's own output is what it predicts: its accuracy would say nothing.
    assert report["deep_accuracy"] is None
    assert report["examples"] == 3
    assert 0 < report["tokens"] <= 3 * 5
    for one in report["exits"]:
        assert one["at"]["0.99"]["exit_rate"] <= one["at"]["0.95"]["exit_rate"] <= one["at"]["0.9"]["exit_rate"]
        assert one["chosen"] == one["at"]["0.99"]
        assert one["accuracy"] is None
        assert one["exit_rate"]["value"] == pytest.approx(one["chosen"]["exit_rate"])
        assert one["exit_rate"]["low"] <= one["exit_rate"]["value"] <= one["exit_rate"]["high"]


@pytest.mark.parametrize("name", ["t5-deep-decoder", "llama-tied"])
def test_a_checkpoint_can_run_in_bfloat16(name: str, checkpoint: Directory, data: Path) -> None:
    path = checkpoint(BY_NAME[name])
    exact, rough = (as_json(path, data, "--on", "targets", "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    assert rough["tokens"] == exact["tokens"]
    confidences = [[one["chosen"]["threshold"] for one in report["exits"]] for report in (exact, rough)]
    assert confidences[0] != confidences[1]


@pytest.mark.parametrize(
    ("device", "problem"),
    [("cuda:999", "device cuda:999 is not there: torch"), ("tpu", "device is 'tpu'; choose 'cpu', or 'cuda:0'")],
)
def test_a_device_that_is_not_there_is_named(device: str, problem: str, checkpoint: Directory, data: Path) -> None:
    assert problem in error(run(checkpoint(BY_NAME["llama-tied"]), data, "--device", device))


def test_targets_are_forced_on_request(checkpoint: Directory, data: Path) -> None:
    report = as_json(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets")
    # One token a byte and one for the end, without the first of each.
    assert report["tokens"] == 6 + 4 + 3
    assert report["deep_accuracy"] < 1


def test_samples_limit_the_lines(checkpoint: Directory, data: Path) -> None:
    report = as_json(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets", "--samples", "2")
    assert (report["examples"], report["tokens"]) == (2, 6 + 4)


def test_the_page_recommends_or_says_why_not(checkpoint: Directory, data: Path) -> None:
    result = run(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets", "--agreement", "0")
    assert result.exit_code == 0, result.output
    assert "pays: " in result.stdout
    assert "the exit after layer 1 of 5: above threshold" in result.stdout
    assert "95% interval" in result.stdout
    assert "MB of weights, not measured" in result.stdout
    assert "accuracy of all layers" in result.stdout


def test_the_page_does_not_compare_the_model_with_itself(checkpoint: Directory, data: Path) -> None:
    result = run(checkpoint(BY_NAME["llama-tied"]), data, "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    assert "accuracy" not in result.stdout
    assert "verdict on the best layer" in result.stdout


def evaluation(agrees: list[bool]) -> Evaluation:
    deep, one = np.ones(len(agrees), np.int64), np.ones(len(agrees))
    confidence = np.stack([np.linspace(0.9, 0.1, len(agrees)), one]).astype(np.float32)
    return Evaluation(np.stack([np.where(agrees, 1, 2), deep]), confidence, deep, np.zeros(len(agrees), np.int64))


def test_an_exit_is_judged_at_the_agreement_asked_for() -> None:
    costs = StepCosts(layer=1, head=0, growth={1: 1, 16: 1}, measured=False)
    one = exit_of(evaluation([True] * 6 + [False] * 4), 1, costs, LayersOptions(agreement=0.8))
    assert one.agreement is not None
    assert one.agreement.value == 0.6
    assert one.point.exit_rate == 0.7
    assert one.at[0.99].exit_rate == 0.6
    assert one.speedup == pytest.approx(costs.at(1, 2).speedup(0.7, 16))
    assert one.break_even == costs.at(1, 2).break_even(16)


def test_a_bundles_measurements_replace_the_sizes(
    checkpoint: Directory, data: Path, bundle: Any, tmp_path: Path
) -> None:
    case = BY_NAME["llama-tied"]
    other = bundle(BY_NAME["llama-biases"])
    assert "layers, the checkpoint 5" in error(run(checkpoint(case), data, str(other)))
    assert "no measured costs" in error(run(checkpoint(case), data, str(bundle(case))))


def test_the_plot_is_a_picture(checkpoint: Directory, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "exits.png"
    result = run(checkpoint(BY_NAME["llama-tied"]), data, "--on", "targets", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "exits.png"}


def test_a_plot_without_matplotlib_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "freeexport[evaluate]" in error(run("missing", data, "--plot", str(tmp_path / "x.png")))


@pytest.mark.parametrize(("name", "message"), [("x.pdf", ".png"), ("none/x.png", "make it first")])
def test_a_plot_that_cannot_be_written_fails_before_the_work(
    name: str, message: str, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert message in error(run("missing", data, "--plot", str(tmp_path / name)))


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", (), "has no examples"),
        ('{"input": "a"}\nnonsense\n', (), "line 2: not JSON"),
        ('{"target": "a"}\n', (), "line 1: 'input' is missing"),
        ('{"input": "a"}\n', ("--on", "targets"), "line 1: 'target' is missing"),
        ('{"input": "a", "target": ""}\n', ("--on", "targets"), "no output has a second token"),
        (f'{{"input": "{"abcdefghijkl " * 50}", "target": "a"}}\n', (), "none of the 1 examples fits"),
    ],
)
def test_bad_data_is_named(
    text: str, arguments: tuple[str, ...], message: str, checkpoint: Directory, data: Path
) -> None:
    data.write_text(text)
    assert message in error(run(checkpoint(BY_NAME["llama-tied"]), data, *arguments))


def test_a_missing_file_is_named(checkpoint: Directory, tmp_path: Path) -> None:
    assert "nothing.jsonl" in error(run(checkpoint(BY_NAME["llama-tied"]), tmp_path / "nothing.jsonl"))


def test_an_unknown_way_to_force_is_a_usage_error(data: Path) -> None:
    assert run("model", data, "--on", "dreams").exit_code == 2


@pytest.mark.smollm2
@pytest.mark.slow
def test_a_gguf_file_is_evaluated(data: Path) -> None:
    from freeexport.checkpoints.checkpoint import smollm2

    report = as_json(smollm2(), data, "--samples", "1", "--max-new-tokens", "4")
    assert len(report["exits"]) == 29


TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12)


def arrays(tokens: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one for one, _ in tokens], np.float32), np.array([agrees for _, agrees in tokens])


@given(TOKENS)
def test_points_are_what_their_threshold_does(tokens: list[tuple[float, bool]]) -> None:
    confidence, agrees = arrays(tokens)
    curve = Curve.of(confidence, agrees)
    assert (np.diff(curve.exit_rate) > 0).all()
    for threshold, rate, agreement in zip(curve.threshold, curve.exit_rate, curve.agreement, strict=True):
        exits = confidence > threshold
        assert exits.mean() == pytest.approx(rate)
        assert agrees[exits].mean() == pytest.approx(agreement)


@given(TOKENS, st.sampled_from([0.5, 0.75, 1.0]))
def test_no_threshold_lets_more_tokens_exit_at_the_agreement(tokens: list[tuple[float, bool]], target: float) -> None:
    confidence, agrees = arrays(tokens)
    rates = [0.0]
    for threshold in (0.0, 0.05, 0.2, 0.4, 0.7, 0.95, 1.0):
        exits = confidence > threshold
        if exits.any() and agrees[exits].mean() >= target:
            rates.append(float(exits.mean()))
    assert Curve.of(confidence, agrees).at_agreement(target).exit_rate == pytest.approx(max(rates))


def test_nothing_exits_where_the_agreement_is_not_reached() -> None:
    assert Curve.of(np.array([0.9, 0.1]), np.array([False, True])).at_agreement(0.9) == NO_EXIT


def test_a_confidence_of_zero_never_exits() -> None:
    assert Curve.of(np.zeros(3), np.ones(3, bool)).at_agreement(0.9) == NO_EXIT
    assert list(Curve.of(np.zeros(3), np.ones(3, bool)).sampled(10)) == []


def test_sampling_keeps_the_last_point() -> None:
    curve = Curve.of(np.linspace(0.1, 0.9, 50), np.ones(50, bool))
    points = list(curve.sampled(7))
    assert len(points) == 7
    assert points[-1].exit_rate == 1
    assert len(list(curve.sampled(1000))) == 50


def report(*speeds: float) -> LayersReport:
    """Exits whose curves rise with depth, with these speeds."""
    random = np.random.default_rng(0)
    exits = []
    for layer, speed in enumerate(speeds, start=1):
        confidence = random.random(400)
        curve = Curve.of(confidence, random.random(400) < 0.2 + 0.8 * layer / len(speeds) * confidence)
        point = curve.at_agreement(0.99)
        exits.append(Exit(layer, None, 0.5, {}, point, speed, 0.3, curve))
    costs = StepCosts(layer=1, head=0, growth={1: 1, 16: 1}, measured=False)
    return LayersReport("g2p", len(speeds) + 1, 400, 20, LayersOptions(), 1.0, costs, tuple(exits))


def drawn(one: LayersReport) -> tuple[Any, Any]:
    pytest.importorskip("matplotlib")
    figure = draw(one)
    figure.canvas.draw()
    curves, speeds = figure.axes
    return curves, speeds


@pytest.mark.parametrize("layers", [1, 2, 7, 29])
def test_layers_are_counted_in_whole_numbers(layers: int) -> None:
    _, speeds = drawn(report(*np.linspace(0.9, 1.6, layers).tolist()))
    low, high = speeds.get_xlim()
    ticks = [tick for tick in speeds.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) and 1 <= tick <= layers for tick in ticks)


def test_bars_start_at_the_speed_of_mode_full_and_carry_their_values() -> None:
    _, speeds = drawn(report(0.8, 1.0, 1.55))
    assert [bar.get_y() for bar in speeds.patches] == [1, 1, 1]
    assert [bar.get_y() + bar.get_height() for bar in speeds.patches] == pytest.approx([0.8, 1.0, 1.55])
    assert [text.get_text() for text in speeds.texts] == ["0.80x", "1.00x", "1.55x"]
    low, high = speeds.get_ylim()
    assert low < 0.8
    assert high > 1.55


def test_layers_that_gain_nothing_leave_room_for_the_line_of_mode_full() -> None:
    _, speeds = drawn(report(0.9, 0.95))
    assert speeds.get_ylim()[1] > 1


def test_many_layers_have_no_values_over_each_other_and_few_curves() -> None:
    curves, speeds = drawn(report(*[1.1] * 29))
    assert len(speeds.patches) == 29
    assert not speeds.texts
    assert len(curves.lines) <= 13


def test_curves_differ_by_dashes_too_and_their_legend_is_beside_them() -> None:
    curves, _ = drawn(report(1.1, 1.2, 1.3))
    lines = curves.lines[:3]
    assert len({line.get_linestyle() for line in lines}) == 3
    assert curves.get_legend().get_window_extent().x0 > curves.get_window_extent().x1
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == ["layer 1", "layer 2", "layer 3", "99 % agree"]


def test_every_curve_is_inside_the_panel() -> None:
    curves, _ = drawn(report(1.1, 1.2, 1.3))
    bottom, top = curves.get_ylim()
    for line in curves.lines:
        values = np.asarray(line.get_ydata(), float)
        assert bottom >= values.max()
        assert values.min() >= top > 0
