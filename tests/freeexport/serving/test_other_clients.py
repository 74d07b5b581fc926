"""Clients that others build on OpenAI's: litellm and LangChain, unchanged, where they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from running_server import MESSAGES, Running, running

from runtime import GenerationResult, Session

pytestmark = pytest.mark.clients

FREE = {"free": {"threshold": 0.3}}


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Running]:
    with running(chat, names=("chat",), api_key="right") as server:
        yield server


@pytest.fixture(scope="module")
def expected(session: Session) -> GenerationResult:
    return session.generate(MESSAGES, max_new_tokens=20, threshold=0.3, output_logprobs=True)


def test_litellm_completes_and_streams(
    server: Running, expected: GenerationResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked: dict[str, Any] = {"model": "openai/chat", "api_base": f"{server.url}/v1", "api_key": "right"}
    asked |= {"messages": MESSAGES, "max_tokens": 20, "max_retries": 0, "extra_body": FREE}
    answer = litellm.completion(**asked, logprobs=True)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].logprobs.content[0].logprob == pytest.approx(expected.logprobs[0], abs=1e-4)
    chunks = list(litellm.completion(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    for wrong, kind, message in (
        ({"api_key": "wrong"}, litellm.AuthenticationError, "missing or invalid API key"),
        ({"model": "openai/gpt-9"}, litellm.NotFoundError, "model 'gpt-9' not found"),
        ({"temperature": -1}, litellm.BadRequestError, "temperature is -1"),
    ):
        with pytest.raises(kind, match=message):
            litellm.completion(**{**asked, **wrong})


def test_langchain_invokes_and_streams(server: Running, expected: GenerationResult) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "model": "chat", "max_tokens": 20, "max_retries": 0}
    model = langchain.ChatOpenAI(api_key="right", extra_body=FREE, **options)
    prompt = MESSAGES[0]["content"]
    answer = model.bind(logprobs=True).invoke(prompt)
    assert answer.content == expected.text
    logprobs = answer.response_metadata["logprobs"]["content"]
    assert [each["logprob"] for each in logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
    assert "".join(chunk.content for chunk in model.stream(prompt)) == expected.text


def test_langchain_calls_tools_and_returns_structures(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    pytest.importorskip("llguidance")
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "model": "chat", "max_tokens": 200, "max_retries": 0}
    model = langchain.ChatOpenAI(api_key="right", **options)

    def light(room: Literal["kitchen", "hall"], on: bool) -> str:
        """Switch a light."""
        return f"{room} {on}"

    bound = model.bind_tools([light], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("Light in the hall, please.")
    (call,) = message.tool_calls
    assert call["name"] == "light"
    assert light(**call["args"]) in ("kitchen True", "kitchen False", "hall True", "hall False")
    streamed = None
    for chunk in bound.stream("Light in the hall, please."):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"] == call["args"]
    tool = {"role": "tool", "tool_call_id": call["id"], "content": "done"}
    assert model.invoke([("user", "Light, please."), message, tool], max_tokens=5).content
    schema = {"title": "Light", "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
              "additionalProperties": False}  # fmt: skip
    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(schema, method=method).invoke("Light?")
        assert answer in ({"on": True}, {"on": False})
