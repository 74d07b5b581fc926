"""The page about the server works: commands, programs, and the dashboard."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from running_server import Running, running
from test_readme import DOCS, blocks, run_program


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Running]:
    with running(chat, names=("bundle",)) as server:
        yield server


def on(server: Running, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url)


def test_curl_commands_and_client_of_the_page_work(server: Running) -> None:
    ((_, commands),) = blocks(DOCS / "serving.md", "<!-- curl -->")
    for line in on(server, commands).replace("\\\n", " ").strip().splitlines():
        run_program(["bash", "-euc", f"{line} > /dev/null"])
    ((_, program),) = blocks(DOCS / "serving.md", "<!-- client -->")
    run_program([sys.executable, "-c", on(server, program)])
    assert len(server.log) == 4
    assert {line["status"] for line in server.log} == {200}


def test_anthropic_client_program_works(server: Running) -> None:
    if find_spec("anthropic") is None:
        pytest.skip("anthropic is not installed")
    ((_, program),) = blocks(DOCS / "serving.md", "<!-- anthropic -->")
    run_program([sys.executable, "-c", on(server, program)])
    assert (server.log[-1]["path"], server.log[-1]["status"]) == ("/v1/messages", 200)


@pytest.mark.clients
def test_tracing_program_works(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("opentelemetry") is None:
        pytest.skip("opentelemetry-api is not installed")
    (tmp_path / "bundle").symlink_to(chat)
    monkeypatch.chdir(tmp_path)
    ((_, program),) = blocks(DOCS / "serving.md", "<!-- events -->")
    run_program([sys.executable, "-W", "error", "-c", program])


def test_dashboard_uses_metrics_that_the_server_exposes(server: Running) -> None:
    asked = {"prompt": "g2p: hello", "max_tokens": 1}  # responses are counted from the first on
    assert httpx.post(f"{server.url}/v1/completions", json=asked).status_code == 200
    exposed = set(re.findall(r"^(\w+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    dashboard = json.loads((DOCS.parent / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = set(re.findall(r"freeexport_\w+", " ".join(expressions)))
    assert len(named) > 15
    assert named <= exposed
