"""The demo on the model of this package, from conversion to the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from freeexport.cli import main
from freeexport.demo import g2p as g2p_demo
from freeexport.demo.g2p import model_directory, phrases_file

MOST_BYTES = 8_000_000


def test_the_demo_converts_decodes_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g2p_demo, "MEASURED", 40)
    monkeypatch.setattr(g2p_demo, "ROUNDS", 1)
    first = CliRunner().invoke(main, ["demo", "--directory", str(tmp_path)], color=True)
    assert first.exit_code == 0, first.output
    green = click.style("X", fg="green").split("X")[0]
    assert green in first.output  # tokens that exited
    text = click.unstyle(first.output)
    for line in phrases_file().read_text().splitlines()[: g2p_demo.SHOWN]:
        assert json.loads(line)["input"] in text
    rows = {line.split(":")[0].split(" ")[0]: line for line in text.splitlines() if "x " in line and "%" in line}
    assert set(rows) == {"full", "shallow", "free"}
    rates = {name: float(re.search(r"([\d.]+)%", row).group(1)) for name, row in rows.items()}  # type: ignore[union-attr]
    assert rates["full"] < 15
    assert rates["shallow"] > rates["full"]
    assert "from an earlier run" in CliRunner().invoke(main, ["demo", "--directory", str(tmp_path)]).output


def test_the_shipped_model_is_small_and_says_where_it_exits() -> None:
    directory = model_directory()
    assert sum(path.stat().st_size for path in directory.iterdir() if path.name != "test.jsonl") <= MOST_BYTES
    assert json.loads((directory / "exit.json").read_text())["exit_layer"] == 2


def test_a_bundle_of_another_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from freeexport.conversion.options import ConvertOptions
    from freeexport.demo.bundle import demo_bundle
    from runtime import Bundle

    options = ConvertOptions(overwrite=True, measure=False, verify="none")
    bundle = demo_bundle(model_directory(), tmp_path / "bundle", options)
    before = Bundle.open(bundle).manifest
    assert not before.verified  # so it is not good enough either
    demo_bundle(model_directory(), tmp_path / "bundle", ConvertOptions(overwrite=True, measure=False))
    assert Bundle.open(bundle).manifest.verified
