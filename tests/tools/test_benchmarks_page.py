from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from freeexport.measure.bench import Row, report
from tools.benchmarks_page import main

SETTINGS: dict[str, Any] = {
    "freeexport": "0.2.0",
    "model": "tiny",
    "exit_layer": "1 of 4",
    "threads": 2,
    "batch": 1,
    "prompts": 2,
    "tokens": 4,
    "rounds": 3,
    "decoding": "greedy",
    "compared_with": None,
    "cpu": "some CPU",
    "cpu_features": ["avx2"],
    "cores": 2,
    "memory": 8 << 30,
    "idle": True,
}


def row(name: str, **changes: Any) -> Row:
    figures = {"tokens_per_second": 12.34, "spread": 0.02, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.1,
               "decode_per_second": 13, "first_token_ms": 50, "token_ms": 80,
               "token_ms_95": 90, "peak_bytes": 5 * 10**8}  # fmt: skip
    return Row(name, "fp32", **{**figures, **changes})


def write(path: Path, *rows: Row, **settings: Any) -> Path:
    found = report(rows, {**SETTINGS, **settings}, 2e10, [], {"genai": "no wheel"})
    path.write_text(json.dumps(found))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_section_a_file_with_every_row_and_reason(tmp_path: Path) -> None:
    first = write(tmp_path / "1-smol-fp32.json", row("hf"), row("full", ratio=2.5, roofline=0.61))
    second = write(tmp_path / "other.json", row("a|b"))
    page = tmp_path / "page.md"
    assert run(first, second, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.index("## smol fp32") < text.index("## other")
    assert "| full | 12.3 | 2% | 2.50±0.10x | 50 | 80.0 | 90.0 | 61% |" in text
    assert "- genai: not run: no wheel" in text
    assert "2 threads read 20.0 GB/s" in text
    assert "| a\\|b |" in text
    # Columns that a file has nothing for are not in its table.
    assert text.count("roofline") == 1


def test_check_fails_where_the_page_was_changed_by_hand(tmp_path: Path) -> None:
    figures, page = write(tmp_path / "run.json", row("hf")), tmp_path / "page.md"
    assert "is not what the figures say" in run(figures, "--out", page, "--check").output
    run(figures, "--out", page)
    assert run(figures, "--out", page, "--check").exit_code == 0
    page.write_text(page.read_text().replace("12.3", "99.9"))
    assert run(figures, "--out", page, "--check").exit_code == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "settings": {}}'])
def test_files_without_figures_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    result = run(tmp_path / "run.json", "--out", tmp_path / "page.md")
    assert result.exit_code == 1
    assert "holds no figures" in result.output
    assert not (tmp_path / "page.md").exists()


def test_figures_of_a_busy_machine_are_marked_and_of_another_schema_refused(tmp_path: Path) -> None:
    busy = write(tmp_path / "busy.json", row("hf"), idle=False, busy=1.2)
    assert run(busy, "--out", tmp_path / "page.md").exit_code == 0
    assert "other processes kept 1.2 cores busy" in (tmp_path / "page.md").read_text()
    other = tmp_path / "other.json"
    other.write_text(write(tmp_path / "run.json", row("hf")).read_text().replace('"schema": 1', '"schema": 7'))
    assert "schema 7, not 1" in run(other, "--out", tmp_path / "page.md").output


def test_the_page_in_the_documentation_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    figures = sorted(Path("docs/benchmarks").glob("*.json"))
    assert figures
    assert run(*figures, "--check").exit_code == 0
