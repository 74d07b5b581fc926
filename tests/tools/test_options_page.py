from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from runtime import GenerationOptions, SessionOptions
from tools import options_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_options_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert CliRunner().invoke(options_page.main, ["--check"]).exit_code == 0


def test_every_option_has_a_row_with_its_default() -> None:
    text = options_page.page()
    for options in (SessionOptions, GenerationOptions):
        for field in fields(options):
            assert f"| `{field.name}` | `{field.default!r}` |" in text


def test_an_outdated_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert CliRunner().invoke(options_page.main, []).exit_code == 0
    (tmp_path / "docs" / "options.md").write_text("old", encoding="utf-8")
    done = CliRunner().invoke(options_page.main, ["--check"])
    assert done.exit_code == 1
    assert "tools.options_page" in done.output
