from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CASES, Case
from click.testing import CliRunner, Result
from command_errors import error
from conftest import TEXTS, Bundles
from traces import trace

from freeexport.calibration import open_source
from freeexport.calibration import report as calibration_report
from freeexport.calibration import source as calibration_source
from freeexport.calibration.calibrate import check_enough
from freeexport.calibration.options import CalibrateOptions
from freeexport.calibration.source import CheckpointSource, check_unknown
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.cli import main
from freeexport.costs.forced_exits import ForcedExitSession
from freeexport.costs.measured import measured_costs
from freeexport.system.jsonl import Request
from freeexport.traces.from_bundle import trace_of
from freeexport.traces.trace import Trace, Traces
from runtime import Bundle, Session
from runtime.adaptation.adaptive_threshold import RequestLabels
from runtime.bundle.calibration import read_calibration
from runtime.decoding import loops as decode
from runtime.decoding.response import Response
from runtime.decoding.slot_call import alone
from runtime.errors import CalibrationError

BY_NAME = {case.name: case for case in CASES}
T5, LLAMA = BY_NAME["t5-deep-decoder"], BY_NAME["llama-tied"]
MEASURES = ("softmax", "max-prob", "entropy")
Directory = Callable[[Case], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_source, "measured_costs", partial(measured_costs, rounds=1, seconds=0.1))
    monkeypatch.setattr(open_source, "cores_in_use", lambda: 0.0)


@pytest.fixture
def own(tmp_path: Path, bundle: Bundles) -> Callable[..., Path]:
    """A bundle of a case that the test may change."""

    def copied(case: Case, exit_layer: int = 1, **options: Any) -> Path:
        return Path(shutil.copytree(bundle(case, exit_layer, **options), tmp_path / "bundle"))

    return copied


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def calibrated(*arguments: Any) -> dict[str, Any]:
    result = run("calibrate", *arguments, "--max-new-tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_checkpoint_and_its_bundle_give_the_same_traces(
    case: Case, measure: Any, checkpoint: Directory, bundle: Bundles
) -> None:
    requests = [Request(number, text) for number, text in enumerate(TEXTS[:6], start=1)]
    options = CalibrateOptions(confidence=measure, exit_layer=1, batch_size=4)
    torch_traces = list(CheckpointSource(open_checkpoint(str(checkpoint(case))), options).traces(requests, 9))
    with ForcedExitSession(bundle(case, confidence=measure), slots=1) as session:
        ours = list(calibration_source.BundleSource(session.bundle.path, session).traces(requests, 9))
    for mine, theirs in zip(ours, torch_traces, strict=True):
        assert mine.line == theirs.line
        np.testing.assert_allclose(mine.confidence, theirs.confidence, atol=2e-4)
        np.testing.assert_array_equal(mine.agrees, theirs.agrees)
        np.testing.assert_allclose(mine.nll, theirs.nll, atol=2e-3)


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_a_trace_is_what_decoding_sees_at_each_token(case: Case, bundle: Bundles) -> None:
    with Session(bundle(case), slots=1) as session:
        prompt = np.array(session.tokenizer.encode("one two three"), np.int64)  # type: ignore[union-attr]
        trace = trace_of(session, 1, prompt, 15)
        full = session.generate(prompt, mode="full", max_new_tokens=15).token_ids
        labels = RequestLabels(1.0, learns=True, audits=False)
        with session.decoder(prompt) as decoder:
            start = np.array([session.manifest.decoder_start_token_id or 0]) if case is T5 else prompt
            output = Response(start, 15)
            tokens = []
            if case is T5:
                decoder.begin(exits=True)
            else:
                tokens = [output.add(decoder.prefill(start, head=True).token, False, None).id]
            loop = alone(decode.free(decoder, output, 1.0, 4, labels=labels))
            tokens += [step.id for step in islice(loop, len(full) - len(tokens))]
    assert tokens == list(full)
    assert len(trace) == len(full) - (case is LLAMA)
    assert labels.labelled == [(float(c), bool(a)) for c, a in zip(trace.confidence, trace.agrees, strict=True)]
    # What the deep decoder chose itself has the highest probability: at most ln V nats.
    assert (trace.nll[trace.agrees] <= np.log(session.manifest.vocab_size) + 1e-4).all()


