"""`freeexport calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import BY_NAME, TEXTS, Bundles, Case
from command_line import error, invoke, succeed

from freeexport.calibrate import calibrate as calibrating
from freeexport.calibrate import sources
from freeexport.calibrate.sources import check_unknown, unknown_of_bundle
from freeexport.calibrate.traces import Traces, trace_of
from freeexport.costs.bytes import bundle_costs
from freeexport.system.load import OtherLoad
from runtime import Bundle, Session
from runtime.bundle.calibration import read_calibration
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import MANIFEST
from runtime.errors import CalibrationError

T5, LLAMA = BY_NAME["t5-deep-decoder"], BY_NAME["llama-tied"]
# Deep passes over a few rows cost little more than over one, over many much more: exits pay, long passes do not.
PAYS = Costs(shallow=1.0, shallow_without_head=0.9, deep={1: 4.0, 2: 4.1, 4: 4.2, 16: 30.0})
Directory = Callable[[Case], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "measured_costs", lambda *given: PAYS)


def calibrated(*arguments: Any) -> dict[str, Any]:
    result = succeed("calibrate", *arguments, "--max-new-tokens", 12, "--json")
    return dict(json.loads(result.stdout))


def test_calibrate_updates_the_bundle_and_inspect_shows_it(copied: Bundles, data: Path) -> None:
    path = copied(T5)
    answer = calibrated(path, "--data", data, "--agreement", 0.2)
    assert 0 < answer["threshold"] < 1
    assert (answer["sequences"], answer["method"], answer["written"]) == (len(TEXTS), "bmm", str(path))
    assert "95% interval" in answer["verdict"]["text"]
    manifest = Bundle.open(path, verify="full").manifest
    assert (manifest.threshold, manifest.rollback_threshold) == (answer["threshold"], answer["rollback_threshold"])
    chosen = next(row for row in answer["table"] if row["threshold"] == answer["threshold"])
    assert 0 < chosen["exit_rate"] < 1
    assert chosen["predicted_speedup"] > 0
    with Session(path, slots=1) as session:
        exits = session.generate(TEXTS[0], mode="free", max_new_tokens=12).stats.exits
        options = {"mode": "free", "max_new_tokens": 12, "threshold": answer["threshold"]}
        assert exits == session.generate(TEXTS[0], **options).stats.exits
        session.generate(TEXTS[0], max_new_tokens=12, mode="rollback")  # has a threshold of its own now
    assert "P(agree | confidence) is at least 0.2" in invoke("inspect", path).stdout
    assert json.loads(invoke("inspect", path, "--json").stdout)["calibration"]["threshold"] == answer["threshold"]


def test_threshold_that_never_exits_is_1_and_the_verdict_is_printed_once(copied: Bundles, data: Path) -> None:
    path = copied(T5)
    result = succeed("calibrate", path, "--data", data, "--agreement", 0.999999, "--max-new-tokens", 12)
    assert result.stdout.count("Next: ") == 1
    assert len([line for line in result.stdout.splitlines() if "the exit after layer 1 of 6" in line]) == 1
    assert Bundle.open(path).manifest.threshold == 1.0
    shown = " ".join(invoke("inspect", path).stdout.split())
    assert "never exits: there is no confidence from which 0.999999 of the tokens agree" in shown


def test_timings_on_a_busy_machine_are_printed_and_marked(
    copied: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(T5)
    monkeypatch.setattr(calibrating, "measured_costs", lambda *given: replace(PAYS, busy=1.3))
    monkeypatch.setattr(OtherLoad, "so_far", lambda load: 1.3)
    given = (path, "--data", data, "--agreement", 0.2, "--rounds", 1, "--samples", 12)
    answer = calibrated(*given)
    assert 0 < answer["threshold"] < 1
    assert all(row["predicted_speedup"] for row in answer["table"])
    assert answer["costs"] is None
    assert any("1.3 cores busy" in note and "predicted by the bytes" in note for note in answer["notes"])
    even = bundle_costs(Bundle.open(path))
    assert even is not None
    assert answer["break_even"] == even.break_even(Bundle.open(path).manifest.max_pending)
    page = " ".join(invoke("calibrate", *given, "--max-new-tokens", 12).stdout.split())
    assert "bytes that are read" in page
    assert "from round to round" in page


def test_calibration_file_can_be_used_by_another_conversion(
    checkpoint: Directory, bundle: Bundles, data: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "calibration.json", tmp_path / "bundle"
    model, before = checkpoint(T5), bundle(T5, 3)
    answer = calibrated(before, "--data", data, "--agreement", 0.2, "--output", file)
    assert Bundle.open(before).manifest.threshold == 1.0
    quick = ("--verify", "none", "--calibration", file)
    succeed("convert", model, out, "--exit-layer", 3, *quick)
    opened = Bundle.open(out, verify="full")
    assert opened.manifest.threshold == answer["threshold"]
    assert opened.calibration == read_calibration(file)
    other = ("convert", model, tmp_path / "other")
    entropy = ("--exit-layer", 3, "--confidence", "entropy", *quick)
    assert "another confidence measure 'softmax', not 'entropy'" in error(invoke(*other, *entropy))
    assert "another exit layer 3, not 1" in error(invoke(*other, "--exit-layer", 1, *quick))
    model = checkpoint(LLAMA)
    assert "another model" in error(invoke("convert", model, tmp_path / "other", "--exit-layer", 3, *quick))
    assert not (tmp_path / "other").exists()


def test_interrupted_run_continues_and_other_rules_need_no_decoding(
    copied: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(T5)
    decoded: list[int] = []
    until = 15

    def counted(session: Session, line: int, prompt: np.ndarray, most: int) -> Traces:
        if len(decoded) == until:
            raise KeyboardInterrupt
        decoded.append(line)
        return trace_of(session, line, prompt, most)

    monkeypatch.setattr(sources, "trace_of", counted)
    before = (path / MANIFEST).read_bytes()
    result = invoke("calibrate", path, "--data", data, "--max-new-tokens", 12)
    assert result.exit_code == 130
    assert (path / MANIFEST).read_bytes() == before
    until = 1000
    first = calibrated(path, "--data", data)
    assert decoded == list(range(1, len(TEXTS) + 1))
    again = calibrated(path, "--data", data, "--agreement", 0.9)
    assert again["mixture"] == first["mixture"]
    calibrated(path, "--data", data, "--samples", 10)
    assert len(decoded) == len(TEXTS)
    data.write_text(data.read_text() + '{"input": "one more"}\n')
    calibrated(path, "--data", data)
    assert len(decoded) == 2 * len(TEXTS) + 1


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        (1, (), "a threshold needs at least 50; give more samples"),
        (36, ("--rule", "risk"), "needs at least 59 sequences, the data have 36"),
        (36, ("--device", "tpu"), "device is 'tpu'; choose 'cpu', or 'cuda:0'"),
        (36, ("--agreement", "1"), "agreement is 1.0; choose a number between 0 and 1"),
    ],
)
def test_uncalibratable_input_is_refused_with_the_reason(
    copied: Bundles, data: Path, lines: int, options: tuple[str, ...], reason: str
) -> None:
    path = copied(T5)
    before = (path / MANIFEST).read_bytes()
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:lines]))
    assert reason in error(invoke("calibrate", path, "--data", data, "--max-new-tokens", 12, *options))
    assert (path / MANIFEST).read_bytes() == before
    if "risk" in options:  # which is known before anything is decoded
        assert not path.with_name(f"{path.name}.traces.jsonl").exists()


def test_options_of_two_rules_are_refused(bundle: Bundles, data: Path) -> None:
    result = invoke("calibrate", bundle(T5), "--data", data, "--rule", "risk", "--target-quality", 0.9)
    assert result.exit_code == 2
    assert "several rules (quality, risk)" in result.stderr


def test_missing_malformed_and_overlong_data_are_named(copied: Bundles, data: Path, tmp_path: Path) -> None:
    path, lines = copied(T5), data.read_text()
    assert "nowhere cannot be read" in error(invoke("calibrate", path, "--data", tmp_path / "nowhere"))
    data.write_text(lines + "{\n")
    assert f"line {len(TEXTS) + 1}: not JSON" in error(invoke("calibrate", path, "--data", data))
    long = json.dumps({"input": "y" * 500}) + "\n"
    data.write_text(long + lines)
    result = succeed("calibrate", path, "--data", data, "--max-new-tokens", 12)
    assert f"warning: 1 of {len(TEXTS) + 1} inputs are left out; the first, line 1: " in result.stderr
    data.write_text(long)
    assert "none of the 1 inputs can be used" in error(invoke("calibrate", path, "--data", data))


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        ({"vocab": {"a": 0, "<unk>": 3}, "unk_token": "<unk>"}, 3),
        ({"vocab": [["a", 0.0], ["<unk>", 0.0]], "unk_id": 1}, 1),
        ({"vocab": {"a": 0}, "unk_token": None}, None),
    ],
)
def test_unknown_token_is_that_of_the_tokenizer(tmp_path: Path, model: Any, unknown: int | None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert unknown_of_bundle(tmp_path) == unknown


def test_data_of_another_vocabulary_are_refused() -> None:
    check_unknown([np.array([2, 5, 6, 7, 8, 9])], 2)
    check_unknown([np.array([2, 2])], None)
    with pytest.raises(CalibrationError, match="50% of the data's tokens are unknown"):
        check_unknown([np.array([2, 5]), np.array([2, 9])], 2)


def test_path_without_a_bundle_or_checkpoint_is_refused_before_reading_data(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nope"):
        message = error(invoke("calibrate", place, "--data", tmp_path / "missing.jsonl"))
        assert f"{place} is neither a bundle nor a checkpoint" in message


@pytest.mark.parametrize("rule", [("--target-quality", 0.1), ("--risk", 0.9, "--metric", "chrf")])
def test_quality_and_risk_rules_report_the_decoded_quality(copied: Bundles, data: Path, rule: tuple[Any, ...]) -> None:
    answer = calibrated(copied(T5), "--data", data, *rule, "--samples", 6, "--rounds", 1)
    assert {0.5, 0.9} <= {row["threshold"] for row in answer["table"] if row["measured_speedup"]}
    decoded = [row for row in answer["table"] if row["quality"] is not None]
    assert decoded
    assert all(0 <= row["quality"] <= 1 for row in decoded)


def test_total_time_is_estimated_after_the_first_sequence(
    copied: Bundles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = copied(T5), list[int]()
    trace = sources.trace_of

    def slow(*given: Any) -> Traces:
        made.append(1)
        return trace(*given)

    now = iter(range(0, 10**6, 30))
    monkeypatch.setattr(sources, "trace_of", slow)
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    result = succeed("calibrate", path, "--data", data, "--samples", 12, "--max-new-tokens", 12)
    # Three sequences took 30 s, and nine are left; then the engines are timed.
    assert "about 98 s for 12 sequences" in result.stderr
    assert len(made) == 12
