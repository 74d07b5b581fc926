"""Files that tools.pages generates, from what they are made of."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import runtime
from freeexport.cli import main as freeexport_command
from runtime import GenerationOptions, SessionOptions, SpeechOptions
from tools import pages
from tools.api_page import OTHER_RECORDS, RESULTS

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
    (tmp_path / "runtime" / "options").mkdir(parents=True)
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


def test_api_page_has_every_field_of_a_result() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for kind in (*RESULTS, *OTHER_RECORDS):
        section = page.partition(f"## `{kind.__name__}`\n")[2].partition("\n## ")[0]
        names = kind._fields if issubclass(kind, tuple) else [field.name for field in fields(kind)]
        for name in names:
            text = section.partition(f"- `{name}` (`")[2].partition("\n- ")[0]
            assert len(text.split("`): ")[1]) > 8, f"{kind.__name__}.{name} has no text"


def test_api_page_has_every_public_name_but_options() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in runtime.__all__:
        assert f"`{name}`" in page or name.endswith("Options"), name