def test_a_bundle_is_updated_and_decodes_and_shows_it(own: Callable[..., Path], data: Path) -> None:
    path = own(T5, measure=True)
    answer = calibrated(path, "--data", data, "--agreement", 0.2)
    assert 0 < answer["threshold"] < 1
    assert answer["sequences"] == len(TEXTS)
    assert answer["method"] == "bmm"
    assert "tokens exit" in answer["advice"]
    assert "95% interval" in answer["verdict"]["text"]
    assert answer["verdict"]["level"] in ("good", "neutral", "bad")
    manifest = Bundle.open(path, verify="full").manifest
    assert (manifest.threshold, manifest.rollback_threshold) == (answer["threshold"], answer["rollback_threshold"])
    chosen = next(row for row in answer["table"] if row["threshold"] == answer["threshold"])
    assert 0 < chosen["exit_rate"] < 1
    assert chosen["predicted_speedup"] > 0
    assert min(answer["costs"]["shallow"], answer["costs"]["deep"]["1"]) > 0
    assert answer["costs"]["host"]["threads"] >= 1
    with Session(path, slots=1) as session:
        exits = session.generate(TEXTS[0], max_new_tokens=12).stats.exits
        assert exits == session.generate(TEXTS[0], max_new_tokens=12, threshold=answer["threshold"]).stats.exits
        session.generate(TEXTS[0], max_new_tokens=12, mode="rollback")  # has a threshold of its own now
    page = run("inspect", path).stdout
    assert "P(agree | confidence) is at least 0.2" in page
    assert json.loads(run("inspect", path, "--json").stdout)["calibration"]["threshold"] == answer["threshold"]


def test_never_is_exactly_one_and_called_never(own: Callable[..., Path], data: Path) -> None:
    path = own(T5)
    answer = calibrated(path, "--data", data, "--target", 0.999999)
    assert answer["threshold"] == 1.0
    assert "never exits" in answer["verdict"]["text"]
    shown = " ".join(run("inspect", path).stdout.split())
    assert "threshold 1 (never, as calibrated)" in shown
    assert "never exits: there is no confidence from which 0.999999 of the tokens agree" in shown


