from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from command_line import error, invoke
from handmade_bundle import VERIFICATION, write_bundle

from freeexport.costs import bytes as counting
from freeexport.costs.bytes import EngineBytes
from runtime.bundle.costs import Costs, Host, Outside
from runtime.bundle.manifest import MANIFEST, Manifest

COSTS = Costs(0.012, 0.01, {1: 0.02, 8: 0.03, 16: 0.045}, Outside(1e-4, 1e-4, 1e-4), host=Host("a CPU", 4, 2, "1.32"))


def inspect(*arguments: str | Path) -> Result:
    return invoke("inspect", *arguments)


def row(result: Result, name: str) -> str:
    """The text beside `name` on the page."""
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
    assert len(lines) == 1, result.stdout
    return lines[0][len(name) :].strip()


def test_page_shows_model_exit_and_cache(tmp_path: Path) -> None:
    result = inspect(write_bundle(tmp_path / "bundle"))
    assert row(result, "family") == "llama (decoder-only)"
    assert row(result, "decoder layers") == "30: shallow 1-10, deep 11-30"
    assert row(result, "exit layer") == "10 of 30"
    assert row(result, "dialect") == "ort"
    assert row(result, "target") == "cpu"
    assert row(result, "precision") == "fp32"
    assert row(result, "confidence") == "softmax"
    assert row(result, "capacity") == "1008 tokens"
    assert row(result, "per token") == "46.1 kB"  # 2 * 30 layers * 3 heads * 64 * 4 bytes
    assert row(result, "per sequence") == "47.2 MB"  # 1024 rows
    assert row(result, "onnxruntime") == "1.32.0"
    assert row(result, "deep.onnx").startswith("11 B")


def test_first_line_names_the_mode_and_its_effect(tmp_path: Path) -> None:
    result = inspect(write_bundle(tmp_path / "bundle"))
    assert result.stdout.splitlines()[0].startswith("mode lossless: the tokens of mode full, with drafts")
    assert row(result, "threshold") == "1 (not calibrated)"
    result = inspect(write_bundle(tmp_path / "calibrated", threshold=0.8125))
    assert result.stdout.splitlines()[0] == (
        "mode free, threshold 0.812: speedup unknown, with verified drafts from the text and the exit"
    )


def test_calibrated_threshold_and_break_even_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = inspect(write_bundle(tmp_path / "bundle", threshold=0.8125, costs=COSTS))
    assert row(result, "threshold") == "0.8125"
    assert row(result, "break-even") == "the exit pays once 11.3% of the tokens exit, by the engines' measured times"
    assert row(result, "speedup at 80 % exits") == "1.73x (predicted)"
    assert row(result, "measured on") == "a CPU, 2 threads, onnxruntime 1.32"
    assert row(result, "deep 1") == "20.00 ms"
    monkeypatch.setattr(counting, "decoder_bytes", lambda bundle: (EngineBytes(1e7, 0, 1e6), EngineBytes(2e7, 0, 1e6)))
    result = inspect(write_bundle(tmp_path / "busy", exit_trained=True, costs=replace(COSTS, busy=1.3)))
    assert row(result, "measured while busy") == "others kept 1.3 cores busy; convert again on an idle machine"
    assert "by the bytes that are read" in row(result, "break-even")
    assert "by the bytes that are read" in " ".join(result.stdout.split())


def test_untrained_exit_is_labelled_and_promises_nothing(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", exit_trained=False, costs=COSTS)
    agreement = {"value": 0.0397, "count": 252, "low": 0.02, "high": 0.08}
    seen = {**VERIFICATION, "exit": {"agreement": agreement}}
    (bundle / "verification.json").write_text(json.dumps(seen))
    result = inspect(bundle)
    verdict = row(result, "verdict")
    assert verdict.startswith("does not pay: the exit after layer 10 of 30 is untrained")
    assert "at 4.0% (95% interval 2.0% to 8.0%) of the model's own tokens" in " ".join(result.stdout.split())
    assert row(result, "trained") == "no, the checkpoint has no exit.json"
    assert row(result, "next step").startswith(
        "train it for the exit (freeexport train CHECKPOINT OUT), or use mode lossless"
    )
    assert "1.73x" not in result.stdout
    answer = json.loads(inspect(bundle, "--json").stdout)
    assert answer["verdict"]["level"] == "bad"
    assert answer["verdict"]["text"].startswith("does not pay")


def test_invalid_agreement_in_the_report_is_not_shown(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", exit_trained=False)
    wrong = ("x", {"value": 7.0, "count": 3, "low": 0.1, "high": 0.2}, {"value": 0.5, "count": None}, {})
    for seen in ("much", {}, *({"agreement": one} for one in wrong)):
        (bundle / "verification.json").write_text(json.dumps({**VERIFICATION, "exit": seen}))
        assert "own tokens" not in inspect(bundle).stdout
        assert "is untrained" in inspect(bundle).stdout


def test_json_has_the_manifest_and_derived_sizes(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    answer = json.loads(inspect(bundle, "--json").stdout)
    assert Manifest.from_json(json.dumps(answer["manifest"])) == Manifest.from_json((bundle / MANIFEST).read_text())
    assert answer["sha256"] == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    assert answer["calibrated"] is False
    assert answer["kv_bytes_per_token"] == 46_080
    assert answer["bundle_bytes"] == len("shallow.onnx") + len("deep.onnx") + 4
    assert answer["verification"] == VERIFICATION


def test_flipped_byte_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "deep.onnx").write_bytes(b"\x12\x09deeP.onnx")
    result = inspect(bundle)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "deep.onnx" in result.stderr
    assert error(inspect(tmp_path / "nowhere")).startswith("error: ")


@pytest.mark.parametrize("report", [{"checks": 5}, {"checks": [{}]}, {"greedy": []}, {"quality": {"agreement": "x"}}])
def test_report_of_another_kind_is_refused_with_a_remedy(report: dict[str, Any], tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "verification.json").write_text(json.dumps(report))
    result = inspect(bundle)
    assert error(result).startswith("error: verification.json is not a valid report")
