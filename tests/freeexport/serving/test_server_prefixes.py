"""Prompts that begin alike, over the wire: cached tokens, salts, metrics, and the command's option."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from checkpoints import LONG, Bundles
from command_line import succeed
from running_server import Running, eventually, running

from freeexport.commands.serve import PREFIX_CACHE_MB
from freeexport.serving import answers
from freeexport.serving import server as serving
from freeexport.serving.service import RequestLog
from runtime import GenerationOptions, GenerationResult, Session, SessionOptions

PROMPT = list(range(20, 60))


def ask(server: Running, prompt: Any, **fields: Any) -> Any:
    asked = {"prompt": prompt, "max_tokens": 4, "logit_bias": {"2": -100}, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def chat_with(server: Running, texts: list[str], **fields: Any) -> Any:
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
    asked = {"messages": messages, "max_tokens": 20, "free": {"mode": "full"}, "logit_bias": {"2": -100}, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()


def test_second_turn_reports_cached_tokens(server: Running, chat: Path) -> None:
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


@pytest.fixture
def rereading(bundle: Bundles, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle and kernels that compute a prompt's rows with other bits than a step's, as on AMX."""
    monkeypatch.setenv("FREEEXPORT_INSTRUCTIONS", "scalar-bf16")
    return bundle(LONG, 1, precision="int8", kernels="freeexport", capacity=512)


def test_next_turn_reuses_an_answer_read_while_idle(rereading: Path) -> None:
    options = GenerationOptions(max_new_tokens=100, ignore_eos=True, output_logprobs=True)

    async def talk(session: Session) -> tuple[list[int], GenerationResult]:
        idle = asyncio.Event()
        idle.set()
        reader = answers.AnswerReader(idle)
        answer = await session.agenerate(PROMPT, options)
        reader.add(session, np.array(PROMPT), options, answer)
        while reader.waiting or session.metrics().prefill_only_tokens < 96:
            await asyncio.sleep(0.01)
        await reader.close()
        turn = [*PROMPT, *answer.token_ids, 5, 6, 7]
        return turn, await session.agenerate(turn, options)

    with Session(rereading, prefix_cache_mb=64) as session, Session(rereading, prefix_cache_mb=0) as plain:
        turn, ours = asyncio.run(talk(session))
        alone = plain.generate(turn, options)
    assert ours.stats.cached_tokens == 128
    assert (ours.token_ids, ours.logprobs) == (alone.token_ids, alone.logprobs)


def test_server_reads_answers_while_idle_and_counts_them_separately(rereading: Path) -> None:
    with running(rereading, prefix_cache_mb=64) as server:
        used = chat_with(server, ["hello"], max_tokens=100)["usage"]
        session = next(iter(server.service.sessions.values()))
        assert eventually(lambda: session.metrics().prefill_only_tokens >= 84)
        metrics = session.metrics()
        assert (metrics.prompt_tokens, sum(metrics.finished.values())) == (used["prompt_tokens"], 1)
        assert len(server.log) == 1


def test_answers_are_not_read_while_busy_or_if_they_cannot_be_reused(
    rereading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "IDLE", 0.0)
    fields: dict[str, Any] = {"max_tokens": 100, "n": 1}
    with running(rereading, prefix_cache_mb=64) as server:
        ask(server, PROMPT, **fields)
        chat_with(server, ["hello"], **{**fields, "n": 2})
        assert server.service.answers.waiting == 0
        held = RequestLog(server.service, "held")
        chat_with(server, ["hello"], **fields)
        assert server.service.answers.waiting == 1
        session = next(iter(server.service.sessions.values()))
        assert session.metrics().prefill_only_tokens == 0
        held.end(200)
        assert eventually(lambda: session.metrics().prefill_only_tokens > 0)
    with running(rereading) as without, running(rereading, prefix_cache_mb=64, slots=1, queue=0) as refusing:
        for server in (without, refusing):
            chat_with(server, ["hello"], **fields)
            assert server.service.answers.waiting == 0


@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
def test_refused_chat_is_not_read_while_idle(path: str, server: Running, http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    asked = {"input": messages} if path == "responses" else {"messages": messages, "max_tokens": 5}
    answer = http.post(f"/v1/{path}", json={**asked, "free": {"mode": "rollback"}})
    assert answer.status_code == 400
    assert "free.mode is 'rollback', but rollback_threshold is None" in answer.text
    assert server.service.answers.waiting == 0


def test_prompt_counts_once_for_all_choices(server: Running) -> None:
    prompts = [[7, *PROMPT], [8, *PROMPT]]
    fields: dict[str, Any] = {"n": 2, "seed": 1, "temperature": 1}
    assert cached(ask(server, prompts, **fields)) == 0
    again = ask(server, prompts, **fields)
    assert (cached(again), again["usage"]["prompt_tokens"]) == (2 * 32, 2 * 41)


def test_prefixes_are_not_shared_between_salts(server: Running) -> None:
    for turn in range(2):
        for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
            assert cached(ask(server, [9, *PROMPT], **fields)) == 32 * turn


LONG_MESSAGE = [{"role": "user", "content": "a message of more than one block of the cache, and a salt"}]
SALTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": ({"messages": LONG_MESSAGE}, ("prompt_tokens_details", "cached_tokens")),
    "/v1/messages": ({"messages": LONG_MESSAGE, "max_tokens": 1}, ("cache_read_input_tokens",)),
    "/v1/responses": ({"input": LONG_MESSAGE}, ("input_tokens_details", "cached_tokens")),
    "/v1/completions": ({"prompt": [10, *PROMPT]}, ("prompt_tokens_details", "cached_tokens")),
}


@pytest.mark.parametrize("path", SALTED)
def test_every_endpoint_takes_a_salt(path: str, http: httpx.Client) -> None:
    body, keys = SALTED[path]
    for turn in range(2):
        for salt in (f"{path} a", f"{path} b" * 10):
            counted = http.post(path, json={**body, "cache_salt": salt}).json()["usage"]
            for key in keys:
                counted = counted[key]
            assert (counted > 0) == (turn > 0)


@pytest.mark.parametrize("path", SALTED)
def test_a_salt_is_a_text_of_at_most_256_characters(path: str, http: httpx.Client) -> None:
    for salt in (5, "", ["a"], True, {}, "a" * 257):
        answer = http.post(path, json={**SALTED[path][0], "cache_salt": salt})
        error = answer.json()["error"]
        assert (answer.status_code, error.get("param", "cache_salt")) == (400, "cache_salt")
        assert error["message"].startswith("cache_salt")
    assert http.post(path, json={**SALTED[path][0], "cache_salt": "\u00e4" * 256}).status_code == 200


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
def test_serve_keeps_prefixes_on_a_cpu(
    given: list[str], expected: int, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[SessionOptions] = []
    monkeypatch.setattr(serving, "run_server", lambda options, host, port: served.append(options.session))
    succeed("serve", chat, *given)
    assert served[0].prefix_cache_mb == expected
