"""The script for a first hour with a GPU: its steps on a stand-in and on the CPU, and its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import BY_NAME, Case
from click.testing import CliRunner
from fake_device import Machine

from runtime import GenerationResult, Session
from runtime.errors import EngineError, FreeExportError, OptionError
from tools.gpu import prove, prove_commands, prove_speed, prove_steps
from tools.gpu.prove_context import METHODS, StepContext
from tools.gpu.prove_report import CPU_NOTE, report_text

LLAMA = BY_NAME["llama-tied"]
Directory = Callable[[Case], Path]


@pytest.fixture(scope="module")
def converted(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> StepContext:
    """A model converted for CUDA in fp16, by the step for it."""
    work = tmp_path_factory.mktemp("work")
    context = StepContext("cpu", str(work), str(checkpoint(LLAMA)), 8, 1, exit_layer=2, precision="fp16")
    outcome = prove_steps.conversion(context)
    assert outcome.state == "done"
    assert "0 nodes without a CUDA kernel" in outcome.line
    return context


@pytest.fixture
def on_gpu(converted: StepContext, monkeypatch: pytest.MonkeyPatch) -> StepContext:
    """The same bundle on a stand-in of a GPU."""
    Machine(monkeypatch, seed=5)
    return replace(converted, device="cuda:0")


@pytest.mark.slow
def test_modes_and_batches_are_compared_on_the_device(on_gpu: StepContext) -> None:
    outcome = prove_steps.modes(on_gpu)
    assert outcome.state == "done", outcome.line
    assert outcome.values["noise"]["positions"] > 0
    assert {"lossless, both drafts", "full, batch 4", "rollback"} <= {row[0] for row in outcome.rows}
    assert set(outcome.values["exit_rates"]) == set(METHODS)
    json.dumps(outcome.values, allow_nan=False)


def test_device_may_differ_from_the_cpu_only_at_ties(on_gpu: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = prove_steps.against_cpu(on_gpu)
    assert outcome.state == "done", outcome.line
    assert [row[0] for row in outcome.rows] == ["full", "shallow", "free at 0.5: exits"]
    assert outcome.rows[0][1] == 8 * 4
    json.dumps(outcome.values, allow_nan=False)
    # A device that ignores the last token of a prompt.
    generate = Session.generate

    def wrong(self: Session, prompt: list[int], **options: Any) -> GenerationResult:
        cut = prompt[:-1] if self._state.options.device != "cpu" else prompt
        return generate(self, cut, **options)

    monkeypatch.setattr(Session, "generate", wrong)
    outcome = prove_steps.against_cpu(on_gpu)
    assert outcome.state == "failed"
    assert "nats apart" in outcome.line or "cannot explain" in outcome.line or "no first token" in outcome.line


def test_exit_may_differ_if_the_confidence_is_near_the_threshold() -> None:
    def result(*confidence: float) -> Any:
        ids = tuple(range(len(confidence)))
        exited = tuple(one > 0.5 for one in confidence)
        return SimpleNamespace(token_ids=ids, exited=exited, confidence=confidence)

    moved, faults = prove_steps._other_exits([result(0.9, 0.501)], [result(0.89, 0.499)])
    assert (round(moved, 3), faults) == (0.01, 0)
    assert prove_steps._other_exits([result(0.9, 0.6)], [result(0.89, 0.3)])[1] == 1


@pytest.mark.slow
def test_step_is_trained_checkpoint_calibrated_and_rows_compared(converted: StepContext, tmp_path: Path) -> None:
    context = replace(converted, work=str(tmp_path))
    outcome = prove_commands.training(context)
    assert outcome.line.startswith("a step; calibrated checkpoint: threshold ")
    outcome = prove_commands.comparison(context)
    assert {row[1] for row in outcome.rows} >= {"full", "eager", "published 0.9", "eager-free 0.9"}


def test_sessions_may_differ_only_at_ties(on_gpu: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = prove_speed.session_options(on_gpu)
    assert outcome.state == "done", outcome.line
    assert [row[0] for row in outcome.rows] == list(prove_speed.SESSIONS)
    generate = Session.generate

    def wrong(self: Session, prompt: list[int], **options: Any) -> GenerationResult:
        cut = prompt if self._state.options.cuda_graphs else prompt[:-1]
        return generate(self, cut, **options)

    monkeypatch.setattr(Session, "generate", wrong)
    assert prove_speed.session_options(on_gpu).state == "failed"


def test_parity_passes_and_a_wrong_head_fails(converted: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = prove_steps.parity(converted)
    assert outcome.state == "done", outcome.line
    assert 0 < outcome.values["error"] <= outcome.values["limit"]
    shifted = prove_steps._log_probabilities
    monkeypatch.setattr(
        prove_steps,
        "_log_probabilities",
        lambda model, prompt, answer, start: shifted(model, prompt[::-1], answer, start),
    )
    assert prove_steps.parity(converted).state == "failed"


@pytest.mark.slow
def test_modes_are_measured_in_turn_with_eager_torch(converted: StepContext) -> None:
    outcome = prove_speed.speed(converted)
    assert "x eager PyTorch" in outcome.line
    assert [row[0] for row in outcome.rows] == [*METHODS, *prove_speed.SYNC_EVERY, prove_speed.EAGER]
    assert (outcome.rows[0][2], outcome.rows[-1][3]) == ("1.00x", "1.00x")


def test_tensorrt_does_not_apply_on_the_cpu(converted: StepContext) -> None:
    assert prove_speed.tensorrt(converted).state == "not applicable"


def test_machine_report_fails_where_a_gpu_has_no_provider(converted: StepContext) -> None:
    outcome = prove_steps.machine(converted)
    assert outcome.state == "done"
    assert ("CPUExecutionProvider", "usable") in outcome.rows
    assert prove_steps.machine(replace(converted, device="cuda:0")).state == "failed"
    json.dumps(outcome.values, allow_nan=False)


def test_failed_or_slow_step_is_recorded_and_the_report_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    base = StepContext("cpu", str(out), "m", 8, 1)
    report = prove.prove(base, ("machine", "parity"), minutes=0.0005)
    assert [entry["state"] for entry in report["steps"]] == ["timed out"] + ["not run"] * (len(report["steps"]) - 1)
    assert "more than the 0 s that were left" in report["steps"][0]["line"]
    assert report["steps"][1]["line"] == "the time was over; repeat the command to continue"
    context = replace(base, precision="fp16")
    broken = prove.run_step("no-such-step", context, limit=60)
    assert broken["line"] == "the conversion wrote no bundle"
    context.bundle.mkdir()
    broken = prove.run_step("no-such-step", context, limit=60)
    assert broken["state"] == "error"
    assert broken["line"] == "exit code 1: KeyError: 'no-such-step'"
    assert broken["last_lines"][0].startswith("Traceback")
    text = (out / prove.PAGE).read_text()
    assert CPU_NOTE in text
    assert "**machine**, timed out: more than the 0 s" in text
    values = json.loads(text[text.index("```json\n") + 8 : text.rindex("```")])
    assert values["complete"]
    assert values["commit"]
    report["steps"].append(broken)
    assert "KeyError" in report_text(report)


def test_interrupted_run_continues_with_the_remaining_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_step(name: str, context: StepContext, limit: float) -> dict[str, Any]:
        ran.append(name)
        state = "timed out" if ran.count(name) == 1 and name == "training" else "done"
        entry = {"precision": "", "step": name, "state": state, "line": "", "seconds": 0.0}
        return {**entry, "columns": (), "rows": [], "values": {}, "last_lines": []}

    monkeypatch.setattr(prove, "run_step", run_step)
    base = StepContext("cpu", str(tmp_path / "out"), "m", 8, 1)
    for _ in range(2):
        report = prove.prove(base, ("machine", "training"), minutes=1)
    assert ran == ["machine", "training", "training"]
    assert [entry["state"] for entry in report["steps"]] == ["done", "done"]
    with pytest.raises(OptionError, match="other tokens"):
        prove.prove(replace(base, tokens=9), ("machine",), minutes=1)


def test_bundles_are_converted_once_and_important_steps_come_first() -> None:
    base = StepContext("cpu", "work", "m", 8, 1)
    found = [(name, one.precision) for name, one in prove.planned(base, tuple(prove_steps.STEPS))]
    assert found[:3] == [("machine", ""), ("conversion", "fp32"), ("against-cpu", "fp32")]
    assert len(found) == len(set(found))
    precisions = {precision for name, precision in found if name in ("against-cpu", "modes", "tensorrt")}
    assert precisions == {"fp32", "fp16", "bf16", "int8", "int4", "fp8"}
    assert {name for name, _ in found} == set(prove_steps.STEPS)
    chosen = [(name, one.precision) for name, one in prove.planned(base, ("sessions", "comparison"))]
    assert chosen == [("comparison", ""), ("conversion", "fp16"), ("sessions", "fp16")]


def test_invalid_options_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(prove.command, [str(argument) for argument in arguments])

    refused = invoke("--output", tmp_path / "out", "--device", "cuda:0")
    assert isinstance(refused.exception, EngineError)
    assert "needs ONNX Runtime with CUDA" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    missing = invoke("--output", tmp_path / "out", "--device", "cpu", "--model", tmp_path / "none").exception
    assert isinstance(missing, FreeExportError)
    assert not (tmp_path / "out").exists()
    assert "'modez' is no step" in invoke("--output", tmp_path / "out", "--steps", "modez").output
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("")
    assert "choose another directory" in str(invoke("--output", tmp_path / "out", "--device", "cpu").exception)


def test_bar_in_an_outcome_is_escaped_once() -> None:
    step = {"precision": "fp16", "step": "parity", "state": "done", "seconds": 1.0, "line": "a|b\nc"}
    step |= {"columns": ("one|two",), "rows": [["x|y"]], "last_lines": []}
    about = {"made": "today", "commit": "abc", "model": "m", "tokens": 8, "rounds": 1}
    given = {**about, "machine": {"processor": "p"}, "steps": [step], "complete": True, "device": "cpu"}
    text = report_text(given).partition("## Values")[0]
    assert "a\\|b c" in text
    assert "x\\|y" in text
    assert "\\\\" not in text
