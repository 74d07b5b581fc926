"""The page at `/`: what it may load, what a stream tells it, and how it works in a browser if there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checkpoints import PROMPTS
from chromium import CHROMIUM, Page, in_chromium
from running_server import MESSAGES, Running, running

from freeexport.serving.openapi import document
from freeexport.serving.page import FILE
from runtime import Session

MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
# The answer of a server whose model writes markup.
ANSWER = [{"choices": [{"index": 0, "delta": {"content": MARKUP}, "free": {"sources": ["lookup"]}}]}]
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def test_content_policy_allows_only_the_pages_own_script_and_style(http: httpx.Client) -> None:
    response = http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.content == FILE.read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_page_is_self_contained_and_inserts_only_text() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|\ssrc=|\son\w+=|\sstyle=", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage", text)
    assert re.findall(r'href="(.*?)"', text) == ["data:,"]
    labelled = {*re.findall(r'<label for="(\w+)"', text)}
    for tag, attributes in re.findall(r"<(input|textarea|select)\b([^>]*)>", text):
        name = re.search(r'\bid="(\w+)"', attributes)
        assert (name is not None and name[1] in labelled) or 'name="mode"' in attributes, (tag, attributes)


def test_path_of_a_disabled_page_is_not_found(chat: Path) -> None:
    with running(chat, page=False) as server:
        assert httpx.get(server.url).status_code == 404
        assert "/" not in httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "/" in document()["paths"]


def test_tokens_report_their_source_on_request(http: httpx.Client, session: Session) -> None:
    prompt = list(PROMPTS[0])
    full = session.generate(prompt, mode="full", max_new_tokens=30, ignore_eos=True)
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 30, "ignore_eos": True}
    asked["free"] = {"mode": "free", "threshold": 0.3, "exits": True, "sources": True}
    whole = http.post("/v1/completions", json=asked).json()
    free = whole["choices"][0]["free"]
    assert [source == "exit" for source in free["sources"]] == free["exited"]
    assert {"exit", "deep"} <= {*free["sources"]} <= {"exit", "deep", "lookup"}
    asked["free"] = {"mode": "lossless", "sources": True}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = http.post("/v1/completions", json=asked).text.splitlines()
    *chunks, last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    sources = [source for chunk in chunks for source in chunk["choices"][0]["free"]["sources"]]
    assert len(sources) == len(full.token_ids)
    accepted = {
        name: sum(right for right, _ in positions) for name, positions in last["usage"]["free"]["drafts"].items()
    }
    assert {name: sources.count(name) for name in accepted} == accepted
    del asked["free"]
    told = http.post("/v1/completions", json=asked).text
    assert "sources" not in told
    assert "drafts" not in told


@pytest.fixture(scope="module")
def guarded(chat: Path, t5: Path) -> Iterator[Running]:
    with running(chat, t5, names=("chat", "t5"), api_key="secret") as server:
        yield server


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with in_chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def shown(page: Page, selector: str) -> str:
    text: str = page.run(f"document.querySelector({selector!r}).textContent")
    return text


def write(page: Page, text: str) -> None:
    page.run("document.querySelector('#prompt').focus()")
    page.call("Input.insertText", text=text)


@browser
def test_page_streams_counts_and_draws_the_server_response(server: Running, page: Page) -> None:
    page.call("Page.navigate", url=server.url)
    page.wait("document.querySelector('#about')?.textContent.includes('exit after layer 1')")
    page.run("document.querySelector('[value=free]').focus(); document.querySelector('[value=lossless]').focus()")
    page.press("ArrowRight")  # the radio buttons are used by keyboard
    assert page.run("document.querySelector('[name=mode]:checked').value") == "free"
    page.run("threshold.focus(); threshold.value = 0.31")
    page.press("ArrowLeft")
    assert shown(page, "#chosen") == "0.30"
    write(page, MESSAGES[0]["content"])
    page.press("Enter")
    page.wait("!running && messages.length === 2")
    asked = {"messages": MESSAGES, "free": {"mode": "free", "threshold": 0.3, "sources": True}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
    assert page.run("messages[1].content") == answer["choices"][0]["message"]["content"]
    sources = answer["choices"][0]["free"]["sources"]
    for source in ("exit", "deep"):
        count = sources.count(source)
        assert shown(page, f"[data-source={source}]") == f"{count} ({round(100 * count / len(sources))}%)"
        assert page.run(f"document.querySelectorAll('.token.{source}').length > 0")
    assert float(shown(page, "#speed")) > 0
    assert f"{len(sources)} tokens" in shown(page, "#status")
    page.run("document.querySelector('[value=lossless]').click(); again.click()")
    page.wait("!running && document.querySelectorAll('#turns li').length === 3")
    assert page.run("document.querySelectorAll('.bars li').length > 0")
    page.run("document.querySelector('[value=full]').click(); again.click()")
    page.press("Escape")
    page.wait("!running")
    assert page.run("messages.length") in (1, 2)
    assert page.problems() == []
    assert {address.removeprefix(server.url) for address in page.requests()} <= {
        *("/", "data:,", "/v1/models", "/v1/chat/completions", "about:blank")
    }


@browser
def test_markup_in_prompts_and_answers_is_shown_as_text(server: Running, page: Page) -> None:
    page.call("Page.navigate", url=server.url)
    page.wait("document.querySelector('#about')?.textContent.includes('exit after layer 1')")
    events = "".join(f"data: {json.dumps(each)}\n\n" for each in ANSWER)
    page.run(f"window.fetch = async () => new Response({json.dumps(events)}); 0")
    write(page, MARKUP)
    page.press("Enter")
    page.wait("!running && messages.length === 2")
    assert page.run("[...document.querySelectorAll('#turns pre')].map((each) => each.textContent)") == [MARKUP] * 2
    assert page.run("document.querySelectorAll('#turns img, #turns script').length") == 0
    assert page.run("document.querySelector('.token').className") == "token draft"
    assert shown(page, "title") == "freeexport"
    # Even markup that is inserted as HTML would not run.
    page.run(f"document.querySelector('#turns').innerHTML = {MARKUP!r}; 0")
    page.wait("document.querySelector('#turns img') !== null")
    assert any("Content Security Policy" in problem for problem in page.problems())
    assert shown(page, "title") == "freeexport"


@browser
def test_server_with_a_key_is_unlocked_for_one_browser_tab(guarded: Running, page: Page) -> None:
    page.call("Page.navigate", url=guarded.url)
    page.wait("document.querySelector('#error')?.textContent.includes('API key')")
    assert page.run("document.activeElement.id") == "key"
    for key, done in (("wrong", "document.querySelector('#key').value === ''"), ("secret", "models.length === 2")):
        page.call("Input.insertText", text=key)
        page.press("Enter")
        page.wait(done)
    assert page.run("document.querySelector('#unlock').hidden && sessionStorage.length") == 1
    page.call("Page.reload")
    page.wait("document.querySelector('#model')?.options.length === 2")
    page.run("byId('model').selectedIndex = 1; byId('model').dispatchEvent(new Event('change'))")
    assert "no chat template" in shown(page, "#about")
    write(page, "hello")
    page.press("Enter")
    page.wait("!running && messages.length === 2")
    assert guarded.log[-1]["path"] == "/v1/completions"
