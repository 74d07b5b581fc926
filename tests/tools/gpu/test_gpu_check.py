"""The check for machines with a card: here it says that there is none, and does the rest; its steps on a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME
from click.testing import CliRunner, Result
from fake_device import Machine

from tools.gpu import check

LLAMA = BY_NAME["llama-tied"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(check.main, [str(argument) for argument in arguments])


def test_without_a_card_it_says_so_and_does_what_is_left(checkpoint: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run("--model", checkpoint(LLAMA), "--exit-layer", 1, "--tokens", 8, "--output", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["card"] == "no card was found"
    states = {name: step["state"] for name, step in report["steps"].items()}
    assert states == {"environment": "done", "correctness": "done", "lanes": "not done", "timeline": "not done"}
    assert report["steps"]["correctness"]["found"]["fp32"] == {"tokens": 1.0, "exits": 1.0}
    assert "on the CPU provider" in report["steps"]["correctness"]["found"]["where"]
    assert report["steps"]["lanes"]["why"] == report["why"]


def test_the_cpu_is_no_card(checkpoint: Any) -> None:
    result = run("--model", checkpoint(LLAMA), "--device", "cpu")
    assert result.exit_code == 2
    assert "--device cpu is not a GPU" in result.output


def test_steps_for_a_card_run_on_a_stand_in(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, seed=5)
    monkeypatch.setattr(check, "import_onnxruntime", lambda: machine.onnxruntime)
    assert check.usable("cuda:0") == ("cuda:0", "")
    bench = check.Bench(checkpoint(LLAMA), tmp_path, 10, 1, "cuda:0")
    found = check.correctness(bench)
    assert found["where"] == "cuda:0"
    assert found["fp32"] == {"tokens": 1.0, "exits": 1.0}
    first, *_, last = check.LANES.items()
    monkeypatch.setattr(check, "LANES", dict((first, last)))
    rates = check.lanes(bench)
    assert list(rates) == [*check.LANES, "cpu, fp32"]
    assert all(rate > 0 for each in rates.values() for rate in each.values())
    seen = check.timeline(bench)
    assert seen["shallow steps"] >= 9
    assert seen["deep passes"] >= 1
    assert seen["milliseconds"]["step"] == 0.0  # the stand-in's clock says the same at all times
