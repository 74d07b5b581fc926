"""docs/benchmarks.md, from the figures that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tools.benchmarks_page import main

FIGURES = sorted((Path(__file__).parents[2] / "docs" / "benchmarks").glob("*.json"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def changed(path: Path, **settings: Any) -> Path:
    found = json.loads(FIGURES[0].read_text())
    found["settings"] |= settings
    found["rows"][0]["name"] = "a|b"
    found["failed"] = {"genai": "no wheel"}
    path.write_text(json.dumps(found))
    return path


def test_a_section_a_file_with_every_row_and_reason(tmp_path: Path) -> None:
    first, second = changed(tmp_path / "1-smol-fp32.json"), changed(tmp_path / "other.json", idle=False, busy=1.2)
    page = tmp_path / "page.md"
    assert run(first, second, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.index("## smol fp32") < text.index("## other")
    for row in json.loads(first.read_text())["rows"][1:]:
        assert text.count(f"| {row['name']} |") == 2
    assert text.count("| a\\|b |") == 2
    assert text.count("- genai: not run: no wheel") == 2
    assert text.count("other processes kept 1.2 cores busy") == 1  # marked, not refused


def test_check_fails_where_the_page_was_changed_by_hand(tmp_path: Path) -> None:
    figures, page = changed(tmp_path / "run.json"), tmp_path / "page.md"
    assert "is not what the figures say" in run(figures, "--out", page, "--check").output
    run(figures, "--out", page)
    assert run(figures, "--out", page, "--check").exit_code == 0
    page.write_text(page.read_text().replace("GB/s", "TB/s"))
    assert run(figures, "--out", page, "--check").exit_code == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no figures"),
        ("[]", "holds no figures"),
        ('{"schema": 1, "settings": {}}', "holds no figures"),
        ('{"schema": 7, "settings": {"idle": true}}', "schema 7, not 1"),
    ],
)
def test_files_without_figures_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    result = run(tmp_path / "run.json", "--out", tmp_path / "page.md")
    assert result.exit_code == 1
    assert said in result.output
    assert not (tmp_path / "page.md").exists()


def test_the_page_in_the_documentation_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert run(*(path.relative_to(Path.cwd()) for path in FIGURES), "--check").exit_code == 0
