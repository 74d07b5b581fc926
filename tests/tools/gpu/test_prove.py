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
from runtime.errors import EngineError, OptionError
from tools.gpu import prove, prove_commands, prove_speed, prove_steps
from tools.gpu.prove_context import METHODS, NotApplicable, StepContext
from tools.gpu.prove_report import CPU_NOTE, report_text

LLAMA = BY_NAME["llama-tied"]
Directory = Callable[[Case], Path]


@pytest.fixture(scope="module")
def converted(checkpoint: Directory, tmp_path_factory: pytest.TempPathFactory) -> StepContext:
    """A model converted for CUDA in fp16, by the step for it."""
    work = tmp_path_factory.mktemp("work")
    context = StepContext("cpu", str(work), 8, 1, str(checkpoint(LLAMA)), "llama", "fp16", exit_layer=2)
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
    assert outcome.values["train_seconds"] > 0
    assert outcome.line.startswith("a step in ")
    outcome = prove_commands.comparison(context)
    assert {row[1] for row in outcome.rows} >= {"full", "eager", "free 0.9", "eager-free 0.9"}


def test_graphs_and_overlap_do_not_change_tokens_and_calls_are_counted(on_gpu: StepContext) -> None:
    assert prove_speed.cuda_graphs(on_gpu).state == "done"
    outcome = prove_speed.overlap(on_gpu)
    assert outcome.state == "done", outcome.line
    assert [row[0] for row in outcome.rows] == ["one stream", "overlap"]
    assert outcome.values["clock"] == "CUDA events"
    assert outcome.values["shallow_steps"] >= 8
    assert outcome.values["deep_passes"] >= 1


@pytest.mark.slow
def test_sync_every_is_recommended_from_measurements(on_gpu: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = dict.fromkeys(("0", "1", "2", "4", "8"), 100.0)

    def measured(context: StepContext, session: Session, ways: dict[str, Any]) -> dict[str, float]:
        return dict(zip(ways, speeds.values(), strict=True))

    monkeypatch.setattr(prove_speed, "_speeds", measured)
    outcome = prove_speed.sync_every(on_gpu)
    assert outcome.line == "recommended: sync_every 4; 4 is 1.00x as fast as 1"
    assert len(outcome.rows) == 2
    speeds["1"] = 200.0
    assert prove_speed.sync_every(on_gpu).line == "recommended: sync_every 1; 4 is 0.50x as fast as 1"


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
def test_speed_is_relative_to_eager_torch_once_measured(converted: StepContext) -> None:
    assert "eager was not measured" in prove_speed.speed(converted).line
    assert prove_speed.eager(converted).values["tokens_per_second"] > 0
    outcome = prove_speed.speed(converted)
    assert "x eager PyTorch" in outcome.line
    assert outcome.rows[0][2] == "1.00x"


@pytest.mark.slow
def test_cpu_calls_are_timed_by_the_host_and_tensorrt_is_skipped(converted: StepContext) -> None:
    outcome = prove_speed.overlap(converted)
    assert outcome.values["clock"] == "the host's clock"
    assert outcome.values["deep_passes"] >= 1
    assert outcome.values["step_ms"] > 0
    assert "no effect" in prove_speed.sync_every(converted).line
    with pytest.raises(NotApplicable, match="for a GPU"):
        prove_speed.tensorrt(converted)


def test_failed_or_slow_step_is_recorded_and_the_report_written(tmp_path: Path) -> None:
    base = StepContext("cpu", "", 8, 1)
    out = tmp_path / "out"
    report = prove.prove(base, out, [Path("m")], ("providers", "conversion"), minutes=0.0005)
    assert [entry["state"] for entry in report["steps"]] == ["timed out"] + ["not run"] * (len(report["steps"]) - 1)
    assert "more than the 0 s that were left" in report["steps"][0]["line"]
    assert report["steps"][1]["line"] == "the time was over; repeat the command to continue"
    broken = prove.run_step("no-such-step", replace(base, work=str(tmp_path)), limit=60)
    assert broken["line"] == "the conversion wrote no bundle"
    (tmp_path / "m-fp16").mkdir()
    context = replace(base, model="m", name="m", precision="fp16", work=str(tmp_path))
    broken = prove.run_step("no-such-step", context, limit=60)
    assert broken["state"] == "error"
    assert broken["line"] == "exit code 1: KeyError: 'no-such-step'"
    assert broken["last_lines"][0].startswith("Traceback")
    text = (out / prove.PAGE).read_text()
    assert CPU_NOTE in text
    assert "**providers**, timed out: more than the 0 s" in text
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
        entry = {"model": "m", "precision": "", "step": name, "state": state, "line": "", "seconds": 0.0}
        return {**entry, "columns": (), "rows": [], "values": {}, "last_lines": []}

    monkeypatch.setattr(prove, "run_step", run_step)
    base = StepContext("cpu", "", 8, 1)
    for _ in range(2):
        report = prove.prove(base, tmp_path / "out", [Path("m")], ("providers", "training"), minutes=1)
    assert ran == ["providers", "training", "training"]
    assert [entry["state"] for entry in report["steps"]] == ["done", "done"]
    with pytest.raises(OptionError, match="other tokens"):
        prove.prove(replace(base, tokens=9), tmp_path / "out", [Path("m")], ("providers",), minutes=1)


def test_bundles_are_converted_once_and_important_steps_come_first() -> None:
    base = StepContext("cpu", "work", 8, 1)
    models = [Path("a/m.1"), Path("a/n.2")]
    found = [(name, one.name, one.precision) for name, one in prove.planned(base, models, tuple(prove_steps.STEPS))]
    assert found[:2] == [("environment", "", ""), ("providers", "", "")]
    assert found[2:4] == [("conversion", "m.1", "fp32"), ("against-cpu", "m.1", "fp32")]
    assert len(found) == len(set(found))
    precisions = {precision for name, _, precision in found if name in ("against-cpu", "modes", "tensorrt")}
    assert precisions == {"fp32", "fp16", "bf16", "int8", "int4", "fp8"}
    assert {name for name, *_ in found} == set(prove_steps.STEPS)
    chosen = [(name, one.precision) for name, one in prove.planned(base, models[:1], ("overlap", "comparison"))]
    assert chosen == [("comparison", ""), ("conversion", "fp16"), ("overlap", "fp16")]


def test_invalid_options_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(prove.command, [str(argument) for argument in arguments])

    refused = invoke("--output", tmp_path / "out", "--device", "cuda:0")
    assert isinstance(refused.exception, EngineError)
    assert "needs ONNX Runtime with CUDA" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    assert "'modez' is no step" in invoke("--output", tmp_path / "out", "--steps", "modez").output
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("")
    assert "choose another --output" in str(invoke("--output", tmp_path / "out", "--device", "cpu").exception)


def test_bar_in_an_outcome_is_escaped_once() -> None:
    step = {"model": "m", "precision": "fp16", "step": "parity", "state": "done", "seconds": 1.0, "line": "a|b\nc"}
    step |= {"columns": ("one|two",), "rows": [["x|y"]], "last_lines": []}
    about = {"made": "today", "commit": "abc", "models": ["m"], "tokens": 8, "rounds": 1}
    given = {**about, "machine": {"processor": "p"}, "steps": [step], "complete": True, "device": "cpu"}
    text = report_text(given).partition("## Values")[0]
    assert "a\\|b c" in text
    assert "x\\|y" in text
    assert "\\\\" not in text
