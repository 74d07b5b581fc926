"""The paper's comparison: its plan, its steps, its checks, its tables, and the whole command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import BY_NAME, Bundles, Case
from click.testing import CliRunner
from device_cases import LONGT5
from fake_device import Machine

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.checkpoints.examples import DataError
from freeexport.checkpoints.tokenizer_files import load_tokenizer
from freeexport.evaluate.measure import Work
from freeexport.evaluate.settings import Entry, Setting
from freeexport.task_metrics import MetricError, metric_of
from graphs.errors import GraphError, UnsupportedModelError
from runtime.bundle.bundle import Bundle
from runtime.engines.tensorrt.files import DIRECTORY
from runtime.errors import CapacityError, EngineError, FreeExportError, OptionError
from tools.gpu.operators import check_bundle, load_table
from tools.paper import compare, compare_check, recipes
from tools.paper.__main__ import main
from tools.paper.compare import RUN
from tools.paper.compare_check import checked_options, needed_disk, training_memory
from tools.paper.compare_measure import open_paper_session
from tools.paper.compare_options import ROWS, CompareOptions
from tools.paper.compare_plan import bundles_of, measurements_of, settings, trainings_of
from tools.paper.compare_report import as_page, pooled, rows_by_table, table_of
from tools.paper.eager import EAGER

T5, UMT5, LLAMA = (BY_NAME[name] for name in ("t5-deep-decoder", "umt5", "llama-tied"))
Directory = Callable[[Case], Path]


def write_splits(directory: Path, **changes: str) -> Path:
    """Write a data set of three splits. `changes` replace the content of a split."""
    directory.mkdir(exist_ok=True)
    for name, first, last in (("train", 0, 16), ("test", 20, 23), ("validation", 30, 38)):
        lines = (f'{{"input": "word {n} of {7 * n}", "target": "Word {n}."}}\n' for n in range(first, last))
        (directory / f"{name}.jsonl").write_text(changes.get(name, "".join(lines)))
    return directory


def options(data: Path, model: Path | str = "model", **changes: Any) -> CompareOptions:
    return CompareOptions(**{"model": str(model), "data": data, "exit_layer": 3, "output": data / "out", **changes})


def row(**changes: Any) -> dict[str, Any]:
    """Return a row of a measurement."""
    score = {"value": 0.5, "relative": 0.9, "low": 0.8, "high": 1.0}
    speed = {"token_speed": 2.0, "token_low": 1.9, "token_high": 2.1, "request_speed": 1.5}
    speed |= {"request_low": 1.4, "request_high": 1.6}
    facts = {"bundle": "free-3", "recipe": "free", "exit_layer": 3, "setting": "published 0.5", "method": "published"}
    rates = {"exit_rate": 0.5, "layers": 4.0, "tokens_per_second": 100.0, "predicted": None, "same": 1.0}
    found = {**facts, "threshold": 0.5, "calibrated": False, **rates, **speed, "scores": {"rouge-l": score}}
    return {**found, "eager": {**speed, "request_speed": 3.0}, **changes}


def test_plan_has_a_measurement_per_table_and_trains_each_checkpoint_once() -> None:
    given = options(Path(), static_depths=(2, 3, 4), depths=(2,))
    plan = measurements_of(given)
    names = [one.name for one in plan]
    assert names[:3] == ["main", "static/2", "static/4"]
    assert names[3:6] == ["mapping/free-kd-unif", "mapping/free-kd-last", "mapping/free"]
    assert names[6:] == ["depth/2", "depth/3", "samples", "lora"]
    methods = {one.name: one.methods for one in plan[0].contestants}
    assert methods["full-3"] == ("eager", "eager-full")
    assert methods["free-3"] == ("published", "eager-free", "adaptive", "rollback", "lossless", "calm-single")
    assert methods["static-3"] == ("static", "eager-static", "calm")
    trained = [one.name for one in trainings_of(plan)]
    assert len(trained) == len(set(trained)) == 8
    bundles = bundles_of(plan)
    assert bundles["static-3-at-2"].training is bundles["static-3"].training or not bundles["static-3"].calibrated
    assert bundles["free-3"].calibrated
    assert not bundles["full-3"].calibrated


def test_rows_can_be_selected_and_leftover_teachers_dropped() -> None:
    plan = measurements_of(options(Path(), rows=("free", "mapping"), leftover="drop"))
    assert [one.name for one in plan[0].contestants] == ["full-3", "free-drop-3"]
    assert [one.name.partition("/")[0] for one in plan] == ["main", "mapping", "mapping", "mapping"]
    assert plan[-1].contestants[0].training.recipe == "free-drop"


def test_full_model_is_measured_with_the_same_loop_as_early_exits() -> None:
    full = {row: measurements_of(options(Path(), rows=("full", row)))[0].contestants[0] for row in ("calm", "free")}
    assert full["calm"].methods == ("eager-full",)
    assert full["free"].methods == ()
    (copying,) = measurements_of(options(Path(), rows=("copying",)))[0].contestants[1:]
    assert copying.methods == ("calm-single", "eager-free")


def test_each_method_has_a_setting_for_each_of_its_thresholds() -> None:
    free = measurements_of(options(Path()))[0].contestants[1]
    manifest: Any = SimpleNamespace(threshold=0.5, rollback_threshold=3.0)
    names = [one.name for one in settings(free, (0.3, 0.9), manifest)]
    assert names[:4] == ["full", "published 0.3", "published 0.5, calibrated", "published 0.9"]
    assert names[4:7] == ["eager-free 0.3", "eager-free 0.9", "adaptive"]
    assert names[7:] == ["rollback 0.3", "rollback 0.9", "lossless", "calm-single 0.3", "calm-single 0.9"]
    manifest.rollback_threshold = None
    assert "rollback" not in {one.method for one in settings(free, (0.3,), manifest)}


BROKEN = {
    "no split": ({"test": ""}, {}, DataError, "test.jsonl has no examples"),
    "no target": ({"train": '{"input": "a"}\n'}, {}, DataError, "train.jsonl, line 1: 'target' is missing"),
    "another format": ({"test": "id\tsummary\n"}, {}, DataError, "test.jsonl, line 1: "),
    "another split": ({"train": '{"input": "word 20 of 140", "target": "a"}\n'}, {}, DataError, "shares 1 inputs"),
    "metric of questions": ({}, {"metrics": ("squad-f1",)}, MetricError, "squad-f1 is for SQuAD"),
    "metric without its marks": (
        {"test": '{"input": "a", "target": "b"}\n'},
        {"metrics": ("case-f1",)},
        MetricError,
        "case-f1 does not fit these data",
    ),
    "exit layer": ({}, {"exit_layer": 6}, OptionError, "--exit-layer 6 is outside the decoder of 6 layers"),
    "depth of CALM": ({}, {"calm_min_layer": 0}, OptionError, "--calm-min-layer 0 is outside"),
    "depth": ({}, {"depths": (9,)}, OptionError, "--depth 9 is outside the decoder"),
    "threshold": ({}, {"thresholds": (1.0,)}, OptionError, "--threshold 1 is out of range"),
    "precision": ({}, {"precision": "bf16"}, GraphError, "target cpu has no precision bf16; choose --precision fp32"),
    "row": ({}, {"rows": ("fre",)}, OptionError, "--rows 'fre' is unknown; choose from full, eager"),
    "no measured row": ({}, {"rows": ("eager-exits",)}, OptionError, "--rows eager-exits measures nothing; add some"),
    "steps and epochs": ({}, {"steps": 1, "epochs": 1.0}, OptionError, "--steps and --epochs contradict"),
    "device": ({}, {"device": "cuda:7"}, OptionError, "device cuda:7 is not there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_input_is_refused_in_one_line_before_any_work(name: str, checkpoint: Directory, tmp_path: Path) -> None:
    data, changes, error, message = BROKEN[name]
    given = options(write_splits(tmp_path / "data", **data), checkpoint(T5), **changes)
    with pytest.raises(error, match=message) as raised:
        checked_options(given)
    assert isinstance(raised.value, FreeExportError)
    assert "\n" not in str(raised.value)
    assert not given.output.exists()


def test_missing_split_is_named(checkpoint: Directory, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data")
    (data / "validation.jsonl").rename(data / "calibration.jsonl")
    assert checked_options(options(data, checkpoint(T5))).options.validation == data / "calibration.jsonl"
    (data / "calibration.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no calibration.jsonl or validation.jsonl; convert that split by"):
        checked_options(options(data, checkpoint(T5)))


def test_missing_package_is_named_before_any_work(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_check, "find_spec", lambda name: None if name == "peft" else name)
    given = options(write_splits(tmp_path / "data"), checkpoint(T5))
    with pytest.raises(OptionError, match="peft is not installed; run: pip install"):
        checked_options(given)
    checked_options(replace(given, rows=("full",)))


def test_insufficient_memory_is_refused_on_a_cpu_and_on_a_gpu(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(write_splits(tmp_path / "data"), checkpoint(T5))
    with monkeypatch.context() as patch:
        patch.setattr(compare_check, "available_memory", lambda: 1000)
        with pytest.raises(OptionError, match=r"training needs at least .*, and 1 kB are free"):
            checked_options(given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine = Machine(monkeypatch)
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 2000, 4000))
    with pytest.raises(CapacityError, match=r"training needs \d+ bytes of device .*, and 2000 are free"):
        checked_options(replace(given, device="cuda:0"))
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 1 << 40, 1 << 40))
    checked = checked_options(replace(given, device="cuda:0"))
    assert checked.options.rows == ROWS
    assert "not yet been run on a GPU" in checked.notes[0]


def test_gpu_engines_have_a_default_precision_and_refuse_others(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine = Machine(monkeypatch)
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 1 << 40, 1 << 40))
    monkeypatch.setattr(compare_check, "import_tensorrt", lambda: None)
    given = options(write_splits(tmp_path / "data"), checkpoint(T5), device="cuda:0")
    found = {engines: checked_options(replace(given, engines=engines)) for engines in ("cuda", "tensorrt")}
    assert {engines: one.options.precision for engines, one in found.items()} == {"cuda": "fp32", "tensorrt": "fp16"}
    with pytest.raises(GraphError, match="tensorrt has no precision fp32; choose --precision fp16 or bf16"):
        checked_options(replace(given, engines="tensorrt", precision="fp32"))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EngineError, match="needs ONNX Runtime with CUDA"):
        checked_options(given)


def test_insufficient_disk_space_is_refused_unless_the_run_already_used_it(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(write_splits(tmp_path / "data"), checkpoint(T5))
    monkeypatch.setattr(compare_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OptionError, match=r"need about .* of disk, and 1 kB are free at .*; choose another --output"):
        checked_options(given)
    given.output.mkdir()
    (given.output / "written").write_bytes(bytes(10_000_000))
    checked_options(given)


def test_rows_that_need_a_t5_are_skipped_for_other_models(checkpoint: Directory, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data")
    checked = checked_options(options(data, checkpoint(LLAMA), exit_layer=1, calm_min_layer=1))
    assert not {"eager-exits", "calm", "calm-single", "copying"} & set(checked.options.rows)
    assert "left out for llama: eager-exits, calm, calm-single, copying" in checked.notes[0]
    late, tiny = checked_options(options(data, checkpoint(T5))).notes
    assert late.startswith("CALM may exit only after layer 4 of 6, so it exits late or never")
    assert "eager PyTorch spends its time on calls" in tiny
    assert len(checked_options(options(data, checkpoint(T5), calm_min_layer=2)).notes) == 1


def test_memory_and_disk_count_what_the_plan_has() -> None:
    assert training_memory(options(Path()), 10) == 160
    assert training_memory(options(Path(), rows=("lora",)), 10) == 40
    free = options(Path(), rows=("free",), precision="fp16", seeds=(0, 1))
    assert needed_disk(free, 10) == 2 * (2 * 40 + 2 * 20) + 160
    assert needed_disk(replace(free, device="cuda:0", engines="tensorrt"), 10) == 2 * (2 * 40 + 2 * 40) + 160


def test_sync_passes_and_caches_cover_an_output_and_prompts_match_training(checkpoint: Directory) -> None:
    description = open_checkpoint(str(checkpoint(T5))).described()
    given = options(Path(), max_new_tokens=512, max_tokens=300).conversion(description, 2)
    assert (given.max_pending, given.capacity, given.encoder_capacity) == (256, 512, 300)
    assert options(Path(), max_new_tokens=30).conversion(description, 2).max_pending == 30


def test_inputs_are_truncated_as_in_training(checkpoint: Directory, tmp_path: Path) -> None:
    long = json.dumps({"input": "A long line of words.", "target": "b", "id": 7}) + "\n"
    given = options(write_splits(tmp_path / "data", test=long), checkpoint(T5), max_tokens=8, lines=5)
    given.output.mkdir()
    counts = compare._cut_data(given)
    assert counts["test"] == {"lines": 1, "cut": 1}
    line = json.loads((given.output / "test.jsonl").read_text())
    assert line == {"input": "A long ", "target": "b", "id": 7}  # the end of sequence is the eighth
    tokenizer = load_tokenizer(open_checkpoint(given.model))
    assert tokenizer(line["input"])["input_ids"] == tokenizer("A long line", truncation=True, max_length=8)["input_ids"]


def test_sessions_run_no_deep_pass_in_the_background(bundle: Bundles) -> None:
    for method in ("published", "adaptive"):
        entry = Entry("a", Bundle.open(bundle(T5)), (Setting(method),))
        records: Any = SimpleNamespace(last_state=lambda name, method: None)
        given: Any = SimpleNamespace(count=1, device="cpu")
        with open_paper_session(entry, given, records) as session:
            assert session._state.options.overlap is False


@pytest.mark.parametrize(
    ("prefix", "first"), [("", "rouge-l"), ("translate German to English: ", "bleu"), ("question: ", "squad-f1")]
)
def test_metrics_are_those_of_the_task(prefix: str, first: str, checkpoint: Directory, tmp_path: Path) -> None:
    test = json.dumps({"input": f"{prefix}a b c", "target": "A b c d."}) + "\n"
    checked = checked_options(options(write_splits(tmp_path / "data", test=test), checkpoint(T5)))
    assert checked.options.metrics[0] == first
    assert checked.options.static_depths == (2, 3, 4)
    assert checked.options.depths == (2,)


def test_seeds_are_combined_to_their_mean_and_range() -> None:
    score = {"value": 0.7, "relative": 1.1, "low": None, "high": None}
    other = row(token_speed=3.0, request_speed=2.5, threshold=0.7, scores={"rouge-l": score})
    both = pooled([row(), other], ["rouge-l"])
    assert (both["token_speed"], both["token_low"], both["token_high"]) == (2.5, 2.0, 3.0)
    assert (both["request_speed"], both["eager"]["request_speed"], both["threshold"]) == (2.0, 3.0, 0.6)
    assert both["scores"]["rouge-l"] == pytest.approx({"value": 0.6, "relative": 1.0, "low": 0.9, "high": 1.1})
    assert pooled([row()], ["rouge-l"]) == row()


def report(*rows: dict[str, Any], name: str = "main") -> dict[str, Any]:
    machine = {"processor": "a processor"}
    measured = {"machine": machine, "commit": "abc", "threads": 1, "lines": 3, "notes": ["a note"], "rows": list(rows)}
    about = {"recipe": "free", "description": "a loss", "exit_layer": 3, "seconds": 9, "sha256": "f" * 64}
    made = {"trainings": {"free-3": about}, "calibrations": {}, "measurements": {name: measured}}
    run = {"metrics": ["rouge-l"], "model": "m", "model_sha256": "e" * 64, "precision": "fp32", "device": "cpu"}
    run |= {"rounds": 1, "max_new_tokens": 8, "seeds": [0]}
    return {"run": run, "notes": [], "seeds": {"0": made}}


def test_tables_follow_the_paper_and_state_copying_has_its_own() -> None:
    full = row(method="full", setting="full", threshold=None, recipe="full", bundle="full-3")
    copied = row(method="calm-single", setting="calm-single 0.5")
    own = row(method="calm-single", setting="calm-single 0.5", recipe="calm-single", bundle="calm-single-3")
    found = report(copied, own, row(method="eager-free", setting="eager-free 0.5"), row(exit_rate=0.0), full)
    tables = rows_by_table(found)
    assert [one["method"] for one in tables["copying"]] == ["calm-single", "eager-free"]
    assert {one["method"] for one in tables["main"]} == {"full", "calm-single", "published", "eager-free"}
    shown = table_of("main", tables["main"], [metric_of("rouge-l")])
    cells = dict(zip(shown.columns, shown.rows[1], strict=True))
    assert (cells["method"], cells["per token#"], cells["per request#"]) == ("FREE", "2.00±0.10x", "1.50±0.10x")
    assert cells["exits#"] == "0%"  # an empty cell would say that no token can exit
    assert dict(zip(shown.columns, shown.rows[0], strict=True))["exits#"] == ""
    assert cells["per request, PyTorch#"].startswith("3.00±")
    page = as_page(found)
    assert "## Parallel decoding against state copying" in page
    assert "- a note" in page


def test_other_decoder_decodes_its_method() -> None:
    entry: Any = Entry("a", None, (Setting("other", 0.5),))  # type: ignore[arg-type]
    others = {("a", "other"): lambda setting, prompt, most: {"setting": setting.name, "prompt": prompt, "most": most}}
    work = Work([entry], [], [{1: [4, 5]}], False, others)
    assert work.decode(work.settings[0], 1, 9) == {"setting": "other 0.5", "prompt": [4, 5], "most": 9}


def train_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, because a child would import torch again."""
    monkeypatch.setattr(recipes, "run_child", lambda module, call, variables: recipes.main([call]))