def test_a_busy_machine_measures_no_speed(
    own: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(T5, measure=True)
    monkeypatch.setattr(open_source, "cores_in_use", lambda: 1.3)
    given = ("--data", data, "--target", 0.2, "--measure")
    answer = calibrated(path, *given)
    assert 0 < answer["threshold"] < 1
    assert all(row["predicted_speedup"] is row["measured_speedup"] is None for row in answer["table"])
    assert answer["break_even"] is None
    assert answer["costs"]["busy"] == 1.3
    page = " ".join(run("calibrate", path, *given, "--max-new-tokens", 12).stdout.split())
    assert "not measured: machine busy" in page
    assert "predicted" not in page.partition("Calibration")[0]
    assert "on an idle machine" in page
    assert "x the speed of mode full" not in page
    shown = " ".join(run("inspect", path).stdout.split())
    assert "speed not measured: machine busy" in shown
    monkeypatch.setattr(open_source, "cores_in_use", lambda: 0.0)
    again = calibrated(path, *given)
    assert "machine busy" not in json.dumps(again)
    assert again["costs"]["busy"] == 0


def test_a_checkpoint_is_calibrated_before_export(checkpoint: Directory, data: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "calibration.json", tmp_path / "bundle"
    model = checkpoint(T5)
    given = ("--data", data, "--exit-layer", 3, "--agreement", 0.2, "--output", file)
    answer = calibrated(model, *given, "--confidence", "entropy")
    assert answer["costs"] is None
    quick = ("--no-verify", "--no-measure", "--calibration", file)
    result = run("convert", model, out, "--exit-layer", 3, "--confidence", "entropy", *quick)
    assert result.exit_code == 0, result.output
    assert f"threshold: {answer['threshold']:.4g}, calibrated" in result.stdout
    bundle = Bundle.open(out, verify="full")
    assert bundle.manifest.threshold == answer["threshold"]
    assert bundle.calibration == read_calibration(file)
    assert "another confidence measure 'entropy'" in error(
        run("convert", model, tmp_path / "other", "--exit-layer", 3, *quick)
    )
    wrong_layer = ("--exit-layer", 1, "--confidence", "entropy")
    assert "another exit layer 3, not 1" in error(run("convert", model, tmp_path / "other", *wrong_layer, *quick))
    other = ("convert", checkpoint(LLAMA), tmp_path / "other", "--exit-layer", 3, "--confidence", "entropy")
    assert "another model" in error(run(*other, *quick))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("case", [T5, LLAMA], ids=lambda case: case.name)
def test_a_checkpoint_in_bfloat16_has_traces_of_its_own(case: Case, checkpoint: Directory) -> None:
    model, requests = open_checkpoint(str(checkpoint(case))), [Request(1, TEXTS[0])]
    exact, rough = (
        CheckpointSource(model, CalibrateOptions(exit_layer=1, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert exact.facts.hash == CheckpointSource(model, CalibrateOptions(exit_layer=1)).facts.hash
    assert exact.facts.hash != rough.facts.hash
    ours, theirs = (next(iter(source.traces(requests, 9))).confidence for source in (rough, exact))
    assert not np.array_equal(ours, theirs)
    assert ((ours >= 0) & (ours <= 1)).all()
    # The random T5's confidences move with every bit of its hidden states.
    assert ours[0] == pytest.approx(theirs[0], abs=0.05 if case is LLAMA else 0.5)


def test_a_device_that_is_not_there_is_refused_before_any_work(
    checkpoint: Directory, data: Path, tmp_path: Path
) -> None:
    given = ("--exit-layer", 1, "--device", "cuda:999", "--output", tmp_path / "out.json")
    result = run("calibrate", checkpoint(LLAMA), "--data", data, *given)
    assert "device cuda:999 is not there: torch" in error(result)
    assert list(tmp_path.glob("out*")) == []


def test_a_calibration_does_not_go_with_an_exit_vocabulary(checkpoint: Directory, tmp_path: Path) -> None:
    vocabulary = ("--exit-vocab", tmp_path / "exit-vocab.json")
    result = run("convert", checkpoint(T5), tmp_path / "out", "--calibration", tmp_path / "x.json", *vocabulary)
    assert "calibrate the bundle" in error(result)


def test_the_risk_method_says_what_it_promises(own: Callable[..., Path], data: Path) -> None:
    path = own(T5, measure=True)
    given = ("--data", data, "--method", "risk", "--risk", 0.4, "--delta", 0.1)
    answer = calibrated(path, *given)
    assert (answer["method"], answer["risk"], answer["delta"], answer["target"]) == ("risk", 0.4, 0.1, None)
    assert answer["threshold"] < 1
    page = run("calibrate", path, *given, "--max-new-tokens", 12).stdout
    assert "loss of a sequence at most 0.4 on average, with probability 90%" in page


def test_an_interrupted_run_goes_on_and_other_methods_need_no_decoding(
    own: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own(T5)
    decoded: list[int] = []
    until = 15

    def counted(session: Session, line: int, prompt: np.ndarray, most: int) -> Trace:
        if len(decoded) == until:
            raise KeyboardInterrupt
        decoded.append(line)
        return trace_of(session, line, prompt, most)

    monkeypatch.setattr(calibration_source, "trace_of", counted)
    before = (path / "freeexport.json").read_bytes()
    result = run("calibrate", path, "--data", data, "--max-new-tokens", 12)
    assert result.exit_code == 130
    assert (path / "freeexport.json").read_bytes() == before
    until = 1000
    first = calibrated(path, "--data", data)
    assert decoded == list(range(1, len(TEXTS) + 1))
    again = calibrated(path, "--data", data, "--agreement", 0.2)
    assert len(decoded) == len(TEXTS)
    assert again["mixture"] == first["mixture"]
    calibrated(path, "--data", data, "--samples", 10)
    assert len(decoded) == len(TEXTS)
    data.write_text(data.read_text() + '{"input": "one more"}\n')
    calibrated(path, "--data", data)
    assert len(decoded) == 2 * len(TEXTS) + 1


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        (0, (), "has no examples"),
        (1, (), "a threshold needs at least 50; give more samples"),
        (36, ("--method", "risk"), "needs at least 59 sequences, the data have 36"),
        (36, ("--exit-layer", "2"), "--exit-layer is for checkpoints"),
        (36, ("--confidence", "entropy"), "--confidence is for checkpoints"),
        (36, ("--dtype", "bfloat16"), "--dtype is for checkpoints"),
        (36, ("--device", "tpu"), "device is 'tpu'; choose 'cpu', or 'cuda:0'"),
        (36, ("--device", "cuda:7"), "converted for the CPU; for device cuda:7 convert again"),
        (36, ("--agreement", "1"), "agreement is 1.0; choose a number between 0 and 1"),
        (36, ("--delta", "nan"), "delta is nan"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_with_the_reason(
    own: Callable[..., Path], data: Path, lines: int, options: tuple[str, ...], reason: str
) -> None:
    path = own(T5)
    before = (path / "freeexport.json").read_bytes()
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:lines]))
    assert reason in error(run("calibrate", path, "--data", data, "--max-new-tokens", 12, *options))
    assert (path / "freeexport.json").read_bytes() == before


def test_missing_and_broken_data_are_named(own: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    path = own(T5)
    assert "nowhere cannot be read" in error(run("calibrate", path, "--data", tmp_path / "nowhere"))
    data.write_text(data.read_text() + "{\n")
    assert f"line {len(TEXTS) + 1}: not JSON" in error(run("calibrate", path, "--data", data))


def test_inputs_that_do_not_fit_are_left_out_with_a_warning(own: Callable[..., Path], data: Path) -> None:
    path = own(T5)
    data.write_text(json.dumps({"input": "y" * 500}) + "\n" + data.read_text())
    result = run("calibrate", path, "--data", data, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert f"warning: 1 of {len(TEXTS) + 1} inputs are left out; the first, line 1: " in result.stderr
    data.write_text(json.dumps({"input": "y" * 500}) + "\n")
    assert "none of the 1 inputs can be used" in error(run("calibrate", path, "--data", data))


def test_confidences_that_are_not_numbers_are_refused() -> None:
    broken = trace([math.nan] * 80, [True] * 80)
    with pytest.raises(CalibrationError, match="80 of 80 confidences are not numbers"):
        check_enough(Traces.of([broken]), CalibrateOptions())


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        ({"vocab": {"a": 0, "<unk>": 3}, "unk_token": "<unk>"}, 3),
        ({"vocab": [["a", 0.0], ["<unk>", 0.0]], "unk_id": 1}, 1),
        ({"vocab": {"a": 0}, "unk_token": None}, None),
    ],
)
def test_the_unknown_token_is_the_one_of_the_tokenizer(tmp_path: Path, model: Any, unknown: int | None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert calibration_source.unknown_of_bundle(tmp_path) == unknown


def test_data_of_another_vocabulary_are_refused() -> None:
    check_unknown([np.array([2, 5, 6, 7, 8, 9])], 2)
    check_unknown([np.array([2, 2])], None)
    with pytest.raises(CalibrationError, match="50% of the data's tokens are unknown"):
        check_unknown([np.array([2, 5]), np.array([2, 9])], 2)


def test_a_report_of_before_stands_until_the_new_one_is_written(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / calibration_report.INDEX).write_text("old")
    calibration_report.check(tmp_path / "report")
    assert (tmp_path / "report" / calibration_report.INDEX).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_an_exit_layer_that_is_none_is_refused(checkpoint: Directory, data: Path, tmp_path: Path) -> None:
    given = ("calibrate", checkpoint(T5), "--data", data, "--output", tmp_path / "out.json")
    assert f"choose --exit-layer, from 1 to {T5.layers - 1}" in error(run(*given))
    assert "exit layer 6 is out of range" in error(run(*given, "--exit-layer", T5.layers))
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("method", [("--target-quality", 0.1), ("--method", "risk", "--risk", 0.9, "--metric", "chrf")])
def test_methods_that_decode_write_a_report(
    own: Callable[..., Path], data: Path, tmp_path: Path, method: tuple[Any, ...]
) -> None:
    path, report = own(T5), tmp_path / "report"
    given = ("--data", data, *method, "--samples", 20, "--report", report, "--measure", "--rounds", 1)
    answer = calibrated(path, *given)
    measured = [row["threshold"] for row in answer["table"] if row["measured_speedup"]]
    assert {0.5, 0.9} <= set(measured)
    decoded = [row for row in answer["table"] if row["quality"] is not None]
    assert decoded
    assert all(0 <= row["quality"] <= 1 for row in decoded)
    page = html.unescape((report / "index.html").read_text())
    assert answer["verdict"]["text"][1:] in page
    assert answer["verdict"]["next_step"] in page
    assert ("reliability.png" in page) is not ("no reliability diagram" in page)
    for picture in ("mixture.png", "thresholds.png"):
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
        assert f'src="{picture}"' in page
    assert read_calibration(report / "calibration.json") == Bundle.open(path).calibration
    calibrated(path, *given)  # a report of ours is replaced


def test_a_report_does_not_replace_what_is_not_one(own: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    path = own(T5)
    before = (path / "freeexport.json").read_bytes()
    assert "is not what this command writes" in error(run("calibrate", path, "--data", data, "--report", tmp_path))
    assert (path / "freeexport.json").read_bytes() == before


@pytest.mark.parametrize("option", [("--metric", "exact"), ("--measure",)])
def test_a_checkpoint_has_no_engines_to_decode_with(
    checkpoint: Directory, data: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    given = ("--data", data, "--exit-layer", 1, "--output", tmp_path / "out.json", *option)
    assert "calibrate" in error(run("calibrate", checkpoint(T5), *given))
    assert list(tmp_path.iterdir()) == [data]


def test_two_ways_to_choose_are_one_too_many(own: Callable[..., Path], data: Path) -> None:
    result = run("calibrate", own(T5), "--data", data, "--method", "risk", "--target-quality", 0.9)
    assert result.exit_code == 2
