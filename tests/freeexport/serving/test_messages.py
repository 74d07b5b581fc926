"""Anthropic's /v1/messages: by raw requests, and by the official client where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import Running, running

from freeexport.serving.messages import MessagesRequest
from freeexport.serving.parsing import parse
from runtime import Session

HELLO = [{"role": "user", "content": "hello"}]
ASKED: dict[str, Any] = {"messages": HELLO, "max_tokens": 20, "free": {"mode": "full"}}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Now.", "input_schema": {**CITY, "additionalProperties": False}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sun"}]}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names must be their types."""
    found = list[dict[str, Any]]()
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_message_matches_the_session_whole_and_streamed(http: httpx.Client, session: Session) -> None:
    expected = session.generate(HELLO, mode="full", max_new_tokens=20)
    answer = http.post("/v1/messages", json=ASKED).json()
    assert answer["content"] == [{"type": "text", "text": expected.text}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "m")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.stats.prompt_tokens
    assert usage["output_tokens"] == 20
    start, first, *deltas, stop, delta, end = events(http.post("/v1/messages", json={**ASKED, "stream": True}))
    assert start["message"]["usage"] == {"input_tokens": expected.stats.prompt_tokens, "output_tokens": 0}
    assert first["content_block"] == {"type": "text", "text": ""}
    assert "".join(each["delta"]["text"] for each in deltas) == expected.text
    assert (stop["type"], end) == ("content_block_stop", {"type": "message_stop"})
    assert delta["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == 20


def test_stop_sequence_that_ended_a_message_is_named(http: httpx.Client, session: Session) -> None:
    text = session.generate(HELLO, mode="full", max_new_tokens=20).text
    stop = text[8:12]
    before = text[: text.index(stop)]
    answer = http.post("/v1/messages", json={**ASKED, "stop_sequences": ["absent", stop]}).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert [block["text"] for block in answer["content"]] == [before]


def test_tool_calls_are_blocks_whole_and_streamed(http: httpx.Client) -> None:
    pytest.importorskip("llguidance")
    asked = {**ASKED, "max_tokens": 200, "tools": [TOOL]}
    asked["tool_choice"] = {"type": "tool", "name": "weather"}
    answer = http.post("/v1/messages", json=asked).json()
    (block,) = answer["content"]
    assert {**block, "id": "toolu_1"} == CALL
    assert answer["stop_reason"] == "tool_use"
    _, first, *deltas, stop, delta, _ = events(http.post("/v1/messages", json={**asked, "stream": True}))
    assert {**first["content_block"], "id": "toolu_1"} == {**CALL, "input": {}}
    assert {each["delta"]["type"] for each in deltas} == {"input_json_delta"}
    assert json.loads("".join(each["delta"]["partial_json"] for each in deltas)) == CALL["input"]
    assert (stop["index"], delta["delta"]["stop_reason"]) == (0, "tool_use")
    turns = [*HELLO, {"role": "assistant", "content": [block]}]
    turns.append({"role": "user", "content": [{**RESULT, "tool_use_id": block["id"]}]})
    assert http.post("/v1/messages", json={**asked, "messages": turns}).status_code == 200


def test_turns_are_converted_to_chat_messages() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I ask."}, CALL]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "and?"}]},
    ]
    body = {"messages": turns, "max_tokens": 5, "system": [{"type": "text", "text": "s", "cache_control": {}}]}
    body |= {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "top_k": 3}
    request = parse(json.dumps(body).encode(), MessagesRequest).chat()
    call = {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert request.prompts == [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "I ask.", "tool_calls": [call]},
            {"role": "tool", "content": "sun", "tool_call_id": "toolu_1"},
            {"role": "user", "content": "and?"},
        ]
    ]
    assert (request.must_call, request.parallel, request.limit, request.top_k) == (True, False, 5, 3)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
         "messages[0].content[1].type 'image' is not supported; send 'text' or 'tool_result'"),
        ({"messages": [{"role": "user", "content": [CALL]}]},
         "messages[0].content[0].type 'tool_use' is not supported"),
        ({"messages": [{"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
         "messages[0].content[0].content[0].type 'image' is not supported; send 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is missing"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "the last message has role 'assistant'"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role: Invalid enum value 'system'"),
        ({"system": [IMAGE]}, "system[0].type 'image' is not supported"),
        ({"max_tokens": None}, "missing required field `max_tokens`"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is not supported"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice names 'other', which is not in tools"),
        ({"free": {"threshold": 3}}, "free.threshold is 3.0"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_refused_in_anthropics_format(
    fields: dict[str, Any], message: str, http: httpx.Client
) -> None:
    response = http.post("/v1/messages", json={**ASKED, **fields})
    assert response.status_code == 400
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert message in body["error"]["message"]
    assert "\n" not in body["error"]["message"]


def test_other_errors_use_anthropics_format_too(chat: Path) -> None:
    with running(chat, names=("m",), api_key="secret") as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/messages", json=ASKED).json()["error"]["type"] == "authentication_error"
        headers = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
        missing = client.post("/v1/messages", json={**ASKED, "model": "other"}, headers=headers)
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        assert client.get("/v1/messages").json()["type"] == "error"
        assert client.post("/v1/messages", json=ASKED, headers=headers).status_code == 200


@pytest.mark.parametrize("more", [{}, {"system": "be brief", "tools": [TOOL]}, {"tool_choice": {"type": "none"}}])
def test_token_count_of_a_message_matches_its_prompt(more: dict[str, Any], http: httpx.Client) -> None:
    asked = {"messages": HELLO, **more}
    usage = http.post("/v1/messages", json={**asked, "max_tokens": 1}).json()["usage"]
    counted = http.post("/v1/messages/count_tokens", json={"model": "m", **asked})
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("count_tokens", {"messages": []}, 400, "invalid_request_error"),
        ("count_tokens", {"messages": HELLO, "max_tokens": 1}, 400, "invalid_request_error"),
        ("count_tokens", {"messages": HELLO, "model": "x"}, 404, "not_found_error"),
        ("batches", {}, 404, "not_found_error"),
    ],
)
def test_errors_of_paths_below_messages_use_anthropics_format(
    path: str, body: dict[str, Any], status: int, kind: str, http: httpx.Client
) -> None:
    answer = http.post(f"/v1/messages/{path}", json=body)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)


def test_official_client_reads_messages_streams_calls_and_errors(server: Running, session: Session) -> None:
    anthropic = pytest.importorskip("anthropic")
    pytest.importorskip("llguidance")
    expected = session.generate(HELLO, mode="full", max_new_tokens=20)
    asked: dict[str, Any] = {"model": "m", "messages": HELLO, "extra_body": {"free": {"mode": "full"}}}
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        answer = client.messages.create(max_tokens=20, **asked)
        assert (answer.content[0].text, answer.stop_reason) == (expected.text, "max_tokens")
        with client.messages.stream(max_tokens=20, **asked) as stream:
            assert "".join(stream.text_stream) == expected.text
            assert stream.get_final_message().usage.output_tokens == 20
        choice = {"type": "any", "disable_parallel_tool_use": True}
        with client.messages.stream(max_tokens=200, tools=[TOOL], tool_choice=choice, **asked) as stream:
            message = stream.get_final_message()
        assert [block.input for block in message.content if block.type == "tool_use"] == [CALL["input"]]
        counted = client.messages.count_tokens(model="m", messages=HELLO)
        assert counted.input_tokens == expected.stats.prompt_tokens
        with pytest.raises(anthropic.NotFoundError, match="model 'other' not found"):
            client.messages.create(max_tokens=20, **{**asked, "model": "other"})