def test_one_step_is_trained_and_one_line_decoded_per_method_first(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    given = options(write_splits(tmp_path / "data"), checkpoint(T5), thresholds=(0.3,), batch_tokens=128, threads=1)
    found = compare._check(checked_options(given).options)
    assert found["trained"] == ["free-3", "static-3"]
    assert found["precision"] == "fp32"
    assert {"full", "eager", "eager-free 0.3", "calm 0.3", "lossless", "adaptive"} <= set(found["decoded"])
    assert not (given.output / "check").exists()


def test_configuration_without_engine_support_fails_before_any_training(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise UnsupportedModelError("no kernel")

    train_here(monkeypatch)
    monkeypatch.setattr(compare, "convert", fail)
    given = options(write_splits(tmp_path / "data"), checkpoint(T5), rows=("free",), batch_tokens=128, threads=1)
    with pytest.raises(UnsupportedModelError, match="no kernel"):
        compare.compare(checked_options(given))
    assert sorted(path.name for path in given.output.iterdir()) == [RUN]


GPU: dict[str, Any] = {"device": "cuda:0", "max_new_tokens": 512, "max_tokens": 200}


@pytest.mark.slow
@pytest.mark.parametrize("case", [T5, UMT5, LONGT5], ids=lambda case: case.name)
def test_cuda_bundles_are_verified_with_the_options_of_a_run(case: Case, checkpoint: Directory, tmp_path: Path) -> None:
    given = options(tmp_path, precision="fp32", **GPU)
    manifest = compare._built(str(checkpoint(case)), tmp_path / "out", 1, given)
    assert (manifest.target, manifest.verified, manifest.max_pending) == ("cuda", True, 256)
    assert check_bundle(tmp_path / "out", load_table()) == []


@pytest.mark.tensorrt
@pytest.mark.parametrize("case", [BY_NAME["t5-larger-tied"], LONGT5], ids=lambda case: case.name)
def test_tensorrt_builds_the_engines_of_a_run(case: Case, checkpoint: Directory, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed (tools/gpu/tensorrt_environment.py)")
    given = options(tmp_path, engines="tensorrt", precision="fp16", **GPU)
    manifest = compare._built(str(checkpoint(case)), tmp_path / "out", 1, given)
    assert manifest.verified
    assert len(list((tmp_path / "out" / DIRECTORY).glob("*.engine"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tutorial_example_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "tutorial-paper.md").read_text()
    commands = page[page.index("    words=") : page.index("It shows the tables")]
    (tmp_path / "freeexport").symlink_to(root / "freeexport")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(root)}
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=variables, check=True)
    rows = json.loads((tmp_path / "words-results" / "report.json").read_text())["seeds"]["0"]["measurements"]
    assert {"published", "lossless", "calm", "eager-free"} <= {row["method"] for row in rows["main"]["rows"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_command_measures_every_row_and_continues(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch)
    data, out = write_splits(tmp_path / "data"), tmp_path / "out"
    sizes = ["--steps", 2, "--batch-tokens", 128, "--lines", 3, "--calibration-lines", 8, "--samples", 4]
    sizes += ["--threshold", 0.3, "--calm-min-layer", 2, "--max-new-tokens", 16, "--threads", 1]
    given = ["compare", checkpoint(T5), "--data", data, "--exit-layer", 3, "--output", out, *sizes]
    arguments = list(map(str, given))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "report.json").read_text())
    rows = [one for each in found["seeds"]["0"]["measurements"].values() for one in each["rows"]]
    methods = {one["method"] for one in rows}
    assert methods == {"full", "static", "published", "adaptive", "rollback", "lossless", *EAGER}
    assert {one["recipe"] for one in rows} >= {"free-kd-unif", "free-kd-last", "free-lora"}
    assert all(one["lines"] == 3 for one in rows)
    main_rows = found["seeds"]["0"]["measurements"]["main"]["rows"]
    assert all(one["eager"]["request_speed"] > 0 for one in main_rows)
    full, eager = (next(one for one in main_rows if one["method"] == name) for name in ("full", "eager"))
    loop = next(one for one in main_rows if one["method"] == "eager-full")
    assert (loop["token_speed"], loop["same"]) == (1, 1)
    assert eager["same"] == 1
    assert all(score["value"] == full["scores"][name]["value"] for name, score in eager["scores"].items())
    page = (out / "report.md").read_text()
    assert all(title in page for title in ("Early-exit methods", "FREE by layer mapping", "FREE by exit layer"))
    assert (out / "main.svg").exists()
    steps = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    again = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()} == steps
    assert (out / "report.md").read_text() == page
    assert set(ROWS) >= set(found["run"]["rows"])
