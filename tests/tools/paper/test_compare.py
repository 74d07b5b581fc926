"""The paper's comparison: its plan, its steps, its checks, its tables, and the whole command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, Bundles, Case
from click.testing import CliRunner
from fake_device import Machine

from freeexport.checkpoints.examples import DataError
from freeexport.evaluate.measure import Work
from freeexport.evaluate.settings import Entry, Setting
from freeexport.task_metrics import MetricError, metric_of
from runtime import Session
from runtime.bundle.bundle import Bundle
from runtime.errors import CapacityError, FreeExportError, OptionError
from tools.paper import compare_options, recipes
from tools.paper.__main__ import main
from tools.paper.compare import RUN
from tools.paper.compare_options import ROWS, CompareOptions, checked_options, needed_memory
from tools.paper.compare_plan import bundles_of, measurements_of, settings, trainings_of
from tools.paper.compare_report import as_page, pooled, rows_by_table, table_of
from tools.paper.eager import EagerDecoder
from tools.steps import Steps

T5 = BY_NAME["t5-deep-decoder"]
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
    facts = {"bundle": "free-3", "recipe": "free", "exit_layer": 3, "setting": "free 0.5", "method": "free"}
    rates = {"exit_rate": 0.5, "layers": 4.0, "tokens_per_second": 100.0, "predicted": None, "same": 1.0}
    found = {**facts, "threshold": 0.5, "calibrated": False, **rates, **speed, "scores": {"rouge-l": score}}
    return {**found, "eager": {**speed, "request_speed": 3.0}, **changes}


def test_the_plan_has_a_measurement_for_each_table_and_trains_each_checkpoint_once() -> None:
    given = options(Path(), static_depths=(2, 3, 4), depths=(2,))
    plan = measurements_of(given)
    names = [one.name for one in plan]
    assert names[:3] == ["main", "static/2", "static/4"]
    assert names[3:6] == ["mapping/free-kd-unif", "mapping/free-kd-last", "mapping/free"]
    assert names[6:] == ["depth/2", "depth/3", "samples", "lora"]
    methods = {one.name: one.methods for one in plan[0].contestants}
    assert methods["full-3"] == ("eager",)
    assert methods["free-3"] == ("free", "adaptive", "rollback", "calm-single")
    assert methods["static-3"] == ("static", "calm")
    trained = [one.name for one in trainings_of(plan)]
    assert len(trained) == len(set(trained)) == 8
    bundles = bundles_of(plan)
    assert bundles["static-3-at-2"].training is bundles["static-3"].training or not bundles["static-3"].calibrated
    assert bundles["free-3"].calibrated
    assert not bundles["full-3"].calibrated


def test_rows_can_be_chosen_and_leftover_teachers_dropped() -> None:
    plan = measurements_of(options(Path(), rows=("free", "mapping"), leftover="drop"))
    assert [one.name for one in plan[0].contestants] == ["full-3", "free-drop-3"]
    assert [one.table for one in plan] == ["main", "mapping", "mapping", "mapping"]
    assert plan[-1].contestants[0].training.recipe == "free-drop"


def test_each_method_has_a_setting_for_each_threshold_that_it_uses() -> None:
    free = measurements_of(options(Path()))[0].contestants[1]
    manifest: Any = SimpleNamespace(threshold=0.5, rollback_threshold=3.0)
    names = [one.name for one in settings(free, (0.3, 0.9), manifest)]
    assert names[:4] == ["full", "free 0.3", "free 0.5, calibrated", "free 0.9"]
    assert names[4:] == ["adaptive", "rollback 0.3", "rollback 0.9", "calm-single 0.3", "calm-single 0.9"]
    manifest.rollback_threshold = None
    assert "rollback" not in {one.method for one in settings(free, (0.3,), manifest)}


def test_a_finished_step_is_not_repeated_and_an_unfinished_one_leaves_nothing(tmp_path: Path) -> None:
    done: list[int] = []

    def work(number: int) -> dict[str, int]:
        done.append(number)
        if number < 0:
            raise OptionError("no")
        return {"number": number}

    out = tmp_path / "out"
    steps = Steps(out, RUN, {"seed": (0, 1)})
    assert not out.exists()
    assert steps.run("one", work, 1) == {"number": 1}
    with pytest.raises(OptionError, match="no"):
        steps.run("two", work, -1)
    again = Steps(out, RUN, {"seed": (0, 1)})
    assert (again.run("one", work, 7), again.run("two", work, 2)) == ({"number": 1}, {"number": 2})
    assert done == [1, -1, 2]


def test_a_run_resumed_with_other_options_and_a_foreign_directory_are_refused(tmp_path: Path) -> None:
    Steps(tmp_path / "out", RUN, {"lines": 3, "seed": 0}).run("one", dict)
    with pytest.raises(OptionError, match="holds another run, with other lines; repeat its options"):
        Steps(tmp_path / "out", RUN, {"lines": 4, "seed": 0})
    with pytest.raises(OptionError, match=f"is no output of this command \\(no {RUN}\\)"):
        Steps(tmp_path, RUN, {})


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
    "steps and epochs": ({}, {"steps": 1, "epochs": 1.0}, OptionError, "--steps and --epochs contradict"),
    "device": ({}, {"device": "cuda:7"}, OptionError, "device cuda:7 is not there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_refused_in_one_line_before_any_work(name: str, checkpoint: Directory, tmp_path: Path) -> None:
    data, changes, error, message = BROKEN[name]
    given = options(write_splits(tmp_path / "data", **data), checkpoint(T5), **changes)
    with pytest.raises(error, match=message) as raised:
        checked_options(given)
    assert isinstance(raised.value, FreeExportError)
    assert "\n" not in str(raised.value)
    assert not given.output.exists()


def test_a_missing_split_is_named(checkpoint: Directory, tmp_path: Path) -> None:
    data = write_splits(tmp_path / "data")
    (data / "validation.jsonl").rename(data / "calibration.jsonl")
    assert checked_options(options(data, checkpoint(T5))).options.validation == data / "calibration.jsonl"
    (data / "calibration.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no calibration.jsonl or validation.jsonl; convert that split by"):
        checked_options(options(data, checkpoint(T5)))


def test_too_little_memory_is_refused_on_a_cpu_and_on_a_gpu(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(write_splits(tmp_path / "data"), checkpoint(T5))
    with monkeypatch.context() as patch:
        patch.setattr(compare_options, "available_memory", lambda: 1000)
        with pytest.raises(OptionError, match=r"training needs at least .*, and 1 kB are free"):
            checked_options(given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    machine = Machine(monkeypatch)
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 2000, 4000))
    with pytest.raises(CapacityError, match=r"training needs \d+ bytes of device .*, and 2000 are free"):
        checked_options(replace(given, device="cuda:0"))
    monkeypatch.setattr(machine.cuda, "cudaMemGetInfo", lambda: (0, 1 << 40, 1 << 40))
    checked = checked_options(replace(given, device="cuda:0"))
    assert "calm" not in checked.options.rows
    assert "left out on cuda:0: calm, calm-single, copying" in checked.notes[0]
    assert "not yet been run on a GPU" in checked.notes[1]


def test_memory_counts_the_bundles_of_the_largest_measurement() -> None:
    every = needed_memory(options(Path()), 10)
    assert every == {"training": 160, "the measurement": 4 * 4 * 10 + 40}
    assert needed_memory(options(Path(), rows=("free",), precision="int8"), 10)["the measurement"] == 20
    assert needed_memory(options(Path(), rows=("lora",)), 10)["training"] == 40


@pytest.mark.parametrize(
    ("prefix", "first"), [("", "rouge-l"), ("translate German to English: ", "bleu"), ("question: ", "squad-f1")]
)
def test_the_metrics_are_those_of_the_task(prefix: str, first: str, checkpoint: Directory, tmp_path: Path) -> None:
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
    found = report(copied, own, row(), full)
    tables = rows_by_table(found)
    assert [(one["method"], one["recipe"]) for one in tables["main"]] == [
        ("full", "full"),
        ("calm-single", "calm-single"),
        ("free", "free"),
    ]
    assert [one["method"] for one in tables["copying"]] == ["calm-single", "free"]
    shown = table_of("main", tables["main"], [metric_of("rouge-l")])
    cells = dict(zip(shown.columns, shown.rows[-1], strict=True))
    assert (cells["method"], cells["per token#"], cells["per request#"]) == ("FREE", "2.00±0.10x", "1.50±0.10x")
    assert cells["per request, PyTorch#"].startswith("3.00±")
    page = as_page(found)
    assert "## Parallel decoding against state copying" in page
    assert "- a note" in page


def test_another_decoder_decodes_its_method() -> None:
    entry: Any = Entry("a", None, (Setting("other", 0.5),))  # type: ignore[arg-type]
    others = {("a", "other"): lambda setting, prompt, most: {"setting": setting.name, "prompt": prompt, "most": most}}
    work = Work([entry], [], [{1: [4, 5]}], False, others)
    assert work.decode(work.settings[0], 1, 9) == {"setting": "other 0.5", "prompt": [4, 5], "most": 9}


def test_eager_pytorch_gives_the_tokens_of_the_full_model(bundle: Bundles, checkpoint: Directory) -> None:
    path = bundle(T5)
    decoder = EagerDecoder(Bundle.open(path), str(checkpoint(T5)), "cpu", threads=1)
    with Session(path, threads=1, slots=1) as session:
        assert session.tokenizer is not None
        prompt = np.array(session.tokenizer.encode("one two three"), np.int64)
        full = session.generate(prompt, mode="full", max_new_tokens=8)
    made = decoder.decode(Setting("eager"), prompt, 8)
    assert (made["token_ids"], made["text"], made["finish_reason"]) == (full.token_ids, full.text, full.finish_reason)
    assert made["exited"] == (False,) * made["tokens"]
    assert 0 < made["first_seconds"] < made["seconds"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_command_measures_every_row_and_continues(
    checkpoint: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A child would import torch again.
    monkeypatch.setattr(recipes, "run_child", lambda module, call, variables: recipes.main([call]))
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
    assert methods == {"full", "eager", "static", "calm", "calm-single", "free", "adaptive", "rollback"}
    assert {one["recipe"] for one in rows} >= {"free-kd-unif", "free-kd-last", "free-lora"}
    assert all(one["lines"] == 3 for one in rows)
    main_rows = found["seeds"]["0"]["measurements"]["main"]["rows"]
    assert all(one["eager"]["request_speed"] > 0 for one in main_rows)
    full, eager = (next(one for one in main_rows if one["method"] == name) for name in ("full", "eager"))
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
