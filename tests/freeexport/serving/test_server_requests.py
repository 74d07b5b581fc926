"""Fields of a request: each field that is not supported is refused by name, and none is ignored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from freeexport.serving.protocol import ApiError, ChatRequest, CompletionRequest, api_error, parse
from runtime import EngineError, OptionError, PromptError, QueueFullError

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def refused(body: bytes, kind: type[Any] = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse(body, kind)
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{}]),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("audio", {}),
        ("best_of", 3),
        ("echo", True),
        ("anything_else", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(msgspec.json.encode({**CHAT, field: value}))
    assert (error.code, error.param) == ("unsupported", field)
    assert error.message.startswith(f"{field} is not supported; ")


def test_fields_that_say_nothing_are_taken() -> None:
    nothing = {
        "frequency_penalty": 0,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "top_logprobs": 0,
        "max_tokens": None,
        "store": False,
        "user": "somebody",
    }
    assert parse(msgspec.json.encode({**CHAT, **nothing}), ChatRequest).limit is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"messages": \xff\xfe}', "the body is not JSON"),
        (b'{"messages": "\xff"}', "messages: Expected `array`, got `str`"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "the body is not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
        (b'{"tools": "\xff"}', "tools is not supported"),
        (b"[]", "the body is no JSON object"),
        (b"null", "the body is no JSON object"),
        (b"[" * 100_000, "the body is no JSON object"),
        (b'{"a": ' + b"[" * 100_000, "the body is not JSON"),
        (b'{"messages": []}', "messages: Expected `array` of length >= 1"),
        (b"{}", "the body: Object missing required field `messages`"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]: Object missing required field `content`"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens: Expected `int` >= 1"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}', "max_tokens: Number out of range"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 129}', "n: Expected `int` <= 128"),
        (b'{"messages": [{"role": "user", "content": "x"}], "free": {"speed": 1}}',
         "free: Object contains unknown field `speed`"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stream_options": {}}', "stream_options is given without"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"a": 1}}', "logit_bias: Expected `int`"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_one_line(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse(body, ChatRequest).options("free", None)
    assert raised.value.status == 400
    assert message in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("fields", "kind", "param", "message"),
    [
        ({"top_logprobs": 21, "logprobs": True}, ChatRequest, "top_logprobs", "top_logprobs: Expected `int` <= 20"),
        ({"top_logprobs": -1, "logprobs": True}, ChatRequest, "top_logprobs", "top_logprobs: Expected `int` >= 0"),
        ({"top_logprobs": 2.5, "logprobs": True}, ChatRequest, "top_logprobs", "top_logprobs: Expected `int`"),
        ({"top_logprobs": 2}, ChatRequest, "top_logprobs", "top_logprobs is 2 without logprobs; add logprobs: true"),
        ({"top_logprobs": 2, "logprobs": False}, ChatRequest, "top_logprobs", "top_logprobs is 2 without logprobs"),
        ({"logprobs": 6}, CompletionRequest, "logprobs", "logprobs: Expected `int` <= 5"),
        ({"logprobs": -1}, CompletionRequest, "logprobs", "logprobs: Expected `int` >= 0"),
        ({"logprobs": True}, CompletionRequest, "logprobs", "logprobs: Expected `int | null`, got `bool`"),
        ({"top_logprobs": 2}, CompletionRequest, "top_logprobs", "in completions, logprobs is how many"),
    ],
)
def test_a_number_of_alternatives_that_cannot_be_is_refused_by_name(
    fields: dict[str, Any], kind: type[Any], param: str, message: str
) -> None:
    error = refused(msgspec.json.encode({**(CHAT if kind is ChatRequest else {"prompt": "x"}), **fields}), kind)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        ({"logprobs": True, "top_logprobs": 20}, ChatRequest, (True, 20)),
        ({"logprobs": True}, ChatRequest, (True, 0)),
        ({"top_logprobs": 0}, ChatRequest, (False, 0)),
        ({"logprobs": 0, "top_logprobs": 0}, CompletionRequest, (True, 0)),
        ({"logprobs": 5}, CompletionRequest, (True, 5)),
        ({"logprobs": None}, CompletionRequest, (False, 0)),
    ],
)
def test_log_probabilities_are_asked_for_as_openai_does(
    fields: dict[str, Any], kind: type[Any], expected: tuple[bool, int]
) -> None:
    body = msgspec.json.encode({**(CHAT if kind is ChatRequest else {"prompt": "x"}), **fields})
    options = parse(body, kind).options("free", None)
    assert (options.output_logprobs, options.top_logprobs) == expected


@pytest.mark.parametrize("digits", [30, 5000])
def test_a_whole_number_of_many_digits_is_refused(digits: int) -> None:
    error = refused(b'{"prompt": "x", "max_tokens": -1' + b"0" * digits + b"}", CompletionRequest)
    assert len(error.message) < 400


def test_a_stop_list_of_ten_thousand_strings_is_refused() -> None:
    error = refused(msgspec.json.encode({**CHAT, "stop": ["x"] * 10_000}))
    assert error.message == "stop: Expected `array` of length <= 16"
    assert refused(msgspec.json.encode({**CHAT, "stop": "x" * 2000})).param == "stop"
    assert refused(msgspec.json.encode({**CHAT, "logit_bias": {str(token): 1 for token in range(1025)}})).message == (
        "logit_bias: Expected `object` of length <= 1024"
    )


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "x", "name": "Ann"}, "messages[0].name"),
    ],
)
def test_parts_of_messages_that_are_no_text_are_refused(message: dict[str, Any], named: str) -> None:
    request = parse(msgspec.json.encode({"messages": [message]}), ChatRequest)
    with pytest.raises(ApiError, match="not supported") as raised:
        _ = request.prompts
    assert raised.value.param == named


def test_a_prediction_is_text_and_chooses_the_mode_that_drafts() -> None:
    for content in ("ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]):
        body = msgspec.json.encode({**CHAT, "prediction": {"type": "content", "content": content}})
        options = parse(body, ChatRequest).options("free", None)
        assert (options.mode, options.predicted_output) == ("lossless", "ab")
    empty = msgspec.json.encode({**CHAT, "prediction": {"type": "content", "content": ""}})
    assert parse(empty, ChatRequest).options("free", None).mode == "free"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prediction": "ab"}, "prediction"),
        ({"prediction": {"type": "answer", "content": "ab"}}, "prediction.type"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"prediction": {"type": "content", "content": "a", "more": 1}}, "prediction"),
        ({"prediction": {"type": "content", "content": "a"}, "free": {"mode": "full"}}, "prediction"),
    ],
)
def test_a_prediction_that_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(msgspec.json.encode({**CHAT, **fields})).param == param


def test_text_parts_are_one_text_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "developer", "content": parts}]}
    assert parse(msgspec.json.encode(body), ChatRequest).prompts == [[{"role": "system", "content": "ab"}]]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])],
)
def test_prompts_of_a_completion(prompt: Any, prompts: list[Any]) -> None:
    assert parse(msgspec.json.encode({"prompt": prompt}), CompletionRequest).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [1, "a"], ["a", [1]]])
def test_a_list_of_prompts_is_of_one_kind(prompt: list[Any]) -> None:
    assert refused(msgspec.json.encode({"prompt": prompt}), CompletionRequest).param == "prompt"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, None)),
        ({"temperature": 0, "top_p": 0.5}, (0, None, None)),
        ({"top_p": 1}, (None, None, None)),
        ({"top_p": 0.5}, (1.0, 0.5, None)),
        ({"top_k": 5}, (1.0, None, 5)),
    ],
)
def test_sampling_is_asked_for_as_clients_do(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    options = parse(msgspec.json.encode({**CHAT, **fields}), ChatRequest).options("free", None)
    assert (options.temperature, options.top_p, options.top_k) == expected


def test_the_shorter_deadline_counts() -> None:
    body = msgspec.json.encode({**CHAT, "free": {"deadline": 5}})
    assert [parse(body, ChatRequest).options("free", limit).deadline for limit in (None, 2, 9)] == [5, 2, 5]


def test_every_error_has_a_status_and_a_code() -> None:
    found = {
        type(error).__name__: (api_error(error).status, api_error(error).code)
        for error in (QueueFullError("x"), PromptError("x"), OptionError("mode is 'x'"), EngineError("x"), OSError("x"))
    }
    assert found == {
        "QueueFullError": (429, "queue_full"),
        "PromptError": (400, "invalid_prompt"),
        "OptionError": (400, "invalid_value"),
        "EngineError": (500, "engine_error"),
        "OSError": (500, "internal_error"),
    }
    assert api_error(OptionError("max_new_tokens is 0; choose")).message == "max_tokens is 0; choose"
    assert api_error(OptionError("the session is closed; open a new one")).status == 503
