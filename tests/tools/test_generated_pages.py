"""Files that tools.pages generates, from what they are made of."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from freeexport.cli import main as freeexport_command
from runtime import GenerationOptions, SessionOptions, SpeechOptions
from tools import pages

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_of_the_documentation_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(pages.main, ["--check"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["generate", "serve"])
def test_documentation_names_every_option_of_the_command(name: str) -> None:
    pages = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    verb = freeexport_command.get_command(click.Context(freeexport_command), name)
    assert verb is not None
    options = [option for given in verb.params for option in given.opts if option.startswith("--")]
    assert len(options) > 10
    assert [option for option in options if not re.search(rf"{option}(?![\w-])", text)] == []


def test_every_option_is_shown_and_a_change_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "runtime").mkdir()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(pages.main, []).exit_code == 0
    page = tmp_path / "docs" / "options.md"
    text = page.read_text()
    for options in (SessionOptions, SpeechOptions):
        for field in fields(options):
            assert f"| `{field.name}` | `{field.default!r}` |" in text
    page.write_text(text.replace("slots", "Slots"))
    assert "options.md is not what it is made from" in CliRunner().invoke(pages.main, ["--check"]).output


@pytest.mark.parametrize("kind", [SessionOptions, GenerationOptions, SpeechOptions])
def test_each_option_has_a_text(kind: type[Any]) -> None:
    assert all(option.text.endswith((".", ")")) for option in pages.declared(kind))
