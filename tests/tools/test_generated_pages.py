"""docs/benchmarks.md and docs/options.md, from what they are made of."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from runtime import GenerationOptions, SessionOptions
from tools import options_page
from tools.benchmarks_page import main

ROOT = Path(__file__).resolve().parents[2]
FIGURES = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def changed(path: Path, **settings: Any) -> Path:
    found = json.loads(FIGURES[0].read_text())
    found["settings"] |= settings
    found["rows"][0]["name"] = "a|b"
    found["failed"] = {"genai": "no wheel"}
    path.write_text(json.dumps(found))
    return path


def test_the_pages_of_the_documentation_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert run(*(path.relative_to(Path.cwd()) for path in FIGURES), "--check").exit_code == 0
    assert CliRunner().invoke(options_page.main, ["--check"]).exit_code == 0


def test_a_section_a_file_with_every_row_and_reason(tmp_path: Path) -> None:
    first, second = changed(tmp_path / "1-smol-fp32.json"), changed(tmp_path / "other.json", idle=False, busy=1.2)
    page = tmp_path / "page.md"
    assert "is not what the figures say" in run(first, second, "--out", page, "--check").output
    assert run(first, second, "--out", page).exit_code == 0
    text = page.read_text()
    assert text.index("## smol fp32") < text.index("## other")
    for row in json.loads(first.read_text())["rows"][1:]:
        assert text.count(f"| {row['name']} |") == 2
    assert text.count("| a\\|b |") == 2
    assert text.count("- genai: not run: no wheel") == 2
    assert text.count("other processes kept 1.2 cores busy") == 1  # marked, not refused
    page.write_text(text.replace("GB/s", "TB/s"))
    assert run(first, second, "--out", page, "--check").exit_code == 1


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


def test_every_option_has_a_row_with_its_default_and_an_outdated_page_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in (SessionOptions, GenerationOptions):
        for field in fields(options):
            assert f"| `{field.name}` | `{field.default!r}` |" in options_page.page()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert CliRunner().invoke(options_page.main, []).exit_code == 0
    (tmp_path / "docs" / "options.md").write_text("old", encoding="utf-8")
    done = CliRunner().invoke(options_page.main, ["--check"])
    assert done.exit_code == 1
    assert "tools.options_page" in done.output
