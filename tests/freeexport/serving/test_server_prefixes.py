"""Prompts that begin alike, over the wire: cached tokens, salts, metrics, and the command's option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import succeed
from running_server import Running, running

from freeexport.commands.serve import PREFIX_CACHE_MB
from freeexport.serving import server as serving
from runtime import SessionOptions

PROMPT = list(range(20, 60))


def ask(server: Running, prompt: Any, **fields: Any) -> Any:
    asked = {"prompt": prompt, "max_tokens": 4, "logit_bias": {"2": -100}, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def chat_with(server: Running, texts: list[str]) -> Any:
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    asked = {"messages": messages, "max_tokens": 20, "free": {"mode": "full"}}
    return httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()


def test_a_second_turn_says_how_many_tokens_were_cached(server: Running, chat: Path) -> None:
    texts = ["Once upon a time there was a very long message"]
    first = chat_with(server, texts)
    texts += [first["choices"][0]["message"]["content"], "and then?"]
    second = chat_with(server, texts)
    assert 0 < cached(second) < second["usage"]["prompt_tokens"]
    assert server.log[-1]["cached_tokens"] == cached(second)
    with running(chat, names=("m",)) as plain:
        again = chat_with(plain, texts)
    assert cached(again) == 0
    assert again["choices"] == second["choices"]


def test_a_prompt_counts_once_for_all_its_choices(server: Running) -> None:
    prompts = [[7, *PROMPT], [8, *PROMPT]]
    fields: dict[str, Any] = {"n": 2, "seed": 1, "temperature": 1}
    assert cached(ask(server, prompts, **fields)) == 0
    again = ask(server, prompts, **fields)
    assert (cached(again), again["usage"]["prompt_tokens"]) == (2 * 32, 2 * 41)


def test_users_with_a_salt_share_with_nobody_else(server: Running) -> None:
    for turn in range(2):
        for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
            assert cached(ask(server, [9, *PROMPT], **fields)) == 32 * turn


def test_a_salt_is_a_text(http: httpx.Client) -> None:
    for salt in (5, "", ["a"], True, {}):
        answer = http.post("/v1/completions", json={"prompt": "x", "cache_salt": salt})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "cache_salt")
        assert error["message"].startswith("cache_salt")


def test_metrics_count_looked_up_and_reused_tokens(server: Running, http: httpx.Client) -> None:
    def counters() -> list[float]:
        text = http.get("/metrics").text
        names = "prompt_tokens|prefix_cache_queries|prefix_cache_hits"
        return [float(value) for value in re.findall(rf"^freeexport_(?:{names})_total{{.*}} (\S+)$", text, re.M)]

    before = counters()
    for _ in range(2):
        ask(server, [11, *PROMPT])
    assert [after - first for after, first in zip(counters(), before, strict=True)] == [82, 82, 32]


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], PREFIX_CACHE_MB), (["--device", "cuda:0"], 0), (["--prefix-cache-mb", "7"], 7)],
)
def test_the_command_keeps_prefixes_on_a_cpu(
    given: list[str], expected: int, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[SessionOptions] = []
    monkeypatch.setattr(serving, "run_server", lambda options, host, port: served.append(options.session))
    succeed("serve", chat, *given)
    assert served[0].prefix_cache_mb == expected
