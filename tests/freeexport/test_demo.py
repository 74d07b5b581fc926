"""The demo on the model of this package, from conversion to the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from command_line import succeed

from freeexport import demo
from freeexport.conversion.convert_options import ConvertOptions
from freeexport.demo import G2P, PHRASES, demo_bundle
from runtime import Bundle

MOST_BYTES = 8_000_000


def test_the_demo_converts_decodes_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unverified = ConvertOptions(overwrite=True, measure=False, verify="none")
    bundle = demo_bundle(G2P, tmp_path / "g2p", unverified)
    assert not Bundle.open(bundle).manifest.verified  # so it is made again
    monkeypatch.setattr(demo, "MEASURED", 20)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    first = succeed("demo", "--directory", tmp_path, color=True)
    assert Bundle.open(bundle).manifest.verified
    green = click.style("X", fg="green").split("X")[0]
    assert green in first.output  # tokens that exited
    text = click.unstyle(first.output)
    for line in PHRASES.read_text().splitlines()[: demo.SHOWN]:
        assert json.loads(line)["input"] in text
    rows = {line.split(":")[0].split(" ")[0]: line for line in text.splitlines() if "x " in line and "%" in line}
    assert set(rows) == {"full", "shallow", "free"}
    rates = {name: float(re.search(r"([\d.]+)%", row).group(1)) for name, row in rows.items()}  # type: ignore[union-attr]
    assert rates["full"] < 15
    assert rates["shallow"] > rates["full"]
    assert demo_bundle(G2P, tmp_path / "g2p", unverified) == bundle
    assert Bundle.open(bundle).manifest.verified  # that of the earlier run


def test_shipped_model_is_small_and_has_an_exit() -> None:
    assert sum(path.stat().st_size for path in G2P.iterdir() if path.name != "test.jsonl") <= MOST_BYTES
    assert json.loads((G2P / "exit.json").read_text())["exit_layer"] == 2
