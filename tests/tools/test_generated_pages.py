"""Files that tools.pages generates, from what they are made of."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from runtime import GenerationOptions, SessionOptions, SpeechOptions
from tools import pages

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_of_the_documentation_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(pages.main, ["--check"])
    assert done.exit_code == 0, done.output


def test_every_row_reason_and_option_is_shown_and_a_change_by_hand_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    (tmp_path / "runtime").mkdir()
    found: dict[str, Any] = json.loads(min((ROOT / "docs" / "benchmarks").glob("*.json")).read_text())
    names = [row["name"] for row in found["rows"][1:]]
    found["rows"][0]["name"], found["failed"] = "a|b", {"genai": "no wheel"}
    for name, busy in (("1-smol-fp32", {}), ("other", {"idle": False, "busy": 1.2})):
        (tmp_path / "docs" / "benchmarks" / f"{name}.json").write_text(
            json.dumps({**found, "settings": {**found["settings"], **busy}})
        )
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(pages.main, []).exit_code == 0
    page = tmp_path / "docs" / "benchmarks.md"
    text = page.read_text()
    assert text.index("## smol fp32") < text.index("## other")
    assert all(text.count(f"| {name} |") == 2 for name in ("a\\|b", *names))
    assert text.count("- genai: not run: no wheel") == 2
    assert text.count("other processes kept 1.2 cores busy") == 1  # marked, not refused
    for options in (SessionOptions, SpeechOptions):
        for field in fields(options):
            assert f"| `{field.name}` | `{field.default!r}` |" in (tmp_path / "docs" / "options.md").read_text()
    page.write_text(text.replace("GB/s", "TB/s"))
    assert "benchmarks.md is not what it is made from" in CliRunner().invoke(pages.main, ["--check"]).output


@pytest.mark.parametrize("kind", [SessionOptions, GenerationOptions, SpeechOptions])
def test_each_option_has_a_text(kind: type[Any]) -> None:
    assert all(option.text.endswith((".", ")")) for option in pages.declared(kind))
