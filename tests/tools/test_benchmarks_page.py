from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_settings
import pytest
from click.testing import CliRunner, Result

from freeexport.benchmark.report import Report, as_dict
from freeexport.benchmark.rows import Row
from tools.benchmarks_page import main

SETTINGS = {**bench_settings.SETTINGS, "rounds": 3, "compared_with": None}


def row(name: str, **changes: Any) -> Row:
    figures = {"tokens_per_second": 12.34, "spread": 0.02, "ratio": 1.0, "decode_per_second": 13, "first_token_ms": 50,
               "token_ms": 80, "token_ms_95": 90, "peak_bytes": 5 * 10**8}  # fmt: skip
    return Row(name, "fp32", **{**figures, **changes})


def write(path: Path, *rows: Row, **settings: Any) -> Path:
    found = as_dict(Report({**SETTINGS, **settings}, list(rows), {"genai": "no wheel"}, 2e10))
    path.write_text(json.dumps(found))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_a_section_a_file_with_every_row_and_reason(tmp_path: Path) -> None:
    first = write(tmp_path / "1-smol-fp32.json", row("hf"), row("full", ratio=2.5, roofline=0.61, predicted=None))
    second = write(tmp_path / "other.json", row("a|b"))
    page = tmp_path / "page.md"
    assert run(first, second, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.index("## smol fp32") < text.index("## other")
    assert "| full | fp32 | 12.3 | 2% | 2.50x | 50 | 80.0 | 90.0 | 500 MB | 61% |" in text
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


def test_figures_of_a_busy_machine_and_of_another_schema_are_refused(tmp_path: Path) -> None:
    busy = write(tmp_path / "busy.json", row("hf"), idle=False)
    assert "busy machine" in run(busy, "--out", tmp_path / "page.md").output
    other = tmp_path / "other.json"
    other.write_text(write(tmp_path / "run.json", row("hf")).read_text().replace('"schema": 1', '"schema": 7'))
    assert "schema 7, not 1" in run(other, "--out", tmp_path / "page.md").output


def test_the_page_in_the_documentation_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    figures = sorted(Path("docs/benchmarks").glob("*.json"))
    assert figures
    assert run(*figures, "--check").exit_code == 0
