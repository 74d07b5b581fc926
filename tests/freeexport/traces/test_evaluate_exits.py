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

from freeexport.cli import main
from freeexport.costs.per_layer import StepCosts
from freeexport.traces.compare_layers import Options, exit_of
from freeexport.traces.every_layer import Evaluation, Exits

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
    return CliRunner().invoke(main, ["evaluate-exits", str(model), "--data", str(data), *arguments])


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
    assert 0 < report["tokens"] <= 3 * 4
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
    deep = np.ones(len(agrees), np.int64)
    shallow = Exits(np.where(agrees, 1, 2), np.linspace(0.9, 0.1, len(agrees)).astype(np.float32))
    return Evaluation((shallow, Exits(deep, np.ones(len(agrees), np.float32))), deep)


def test_an_exit_is_judged_at_the_agreement_asked_for() -> None:
    costs = StepCosts(layer=1, head=0, growth={1: 1, 16: 1}, measured=False)
    one = exit_of(evaluation([True] * 6 + [False] * 4), 1, costs, Options(agreement=0.8))
    assert one.agreement == 0.6
    assert one.point.exit_rate == 0.7
    assert one.at[0.99].exit_rate == 0.6
    assert one.speedup == pytest.approx(costs.at(1, 2).speedup(0.7, 16))
    assert one.break_even == costs.at(1, 2).break_even(16)


def test_a_bundles_measurements_replace_the_sizes(
    checkpoint: Directory, data: Path, bundle: Any, tmp_path: Path
) -> None:
    case = BY_NAME["llama-tied"]
    other = bundle(BY_NAME["llama-biases"])
    assert "layers, the checkpoint 5" in error(run(checkpoint(case), data, "--bundle", str(other)))
    assert "no measured costs" in error(run(checkpoint(case), data, "--bundle", str(bundle(case))))


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
    assert "freeexport[bench]" in error(run("missing", data, "--plot", str(tmp_path / "x.png")))


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
        ('{"input": "abcdefghijkl", "target": "a"}\n', ("--max-tokens", "4"), "none of the 1 examples fits"),
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
    from freeexport.checkpoints.packaged_models import smollm2

    report = as_json(smollm2(), data, "--samples", "1", "--max-new-tokens", "4")
    assert len(report["exits"]) == 29
