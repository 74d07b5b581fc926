"""The load on a server: every figure is printed, and the server ends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from running_server import running

from runtime.machine.user_cache import user_cache
from tools.serving.llama_server import SERVER
from tools.serving.server_load import Target, compare, gaps, main

ROW = r"^ +(\d+)  (\S+) +(\d+) +([\d.]+)(?: +[\d.]+){6}$"
SHORT = ["--force", "--threads", "1", "--seconds", "0.1", "--rounds", "1", "--max-new-tokens", "8"]


def test_gaps_are_between_chunks_and_not_before_the_first() -> None:
    assert gaps([[0.0, 5.0, 6.0, 8.0], [0.0], [0.0, 1.0]]) == [1.0, 2.0]


def test_a_server_is_measured_and_ended(chat: Path) -> None:
    result = CliRunner().invoke(main, [str(chat), *SHORT], catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"one client: session [\d.]+ tokens/s, server [\d.]+, ratio", result.output)
    assert [row[0] for row in re.findall(ROW, result.output, re.MULTILINE)] == ["1", "4", "16", "64"]
    assert len(re.findall(r"^8 streams .*ms: +\d", result.output, re.MULTILINE)) == 2


def test_servers_take_turns_and_have_fields_of_their_own(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(chat, queue=256) as one, running(chat, queue=256) as other:
        targets = [Target("one", one.url), Target("other", other.url, {"n": 2, "seed": 1})]
        compare(targets, 2, 0.1, 4)
        rows = re.findall(ROW, capsys.readouterr().out, re.MULTILINE)
        assert [row[:2] for row in rows] == [(n, name) for n in ("1", "4", "16", "64") for name in ("one", "other")]
        tokens = [{line["completion_tokens"] for line in server.log} for server in (one, other)]
    assert tokens == [{4}, {8}]
    asked = [sum(int(row[2]) for row in rows if row[1] == name) for name in ("one", "other")]
    assert asked[0] < len(one.log)
    assert asked[1] < len(other.log)


@pytest.mark.smollm2
def test_llama_cpps_server_answers_the_same_load(chat: Path) -> None:
    if not (user_cache("peers", SERVER) / SERVER).is_file():
        pytest.skip("llama-server is not compiled here: python -m tools.serving.server_load --against llama-server")
    result = CliRunner().invoke(main, [str(chat), *SHORT, "--against", "llama-server"], catch_exceptions=False)
    rows = re.findall(ROW, result.output, re.MULTILINE)
    assert [row[1] for row in rows] == ["freeexport", "llama-server"] * 4
