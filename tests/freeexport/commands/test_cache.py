from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CASES
from click.testing import CliRunner, Result
from command_errors import error
from conftest import Bundles

from freeexport import cli

LLAMA = next(case for case in CASES if case.name == "llama-tied")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["cache", *arguments])


def test_a_bundle_is_added_listed_and_cleared(bundle: Bundles, tmp_path: Path) -> None:
    path = bundle(LLAMA)
    added = run("add", str(path))
    assert added.exit_code == 0, added.output
    (entry,) = json.loads(run("list", "--json").stdout)["entries"]
    assert entry["bundle"] == str(path.resolve())
    assert entry["bytes"] > 0
    assert (tmp_path / "freeexport" / "engines" / entry["directory"] / "deep.onnx").is_file()
    assert str(path.resolve()) in run("list").stdout
    assert run("clear", str(path)).stdout == "1 entry removed\n"
    assert json.loads(run("list", "--json").stdout)["entries"] == []
    assert run("clear").stdout == "0 entries removed\n"


def test_an_entry_that_cannot_be_read_is_listed_and_cleared(bundle: Bundles, tmp_path: Path) -> None:
    run("add", str(bundle(LLAMA)))
    for file in tmp_path.rglob("entry.json"):
        file.write_text("{")
    assert "cannot be read" in run("list").stdout
    assert run("clear").stdout == "1 entry removed\n"


def test_no_room_is_an_error(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREEEXPORT_CACHE_GB", "0")
    assert "set FREEEXPORT_CACHE_GB" in error(run("add", str(bundle(LLAMA))))
