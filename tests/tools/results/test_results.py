"""The README's rows: declared, measured once, recorded as looks, and shown."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from freeexport.checkpoints.examples import read_examples
from tools.data.prompts import KINDS
from tools.data.splits import TEST_LINES
from tools.results import measure as measuring
from tools.results import pages
from tools.results.measure import LOOKS, RESULTS, measure_row, result_file
from tools.results.rows import CALIBRATION_LINES, ORDINARY, RISK, ROWS, Data, ResultRow

command = import_module("tools.results.__main__")
ROOT = Path(__file__).resolve().parents[3]
MADE = "2025-01-02T03:04:05+00:00"


def test_the_committed_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(command.main, ["pages", "--check"])
    assert done.exit_code == 0, done.output


def test_every_row_is_planned_with_its_time_and_reads_no_more_lines_than_a_version_has(tmp_path: Path) -> None:
    done = CliRunner().invoke(command.main, ["measure", "--output", str(tmp_path), "--plan"])
    assert done.exit_code == 0, done.output
    assert all(f"{name}: " in done.output for name in ROWS)
    assert list(tmp_path.iterdir()) == []
    # Rule `risk` cannot choose a threshold from fewer sequences.
    assert (1 - RISK) ** CALIBRATION_LINES < 0.05
    for row in ROWS.values():
        assert row.lines <= TEST_LINES
        assert row.calibrated == ("free" in row.methods)
        assert {"full", "lossless"} <= set(row.methods)


def ordinary(path: Path) -> tuple[list[str], set[str]]:
    """Read ordinary prompts: their texts, and their subjects."""
    messages = [line.text for line in read_examples(path)]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert messages == [line["input"] for line in lines]
    assert all(line.keys() - {"source"} == {"input", "subject"} for line in lines)
    assert all([one["role"] for one in line["input"]] == ["user"] for line in lines)
    return [line["input"][0]["content"] for line in lines], {line["subject"] for line in lines}


@pytest.mark.parametrize(
    ("version", "count", "subjects"),
    [(1, 150, 25), (2, 150, 30), (3, 300, 79), (4, 300, 207), (5, 300, 94), (7, 278, 2)],
)
def test_ordinary_prompts_follow_no_template(version: int, count: int, subjects: int) -> None:
    texts, found = ordinary(ORDINARY[version - 1])
    assert (len(texts), len(set(texts)), len(found)) == (count, count, subjects)
    assert all(10 <= len(text) <= 2000 and text == text.strip() for text in texts)
    # What stands before the first placeholder, where that says something.
    templates = [template.partition("{")[0] for kind in KINDS.values() for template in kind]
    beginnings = tuple(text for text in templates if len(text) > 12)
    assert [text for text in texts if text.startswith(beginnings)] == []


def test_no_ordinary_prompt_resembles_one_of_another_version() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        # A text of fewer words is one gram.
        return {tuple(words[at : at + 4]) for at in range(max(1, len(words) - 3))}

    versions = [[grams(text) for text in ordinary(path)[0]] for path in ORDINARY]
    for first, second in combinations(versions, 2):
        shared = max(len(one & other) / min(len(one), len(other)) for one in first for other in second)
        # Version 6 was measured before its 12 prompts with 20 to 30 % were noticed.
        assert shared < (0.3 if second is versions[5] else 0.2)
    assert len(ordinary(ORDINARY[1])[1] - ordinary(ORDINARY[0])[1]) >= 12


@pytest.fixture
def row(tmp_path: Path, bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> ResultRow:
    """A row of a tiny model and of data that need not be built."""
    path = bundle(BY_NAME["t5-relu-tied"])
    monkeypatch.setattr(measuring, "converted", lambda row, output: path)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": text}) + "\n" for text in ("one two", "five six", "x")))
    chat = ROWS["ordinary-chat-int8"]
    return replace(chat, data=Data("prompts", "prompts, version 1", file=data), lines=2, max_new_tokens=8)


def test_a_measurement_writes_its_result_and_a_look(tmp_path: Path, row: ResultRow) -> None:
    measure_row(row, tmp_path / "out", tmp_path)
    found = json.loads(result_file(row, tmp_path).read_text())
    assert [one["method"] for one in found["evaluation"]["rows"]] == ["full", "lookup", "phrases", "lossless"]
    assert found["evaluation"]["lines"] == 2
    assert {"commit", "data_sha256", "versions"} <= set(found["evaluation"])
    assert str(tmp_path) not in json.dumps(found)
    (look,) = [json.loads(line) for line in (tmp_path / LOOKS).read_text().splitlines()]
    assert (look["split"], look["lines"], look["trained_after"]) == ("prompts, version 1", 2, False)


def test_a_trial_decodes_calibration_lines_and_records_nothing(
    tmp_path: Path, row: ResultRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(*arguments: str) -> None:
        asked.append(arguments)
        out = Path(next(argument for argument in arguments if argument.endswith("records")))
        out.mkdir(parents=True)
        (out / "dataset.json").write_text('{"snapshot": 1}')
        for split in ("calibration", "test"):
            text = json.dumps({"input": f"one {split}", "target": "x"})
            (out / f"{split}.jsonl").write_text(text + "\n")

    monkeypatch.setattr(measuring, "run_command", run)
    records = replace(row, data=ROWS["records-int8"].data, calibrated=True, methods=("full", "free"))
    found = measure_row(records, tmp_path / "out", tmp_path, trial=1)
    (arguments,) = asked
    assert arguments[1:5] == ("-m", "tools.data.debian", "extraction", str(tmp_path / "out" / "data" / "records"))
    assert "--test-version" in arguments
    assert [one["setting"] for one in found["evaluation"]["rows"]] == ["full", "free 0.9"]
    assert found["dataset"] == {"snapshot": 1}
    outputs = tmp_path / "out" / "evaluations"
    assert not (tmp_path / LOOKS).exists()
    assert not result_file(records, tmp_path).exists()
    assert [path.name for path in outputs.iterdir()] == [f"{row.name}-trial"]


def report(row: ResultRow, speed: float) -> dict[str, Any]:
    def setting(method: str, speed: float) -> dict[str, Any]:
        bounds = {f"{of}_{name}": speed for of in ("token", "request") for name in ("speed", "low", "high")}
        score = {row.quality: {"relative": 0.996, "low": 0.99, "high": 1.0}}
        facts = {"bundle": "b", "setting": method, "precision": row.engines.precision, "lines": 150, "predicted": 2.0}
        same = 0.9 if method == "free" else 1.0
        more = {"calibrated": method == "free", "same": same, "tokens_per_second": 99.0, "scores": score}
        return {"method": method, **bounds, **facts, **more}

    return {
        "made": MADE,
        "commit": "0123456789",
        "machine": {"processor": "P", "kernels": "avx2", "features": []},
        "bundles": {"b": {}},
        "threads": 2,
        "rounds": 1,
        "lines": 150,
        "metrics": {row.quality: ""},
        "verdicts": [],
        "rows": [setting("full", 1.0), *(setting(method, speed) for method in row.methods[1:])],
    }


def test_the_tables_have_both_precisions_quality_hardware_and_what_loses(tmp_path: Path) -> None:
    (tmp_path / pages.OLDER).write_text("{}")
    (tmp_path / LOOKS).write_text(
        json.dumps(
            {"date": "2025-01-02", "commit": "ab", "split": "s", "lines": 9, "result": "r", "trained_after": True}
        )
        + "\n"
    )
    assert "Not measured yet" in pages.readme_table(tmp_path)
    for name, speed in (("records-int8", 2.15), ("records-int4", 1.6), ("ordinary-chat-int4", 0.97)):
        content = {"row": name, "evaluation": report(ROWS[name], speed)}
        result_file(ROWS[name], tmp_path).write_text(json.dumps(content))
    table = pages.readme_table(tmp_path)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {line.count("|") for line in rows} == {5}
    assert "int8 **2.15x ±0.00**" in rows[2]
    assert "int4 **1.60x ±0.00**" in rows[2]
    assert "FREE 99.6±0.5 % of chrf" in rows[2]
    assert "P (avx2 kernels), 2 threads, 150 test lines per row." in table
    assert "Slower than `full`: lossless on ordinary-chat-int4 (0.97x), text drafts alone" in table
    index = pages.index(tmp_path)
    assert index.count("[readme-") == 3
    assert "2025-01-02, 0123456" in index
    assert "| 2025-01-02 | ab | s | 9 | r | yes |" in index


def test_the_committed_results_name_their_commits() -> None:
    older = json.loads((RESULTS / pages.OLDER).read_text())
    for name, found in pages.results(RESULTS):
        assert found.get("commit") or older[name], name


def test_the_committed_results_have_no_path_of_a_machine() -> None:
    for path in RESULTS.glob("*.json"):
        assert not re.search(r'"(/|[A-Z]:\\)[^"]*/[^"]*"', path.read_text()), path.name
