"""The load on a server: every figure is printed, and the server ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools import server_load


def test_gaps_are_between_chunks_and_not_before_the_first() -> None:
    assert server_load.gaps([[0.0, 5.0, 6.0, 8.0], [0.0], [0.0, 1.0]]) == [1.0, 2.0]


def test_a_server_is_measured_and_ended(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_load, "CLIENTS", (1, 8))
    given = ["--threads", "1", "--seconds", "0.1", "--rounds", "1", "--max-new-tokens", "8"]
    result = CliRunner().invoke(server_load.main, [str(chat), *given], catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"one client: session [\d.]+ tokens/s, server [\d.]+, ratio", result.output)
    assert re.findall(r"^ +(\d+) +\d+ +[\d.]+(?: +[\d.]+){7}  ours$", result.output, re.MULTILINE) == ["1", "8"]
    assert len(re.findall(r"^8 streams .*ms: +\d", result.output, re.MULTILINE)) == 2
    result = CliRunner().invoke(server_load.main, [str(chat), "--against", "llama-server -m file"])
    assert "names no --port; add one that is free" in result.output
