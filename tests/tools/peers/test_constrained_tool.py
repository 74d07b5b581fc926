"""The tool that measures constrained outputs, on a tiny bundle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import BY_NAME, Bundles
from click.testing import CliRunner

from tools.peers import constrained

pytest.importorskip("llguidance")


def test_speeds_shares_and_validity_are_shown(bundle: Bundles, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"input": "a", "target": "x"}\n{"input": "bc"}\n')
    schema = {"type": "object", "properties": {"kind": {"enum": ["one", "two"]}}, "required": ["kind"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    given = [str(bundle(BY_NAME["llama-tied"], 2, capacity=512)), str(tmp_path / "data.jsonl"), "--rounds", "1"]
    given += ["--schema", str(tmp_path / "schema.json"), "--max-new-tokens", "30"]
    done = CliRunner().invoke(constrained.main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = re.findall(r"(full|lossless), schema +[\d.]+ tokens/s, .* (\d+)% forced; grammar \d+ us", done.output)
    assert [name for name, _ in found] == ["full", "lossless"]
    assert all(int(share) > 50 for _, share in found)
    assert done.output.count("2 of 2 whole outputs valid") == 2
    assert "lossless, schema: 0 of 2 outputs differ" in done.output
