"""The page about the server works: commands, programs, the page that streams, and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from running_server import Running, eventually, running
from test_readme import DOCS, blocks, run_program

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Running]:
    with running(chat, names=("bundle",), origins=("*",)) as server:
        yield server


def on(server: Running, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url)


def test_the_curl_commands_and_the_client_of_the_page_work(server: Running) -> None:
    ((_, commands),) = blocks(DOCS / "serving.md", "<!-- curl -->")
    for line in on(server, commands).replace("\\\n", " ").strip().splitlines():
        run_program(["bash", "-euc", f"{line} > /dev/null"])
    ((_, program),) = blocks(DOCS / "serving.md", "<!-- client -->")
    run_program([sys.executable, "-c", on(server, program)])
    assert len(server.log) == 4
    assert {line["status"] for line in server.log} == {200}


def test_the_program_with_spans_works(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("opentelemetry") is None:
        pytest.skip("opentelemetry-api is not installed")
    (tmp_path / "bundle").symlink_to(chat)
    monkeypatch.chdir(tmp_path)
    ((_, program),) = blocks(DOCS / "serving.md", "<!-- events -->")
    run_program([sys.executable, "-W", "error", "-c", program])


# The DevTools list the title of a page.
TELL = """<script>
setInterval(() => {
  const count = (what) => document.querySelectorAll(what).length;
  document.title = `${count("span")} tokens, ${count(".exited")} exited`;
}, 50);
</script>"""


@contextmanager
def in_chromium(address: str, profile: Path) -> Iterator[Callable[[], list[str]]]:
    """Opens a page; what it gives says the titles of all pages."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--remote-debugging-port=0", address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            file = profile / "DevToolsActivePort"
            assert eventually(lambda: file.exists() and bool(file.read_text().strip()), 60)
            port = file.read_text().split()[0]
            yield lambda: [page["title"] for page in httpx.get(f"http://127.0.0.1:{port}/json/list").json()]
        finally:
            process.terminate()


def test_the_page_streams_and_marks_what_exited(server: Running, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    # A threshold at which this model exits.
    free = {"exits": True, "threshold": 0.3}
    source = (DOCS / "stream.html").read_text(encoding="utf-8")
    page = tmp_path / "stream.html"
    page.write_text(source.replace("{exits: true}", json.dumps(free)) + TELL, encoding="utf-8")
    asked = {"prompt": "g2p: hello world", "max_tokens": 200, "stream": True, "free": free}
    lines = httpx.post(f"{server.url}/v1/completions", json=asked).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    exited = sum(all(choice["free"]["exited"]) for choice in choices)
    assert 0 < exited < len(choices)
    with in_chromium(f"{page.as_uri()}?server={server.url}", tmp_path / "profile") as titles:
        assert eventually(lambda: f"{len(choices)} tokens, {exited} exited" in titles(), 60), titles()


def test_the_dashboard_names_what_the_server_exposes(server: Running) -> None:
    asked = {"prompt": "g2p: hello", "max_tokens": 1}  # responses are counted from the first on
    assert httpx.post(f"{server.url}/v1/completions", json=asked).status_code == 200
    exposed = set(re.findall(r"^(\w+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    dashboard = json.loads((DOCS.parent / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = set(re.findall(r"freeexport_\w+", " ".join(expressions)))
    assert len(named) > 15
    assert named <= exposed
