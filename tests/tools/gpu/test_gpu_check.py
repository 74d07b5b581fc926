"""The check for machines with a card: here it says that there is none, and does the rest; its steps on a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES
from click.testing import CliRunner, Result
from fake_cuda import FakeCuda
from fake_onnxruntime import FakeOnnxRuntime

from tools.gpu import check as gpu_check
from tools.gpu import steps as gpu_steps

LLAMA = next(case for case in CASES if case.name == "llama-tied")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(gpu_check.main, [str(argument) for argument in arguments])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A machine with a card: a slow one."""
    cuda = FakeCuda(5)
    ort = FakeOnnxRuntime(cuda)
    monkeypatch.setattr("runtime.cuda.driver._import_runtime", lambda: cuda)
    for module in ("runtime.engines.onnx", "runtime.cuda.engine", "tools.gpu.check"):
        monkeypatch.setattr(f"{module}.import_onnxruntime", lambda: ort)
    return cuda


def test_without_a_card_it_says_so_and_does_what_is_left(checkpoint: Any, tmp_path: Path) -> None:
    arguments = ("--model", checkpoint(LLAMA), "--exit-layer", 1, "--tokens", 8, "--output", tmp_path / "report")
    result = run(*arguments, "--skip", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    states = {name: step["state"] for name, step in report["steps"].items()}
    assert report["card"] == "no card was found"
    assert states == {
        "environment": "done",
        "correctness": "done",
        "lanes": "not done",
        "timeline": "not done",
        "cpu": "skipped",
        "peers": "done",
    }
    assert report["steps"]["correctness"]["found"]["fp32"] == {"tokens": 1.0, "exits": 1.0}
    assert "on the CPU provider" in report["steps"]["correctness"]["found"]["where"]
    assert report["steps"]["lanes"]["why"] == report["why"]
    assert "card: no card was found" in (tmp_path / "report.md").read_text()


def test_steps_can_be_left_out_and_nothing_begins_when_time_is_over(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "LIMIT", -1)
    result = run("--model", checkpoint(LLAMA), "--exit-layer", 1, "--skip", "peers")
    assert result.exit_code == 0
    assert "## peers: skipped" in result.output
    assert "as asked" in result.output
    assert "-1 seconds were over" in result.output


def test_a_step_that_fails_does_not_end_the_others(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STEPS", {"broken": lambda bench: 1 / 0, "environment": gpu_steps.environment})
    result = run("--model", checkpoint(LLAMA), "--exit-layer", 1)
    assert result.exit_code == 1
    assert "## broken: failed" in result.output
    assert "ZeroDivisionError: division by zero" in result.output
    assert "## environment: done" in result.output


def test_the_cpu_is_no_card(checkpoint: Any) -> None:
    result = run("--model", checkpoint(LLAMA), "--device", "cpu")
    assert result.exit_code == 2
    assert "--device cpu is no card" in result.output


@pytest.mark.usefixtures("fake")
def test_steps_for_a_card_run_on_a_stand_in(checkpoint: Any, tmp_path: Path) -> None:
    assert gpu_check.usable("cuda:0") == ("cuda:0", "")
    bench = gpu_steps.Bench(checkpoint(LLAMA), tmp_path, 10, 1, "cuda:0")
    found = gpu_steps.correctness(bench)
    assert found["where"] == "cuda:0"
    assert found["fp32"] == {"tokens": 1.0, "exits": 1.0}
    rates = gpu_steps.lanes(bench)
    assert list(rates) == [f"overlap {a}, graphs {b}" for a in ("off", "on") for b in ("off", "on")]
    assert all(rate > 0 for each in rates.values() for rate in each.values())
    seen = gpu_steps.timeline(bench)
    assert seen["shallow steps"] >= 9
    assert seen["deep passes"] >= 1
    assert seen["milliseconds"]["step"] == 0.0  # the stand-in's clock says the same at all times
