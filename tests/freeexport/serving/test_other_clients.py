"""Clients that others build on OpenAI's: litellm and LangChain, unchanged, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import MESSAGES, Running, running

from runtime import GenerationResult, Session


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Running]:
    with running(chat, names=("chat",), api_key="right") as server:
        yield server


@pytest.fixture(scope="module")
def expected(chat: Path) -> GenerationResult:
    with Session(chat, threads=1) as session:
        return session.generate(MESSAGES, max_new_tokens=20, threshold=0.3, output_logprobs=True)


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    return pytest.importorskip("litellm", reason="litellm is not installed")


def asked(server: Running, **given: Any) -> dict[str, Any]:
    options = {"model": "openai/chat", "api_base": f"{server.url}/v1", "api_key": "right", "max_retries": 0}
    return {**options, "messages": MESSAGES, "max_tokens": 20, "extra_body": {"free": {"threshold": 0.3}}, **given}


def test_litellm_chats_streams_and_has_logprobs(litellm: Any, server: Running, expected: GenerationResult) -> None:
    answer = litellm.completion(**asked(server, logprobs=True))
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert answer.usage.completion_tokens == 20
    assert choice.logprobs.content[0].logprob == pytest.approx(expected.logprobs[0], abs=1e-4)
    chunks = list(litellm.completion(**asked(server, stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"
    whole = litellm.text_completion(
        model="text-completion-openai/chat", prompt="once", max_tokens=4, api_base=f"{server.url}/v1", api_key="right"
    )
    assert whole.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"api_key": "wrong"}, "AuthenticationError", "API key is missing or wrong"),
        ({"model": "openai/gpt-9"}, "NotFoundError", "there is no model 'gpt-9'"),
        ({"temperature": -1}, "BadRequestError", "temperature is -1"),
        ({"max_tokens": 5000}, "BadRequestError", "max_tokens is 5000"),
    ],
)
def test_litellm_has_each_error_as_its_own_class(
    given: dict[str, Any], kind: str, message: str, litellm: Any, server: Running
) -> None:
    with pytest.raises(getattr(litellm, kind), match=message):
        litellm.completion(**asked(server, **given))


def test_langchain_chats_streams_and_has_logprobs(server: Running, expected: GenerationResult) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    openai = pytest.importorskip("openai")
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "model": "chat", "max_tokens": 20, "max_retries": 0}
    model = langchain.ChatOpenAI(api_key="right", extra_body={"free": {"threshold": 0.3}}, **options)
    prompt = MESSAGES[0]["content"]
    answer = model.bind(logprobs=True).invoke(prompt)
    assert answer.content == expected.text
    assert answer.usage_metadata["output_tokens"] == 20
    logprobs = answer.response_metadata["logprobs"]["content"]
    assert [each["logprob"] for each in logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(chunk.content for chunk in model.stream(prompt)) == expected.text
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        langchain.ChatOpenAI(api_key="wrong", **options).invoke(prompt)
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        model.bind(tools=[{"type": "function", "function": {"name": "x", "parameters": {}}}]).invoke(prompt)
