"""The command that measures all steps, and the pages made from its reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tools.peers import __main__ as command
from tools.peers import pages
from tools.peers.plan import STEPS, steps_of
from tools.peers.run import Conditions, measure_step

ROOT = Path(__file__).resolve().parents[3]
FIGURE = {"seconds": 0.5, "spread": 0.1, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
OURS = {
    "name": "freeexport int8",
    "precision": "int8",
    "read": 0,
    "written": 64,
    "beams": 1,
    "rows": 1,
    "request": FIGURE,
    "first": {**FIGURE, "seconds": 0.01},
    "peak_bytes": 3_000_000,
}
THEIRS = {
    **OURS,
    "name": "llama-cpp-q8",
    "request": {**FIGURE, "seconds": 1.0, "ratio": 2.0, "ratio_low": 1.8, "ratio_high": 2.1},
    "first": {**FIGURE, "seconds": 0.02},
}
STEP = {
    "title": "SmolLM2-135M, int8",
    "page": "benchmarks",
    "figure": "request",
    "kind": "requests",
    "model": "a|b.gguf",
    "threads": 2,
    "rounds": 5,
    "trial": False,
    "busy": 1.2,
    "made": "2026-11-30T12:00:00+00:00",
    "machine": {"processor": "AMD EPYC", "features": ["avx2"], "cores": 2, "kernels": "avx2"},
    "versions": {"freeexport": "0.2.0", "onnxruntime": "1.2"},
    "commit": "12345678" * 5 + "-dirty",
    "flags": {"freeexport int8": "mode full", "llama-cpp-q8": "-DGGML_NATIVE=ON, AVX2"},
    "rows": [OURS, THEIRS],
    "failed": {"genai": "not installed"},
}


COMPARED = {"same": 0.5, "same_low": 0.4, "same_high": 0.6, "next": 0.96}
FIDELITY = {
    **STEP,
    "title": "Same tokens as fp32",
    "kind": "fidelity",
    "rows": [
        {**{name: OURS[name] for name in ("name", "precision")}, **COMPARED},
        {"name": "llama-cpp-q8", "precision": "8 bits", **COMPARED, "same": 1.0},
    ],
}


def report(*names: str, **changes: Any) -> str:
    return json.dumps({"schema": pages.SCHEMA, "steps": {name: {**STEP, **changes} for name in names}})


def write_docs(root: Path, **files: str) -> None:
    (root / "docs" / "benchmarks").mkdir(parents=True)
    (root / "docs" / "results").mkdir()
    for name, text in files.items():
        (root / "docs" / "benchmarks" / f"1-{name}.json").write_text(text)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command.main, [*map(str, arguments)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure nothing; list the steps."""
    found: list[str] = []

    def measure(step: Any, conditions: Any) -> dict[str, Any]:
        found.append(step.name)
        if len(found) == 2:
            raise KeyboardInterrupt
        return STEP

    monkeypatch.setattr(command, "measure_step", measure)
    return found


