"""The load on a server: every figure is printed, and the server ends."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import click
import httpx
import pytest
from click.testing import CliRunner

from runtime import EngineError
from tools import server_load


def test_gaps_are_measured_between_chunks_excluding_the_first() -> None:
    assert server_load.gaps([[0.0, 5.0, 6.0, 8.0], [0.0], [0.0, 1.0]]) == [1.0, 2.0]


def test_server_is_measured_and_stopped(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_load, "CLIENTS", (1, 8))
    given = ["--threads", "1", "--seconds", "0.1", "--rounds", "1", "--max-new-tokens", "8"]
    result = CliRunner().invoke(server_load.main, [str(chat), *given], catch_exceptions=False)
    assert result.exit_code == 0
    assert re.findall(r"^ +(\d+) +\d+ +[\d.]+(?: +[\d.]+){7}  ours$", result.output, re.MULTILINE) == ["1", "8"]


def test_server_that_ends_without_a_message_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with (
        pytest.raises(EngineError, match=r"^the server did not start: it ended without a message$"),
        server_load.served(tmp_path, 1, 1),
    ):
        pass


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("llama-server -m file", "names no --port; add one that is free"),
        (f"{sys.executable} -c 'import time; time.sleep(60)' --port 9", "does not answer at http://127.0.0.1:9/health"),
        (f"{sys.executable} -c 'raise SystemExit(3)' --port 9", "ended with code 3"),
    ],
)
def test_unresponsive_other_server_is_refused_and_stopped(
    command: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_load, "START_SECONDS", 10 if "Exit" in command else 1)
    began = time.monotonic()
    with pytest.raises((click.UsageError, EngineError), match=problem), server_load.other_server(command):
        pass
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("given", "problem"),
    [(["--against", "llama-server"], "names no --port"), (["--save", "none/rows.json"], "--save: directory none")],
)
def test_what_cannot_be_measured_or_saved_is_refused_before_a_server_starts(
    given: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_load, "served", lambda *arguments: pytest.fail("a server started"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(server_load.main, [str(tmp_path), *given])
    assert problem in result.output + str(result.exception)


def test_failing_requests_end_in_one_line(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*arguments: object) -> None:
        raise httpx.ConnectError("refused\nby the server")

    monkeypatch.setattr(server_load, "load", refused)
    result = CliRunner().invoke(server_load.main, [str(chat), "--threads", "1", "--clients", "1"])
    assert isinstance(result.exception, EngineError)
    assert re.fullmatch(r"ours at http\S+ failed \(.*refused.*\)", str(result.exception))
