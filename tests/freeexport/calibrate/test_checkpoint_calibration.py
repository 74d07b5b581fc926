"""`freeexport calibrate CHECKPOINT`, and what `convert` does with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, TEXTS, Case
from command_line import error, invoke, succeed
from exit_layer_case import with_exit_layers
from safetensors.numpy import load_file, save_file
from scipy.stats import beta

from freeexport.calibrate import calibrate as calibrating
from freeexport.calibrate.beside import SAMPLE, read_beside
from freeexport.calibrate.threshold import fit_beta, fit_mixture
from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.exit_file import ExitFile, write_exit_file
from runtime.adaptation.label_statistics import LabelStatistics
from runtime.bundle.beta import UNIFORM, BetaMixture, LogSums
from runtime.bundle.bundle import Bundle
from runtime.bundle.calibration import CALIBRATION, read_calibration
from runtime.bundle.costs import Costs

T5, LLAMA = BY_NAME["t5-deep-decoder"], BY_NAME["llama-tied"]
PAYS = Costs(shallow=1.0, shallow_without_head=0.9, deep={1: 4.0, 2: 4.1, 4: 4.2, 16: 30.0})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(checkpoint: Callable[[Case], Path], tmp_path: Path) -> Callable[[Case], Path]:
    """Copy the checkpoint of a case, with an exit.json that says that its exit was trained."""

    def build(case: Case) -> Path:
        out = tmp_path / case.name
        shutil.copytree(checkpoint(case), out)
        if not (out / "exit.json").exists():
            write_exit_file(out, ExitFile(1, open_checkpoint(str(out)).sha256, "ce", "full"))
        return out

    return build


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"input": text}) + "\n" for text in TEXTS))
    return file


def refused(*arguments: Any) -> str:
    """Return the error line of a command that fails."""
    return error(invoke(*arguments))


def calibrated(*arguments: Any) -> dict[str, Any]:
    result = succeed("calibrate", *arguments, "--max-new-tokens", 12, "--agreement", 0.2, "--threads", 1, "--json")
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("case", [T5, LLAMA, with_exit_layers("llama-tied")], ids=["t5", "llama", "llama-layers"])
def test_checkpoint_calibration_matches_its_fp32_bundle_and_is_converted(
    case: Case, trained: Callable[[Case], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "measured_costs", lambda *given: PAYS)
    model, bundle = trained(case), tmp_path / "bundle"
    before = calibrated(model, "--data", data)
    assert before["written"] == str(model / CALIBRATION)
    assert before["verdict"]["next_step"] == f"freeexport convert {model} BUNDLE"
    result = succeed("convert", model, bundle, "--verify", "none", "--precision", "fp32")
    assert "calibration of the checkpoint, on" in result.stderr
    assert "differ" not in result.stderr
    assert f"threshold: {before['threshold']:.4g}, calibrated" in result.stdout
    manifest = Bundle.open(bundle, verify="full").manifest
    assert manifest.threshold == before["threshold"]
    after = calibrated(bundle, "--data", data)
    for name in ("threshold", "agreement"):
        assert before[name] == pytest.approx(after[name], rel=1e-3), name
    limits = [answer["rollback_threshold"] or -1 for answer in (before, after)]
    assert limits[0] == pytest.approx(limits[1], rel=1e-3)
    assert (before["sequences"], before["positions"]) == (after["sequences"], after["positions"])


def test_calibration_for_another_confidence_is_ignored_with_a_warning(
    trained: Callable[[Case], Path], data: Path, tmp_path: Path
) -> None:
    model = trained(LLAMA)
    calibrated(model, "--data", data)
    options = ("--verify", "none", "--precision", "fp32", "--confidence", "max-prob")
    result = succeed("convert", model, tmp_path / "bundle", *options)
    assert "is left out: it is for an exit after layer 1 with confidence softmax" in result.stderr
    assert "not calibrated" in result.stdout


def test_differing_engines_are_warned_about(trained: Callable[[Case], Path], data: Path, tmp_path: Path) -> None:
    model = trained(LLAMA)
    calibrated(model, "--data", data)
    lines = [json.loads(line) for line in (model / SAMPLE).read_text().splitlines()]
    wrong = [{**line, "agreeing": line["tokens"] - line["agreeing"]} for line in lines]
    (model / SAMPLE).write_text("".join(json.dumps(line) + "\n" for line in wrong))
    result = succeed("convert", model, tmp_path / "bundle", "--verify", "none", "--precision", "fp32")
    assert "they differ, so calibrate the bundle" in result.stderr


def test_calibration_in_an_output_file_is_used_only_by_convert(
    trained: Callable[[Case], Path], data: Path, tmp_path: Path
) -> None:
    model, file = trained(LLAMA), tmp_path / "file.json"
    answer = calibrated(model, "--data", data, "--output", file)
    assert answer["verdict"]["next_step"].endswith(f"--calibration {file}")
    assert read_calibration(file).threshold == answer["threshold"]
    assert not (model / CALIBRATION).exists()
    (again,) = [calibrated(model, "--data", data)]  # from the traces
    assert again["threshold"] == answer["threshold"]


def test_stale_calibration_is_refused(trained: Callable[[Case], Path], data: Path, tmp_path: Path) -> None:
    model = trained(LLAMA)
    calibrated(model, "--data", data)
    (weights,) = model.glob("*.safetensors")
    changed = {name: array * np.float32(1.01) for name, array in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    message = refused("convert", model, tmp_path / "bundle", "--verify", "none")
    assert f"{model / CALIBRATION} is of other weights: {model.name} has changed since; run" in message
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "exact"), "a metric compares what mode free writes, which needs a bundle"),
        (("--rounds", 1), "--rounds times engines, and a checkpoint has none"),
        (("--risk", 0.05), "needs at least 59 sequences"),
    ],
)
def test_options_unsupported_for_checkpoints_are_refused(
    trained: Callable[[Case], Path], data: Path, arguments: tuple[Any, ...], message: str
) -> None:
    assert message in refused("calibrate", trained(LLAMA), "--data", data, *arguments)


def test_checkpoint_without_a_trained_exit_is_refused(
    checkpoint: Callable[[Case], Path], trained: Callable[[Case], Path], data: Path
) -> None:
    assert "has no trained exit (exit.json); train one" in refused("calibrate", checkpoint(LLAMA), "--data", data)
    model = trained(LLAMA)
    write_exit_file(model, ExitFile(1, open_checkpoint(str(model)).sha256, "deep-ce", "full"))
    assert "has no trained exit" in refused("calibrate", model, "--data", data)


def test_data_without_a_usable_line_are_refused(trained: Callable[[Case], Path], tmp_path: Path) -> None:
    model, long = trained(LLAMA), tmp_path / "long.jsonl"
    long.write_text(json.dumps({"input": "one two " * 4000}) + "\n")
    assert "none of the 1 inputs" in refused("calibrate", model, "--data", long)
    long.write_text("")
    assert "long.jsonl" in refused("calibrate", model, "--data", long)


@pytest.mark.parametrize(
    "line", ['{"prompt": [1]}', '{"prompt": [-1], "tokens": 1, "agreeing": 0, "confident": 0}', "[]", "{",
             '{"prompt": [1], "tokens": 1, "agreeing": 2, "confident": 0}'],
)  # fmt: skip
def test_malformed_sample_is_refused(line: str, trained: Callable[[Case], Path], data: Path) -> None:
    model = trained(LLAMA)
    calibrated(model, "--data", data)
    with (model / SAMPLE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(Exception, match="is no sample of a calibration"):
        read_beside(open_checkpoint(str(model)))


@pytest.mark.parametrize("shapes", [(0.3, 3.0), (8.0, 0.6), (40.0, 0.5)])
def test_offline_fit_matches_scipy(shapes: tuple[float, float]) -> None:
    values = np.clip(np.random.default_rng(7).beta(*shapes, 2000), 1e-6, 1 - 1e-6)
    a, b, _, _ = beta.fit(values, floc=0, fscale=1)
    found = fit_beta(values)
    assert (found.a, found.b) == (pytest.approx(a, rel=1e-4), pytest.approx(b, rel=1e-4))


def test_online_fit_converges_to_the_offline_fit() -> None:
    random, count = np.random.default_rng(3), 20_000
    agrees = random.random(count) < 0.8
    confidence = np.where(agrees, random.beta(6, 0.7, count), random.beta(1.2, 2.5, count))
    offline = fit_mixture(confidence, agrees, 0.95).mixture
    assert offline is not None
    online = BetaMixture(UNIFORM, UNIFORM, 0.5)
    prior = online
    evidence = LabelStatistics(LogSums(), LogSums())
    for start in range(0, count, 500):
        rows = slice(start, start + 500)
        labelled = list(zip(confidence[rows].tolist(), agrees[rows].tolist(), strict=True))
        evidence.add(labelled, [], memory=1e12)
        online = evidence.refit(online, prior)
    for ours, theirs in ((online.agree, offline.agree), (online.disagree, offline.disagree)):
        assert (ours.a, ours.b) == (pytest.approx(theirs.a, rel=0.02), pytest.approx(theirs.b, rel=0.02))
    assert online.weight_agree == pytest.approx(offline.weight_agree, abs=1e-3)
