"""The load on a server: every figure is printed, and the server ends."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from tools.speed.server_load import gaps, main


def test_gaps_are_between_chunks_and_not_before_the_first() -> None:
    assert gaps([[0.0, 5.0, 6.0, 8.0], [0.0], [0.0, 1.0]]) == [1.0, 2.0]


def test_a_server_is_measured_and_ended(chat: Path) -> None:
    given = [str(chat), "--force", "--threads", "1", "--seconds", "0.1", "--rounds", "1", "--max-new-tokens", "8"]
    result = CliRunner().invoke(main, given, catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"one client: session [\d.]+ tokens/s, server [\d.]+, ratio", result.output)
    assert re.findall(r"^ +(\d+) +\d+ ", result.output, re.MULTILINE) == ["1", "4", "16", "64"]
    assert len(re.findall(r"^8 streams .*ms: +\d", result.output, re.MULTILINE)) == 2