def test_run_continues_and_refuses_other_options(tmp_path: Path, measured: list[str]) -> None:
    given = ("all", "--output", tmp_path / "out", "--steps", "decode-int8,rows")
    assert run(*given).exit_code == 1
    assert measured == ["decode-int8", "rows-int8"]
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert measured == ["decode-int8", "rows-int8", "rows-int8", "rows-int4"]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["steps"]) == ["decode-int8", "rows-int8", "rows-int4"]
    for changed in (("--rounds", "2"), ("--threads", "64"), ("--trial",), ("--against", "hf")):
        refused = run(*given, *changed)
        assert changed[0].strip("-") in str(refused.exception)
        assert len(measured) == 4
    assert run("all", "--output", tmp_path / "out", "--steps", "server").exit_code == 0
    assert measured[-1] == "server"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--steps", "decode-int9"), "'decode-int9' is no step; choose from decode-fp32"),
        (("--against", "faster-whisper"), "it is not installed"),
        (("--model", "smollm2"), "is not NAME=CHECKPOINT"),
    ],
)
def test_invalid_options_are_refused_before_writing(
    given: tuple[str, str], said: str, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused = run("all", "--output", tmp_path / "out", *given)
    assert refused.exit_code == 1
    assert said in str(refused.exception)
    assert not measured
    assert not (tmp_path / "out").exists()


def test_name_prefix_selects_its_steps() -> None:
    assert [step.name for step in steps_of("rows,decode-int4")] == ["rows-int8", "rows-int4", "decode-int4"]
    assert steps_of(None) == list(STEPS.values())


def test_pages_show_every_row_and_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = [{**row, "read": 40, "first": {**row["first"], "seconds": 0.25}} for row in (OURS, THEIRS)]
    prompts = {**STEP, "page": "peers", "figure": "first", "busy": 0.0, "rows": [OURS, THEIRS, *longer]}
    steps = json.dumps(
        {"schema": pages.SCHEMA, "steps": {"decode-int8": STEP, "fidelity": FIDELITY, "prompts": prompts}}
    )
    write_docs(tmp_path, **{"AMD-EPYC": steps})
    monkeypatch.chdir(tmp_path)
    assert run("pages").exit_code == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## AMD EPYC\n" in text
    assert "| freeexport int8 | 128.0 (10%) | 10.0 |  | 3 MB |" in text
    assert "| freeexport int8 | 50% (40 to 60) | 96.0% |" in text
    assert "| llama-cpp-q8 | 64.0 (10%) | 20.0 | 2.00x (1.80 to 2.10) | 3 MB |" in text
    assert "| 8 bits, AVX2 |  | 64.0 (10%, 100%) |  |  | **128.0** (10%, 50%) |" in text
    for said in (
        "Not run: genai (not installed).",
        "a|b.gguf, 2 threads, medians of 5 interleaved rounds",
        f"2026-11-30, commit {'12345678' * 5}-dirty",
        "freeexport 0.2.0, onnxruntime 1.2",
        "llama-cpp-q8: -DGGML_NATIVE=ON, AVX2",
        "Other processes kept 1.2 cores busy",
    ):
        assert said in text.replace("\n  ", " ")
    prompts_page = (tmp_path / "docs" / "results" / "peers.md").read_text()
    assert "| decoder | 0 read | 40 read |" in prompts_page
    assert "| llama-cpp-q8 | 20.0 (10%) | 250 (10%) |" in prompts_page
    assert "Cells: ms to the first token, and in brackets the spread between rounds." in prompts_page
    assert run("pages", "--check").exit_code == 0
    (tmp_path / "docs" / "benchmarks.md").write_text(text.replace("128.0", "129.0"))
    assert "benchmarks.md is not what it is made from" in run("pages", "--check").output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (report("decode-int8", trial=True), "has trials (decode-int8)"),
        (json.dumps({"schema": 1, "steps": {}}), "is of schema 1, not 3"),
        ("[]", "is no report of tools.peers"),
    ],
)
def test_files_that_are_not_results_are_refused(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_docs(tmp_path, broken=text)
    monkeypatch.chdir(tmp_path)
    assert said in run("pages").output
    assert not (tmp_path / "docs" / "benchmarks.md").exists()


def test_committed_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = run("pages", "--check")
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_freeexport_is_measured_with_the_reference(tmp_path: Path) -> None:
    """A whole step with real weights, in a trial."""
    left_out = dict.fromkeys(STEPS["decode-int8"].peers, "not asked for")
    conditions = Conditions(tmp_path, {}, left_out, rounds=1, threads=1, trial=True)
    found = measure_step(STEPS["decode-int8"], conditions)
    assert [row["name"] for row in found["rows"]] == ["freeexport int8", "freeexport int8 --activations int16"]
    for row in found["rows"]:
        assert "mode full" in found["flags"][row["name"]]
    assert pages.section(found)
