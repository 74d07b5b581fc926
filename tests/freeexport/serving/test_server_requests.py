"""Fields of a request: each field that is not supported is refused by name, and none is ignored."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from freeexport.serving.errors import ApiError, api_error
from freeexport.serving.openapi import POST
from freeexport.serving.parsing import parse
from freeexport.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from runtime import EngineError, OptionError, PromptError, QueueFullError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"prompt": "x"}


def read(base: dict[str, Any], **fields: Any) -> Any:
    kind: Any = ChatRequest if base is CHAT else CompletionRequest
    return parse(msgspec.json.encode({**base, **fields}), kind)


def refused(base: dict[str, Any], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        read(base, **fields)
    assert raised.value.status == 400
    assert len(raised.value.message) < 400
    return raised.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("function_call", "auto"),
        ("audio", {}),
        ("best_of", 3),
        ("echo", True),
        ("anything_else", 1),
        ("background", True),
    ],
)
def test_unsupported_fields_are_refused_by_name(field: str, value: Any) -> None:
    error = refused(CHAT, **{field: value})
    assert (error.code, error.param) == ("unsupported", field)
    assert error.message.startswith(f"{field} is not supported; ")


def test_null_and_default_fields_are_accepted() -> None:
    nothing = {"frequency_penalty": 0, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    assert read(CHAT, top_logprobs=0, max_tokens=None, store=False, user="somebody", **nothing).limit is None


def test_penalties_match_the_openai_definition() -> None:
    for base in (CHAT, {"prompt": "x"}):
        options = read(base, frequency_penalty=0.5, presence_penalty=-0.5).options(None, None)
        assert (options.frequency_penalty, options.presence_penalty) == (0.5, -0.5)
        with pytest.raises(OptionError, match=r"frequency_penalty is 3.0; choose a number from -2 to 2") as raised:
            read(base, frequency_penalty=3).options(None, None)
        assert api_error(raised.value).param == "frequency_penalty"


def test_fields_without_effect_are_accepted_with_any_value() -> None:
    harmless = {"metadata": {"run": "x" * 500}, "store": True, "truncation": "auto", "reasoning_effort": "high"}
    for base in (CHAT, {"prompt": "x"}):
        assert read(base, **harmless).limit is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"free": {"mode": "fast"}}, "free.mode: Invalid enum value 'fast'; choose 'free', 'full', 'lossless', "
         "'rollback', 'shallow'"),
        ({"response_format": {"type": "xml"}}, "; choose 'json_object', 'json_schema', 'text'"),
        ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0].type: Invalid enum value 'code'; choose"),
        ({"tool_choice": "perhaps"}, "; choose 'auto', 'none', 'required'"),
        ({"prediction": {"type": "text", "content": ""}}, "; choose 'content'"),
    ],
)  # fmt: skip
def test_invalid_choice_is_refused_with_the_choices(fields: dict[str, Any], message: str) -> None:
    said = refused(CHAT, **fields).message
    assert message in said
    assert "; choose '" in said


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"messages": \xff\xfe}', "the body is not JSON"),
        (b'{"messages": "\xff"}', "messages: Expected `array`, got `str`"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "the body is not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body is not JSON"),
        (b'{"functions": "\xff"}', "functions is not supported"),
        (b"[]", "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b"[" * 100_000, "the body is not a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "the body is not JSON"),
        (b'{"messages": []}', "messages: Expected `array` of length >= 1"),
        (b"{}", "the body: Object missing required field `messages`"),
        (b'{"messages": [{"content": "x"}]}', "messages[0]: Object missing required field `role`"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}', "max_tokens: Number out of range"),
    ],
)
def test_malformed_body_gives_a_one_line_error(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse(body, ChatRequest)
    assert raised.value.status == 400
    assert message in raised.value.message
    assert "\n" not in raised.value.message


PREDICTION = {"type": "content", "content": "a"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("base", "fields", "param", "message"),
    [
        (CHAT, {"max_tokens": 0}, "max_tokens", "max_tokens: Expected `int` >= 1"),
        (CHAT, {"n": 129}, "n", "n: Expected `int` <= 128"),
        (CHAT, {"free": {"speed": 1}}, "free", "free: Object contains unknown field `speed`"),
        (CHAT, {"stream_options": {}}, "stream_options", "stream_options is given without"),
        (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", "logit_bias: Expected `int`"),
        (CHAT, {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "of length <= 1024"),
        (CHAT, {"stop": ["x"] * 10_000}, "stop", "stop: Expected `array` of length <= 16"),
        (CHAT, {"stop": "x" * 2000}, "stop", "stop"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "top_logprobs: Expected `int` <= 20"),
        (CHAT, {"top_logprobs": -1, "logprobs": True}, "top_logprobs", "top_logprobs: Expected `int` >= 0"),
        (CHAT, {"top_logprobs": 2.5, "logprobs": True}, "top_logprobs", "top_logprobs: Expected `int`"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "top_logprobs is 2 without logprobs; add logprobs: true"),
        (CHAT, {"top_logprobs": 2, "logprobs": False}, "top_logprobs", "top_logprobs is 2 without logprobs"),
        (TEXT, {"logprobs": 6}, "logprobs", "logprobs: Expected `int` <= 5"),
        (TEXT, {"logprobs": -1}, "logprobs", "logprobs: Expected `int` >= 0"),
        (TEXT, {"logprobs": True}, "logprobs", "logprobs: Expected `int | null`, got `bool`"),
        (TEXT, {"top_logprobs": 2}, "top_logprobs", "set logprobs to the number of alternatives"),
        (CHAT, {"prediction": "ab"}, "prediction", "prediction"),
        (CHAT, {"prediction": {"type": "answer", "content": "ab"}}, "prediction.type", "prediction.type"),
        (CHAT, {"prediction": {"type": "content"}}, "prediction", "prediction"),
        (CHAT, {"prediction": {**PREDICTION, "more": 1}}, "prediction", "prediction"),
        (CHAT, {"prediction": PREDICTION, "free": {"mode": "full"}}, "prediction", "which drafts nothing"),
        (TEXT, {"echo": True, "logprobs": 1, "stream": True}, "stream", "stream is given with echo and logprobs"),
        (TEXT, {"max_tokens": -1}, "max_tokens", "max_tokens: Expected `int` >= 0"),
        (TEXT, {"prompt": []}, "prompt", "is an empty list"),
        (TEXT, {"prompt": [1, "a"]}, "prompt", "mixes text and token ids"),
        (TEXT, {"prompt": ["a", [1]]}, "prompt", "mixes text and token ids"),
    ],
)
def test_invalid_value_is_refused_by_name(
    base: dict[str, Any], fields: dict[str, Any], param: str, message: str
) -> None:
    error = refused(base, **fields)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize("digits", [30, 5000])
def test_overlong_integer_is_refused(digits: int) -> None:
    with pytest.raises(ApiError) as raised:
        parse(b'{"prompt": "x", "max_tokens": -1' + b"0" * digits + b"}", CompletionRequest)
    assert len(raised.value.message) < 400


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": [IMAGE]}, "messages[0].content[0].type"),
        ({"role": "user", "content": "x", "name": "Ann"}, "messages[0].name"),
    ],
)
def test_non_text_message_parts_are_refused(message: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError, match="not supported") as raised:
        _ = read(CHAT, messages=[message]).prompts
    assert raised.value.param == named


@pytest.mark.parametrize(
    ("base", "fields", "expected"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 20}, {"output_logprobs": True, "top_logprobs": 20}),
        (CHAT, {"logprobs": True}, {"output_logprobs": True, "top_logprobs": 0}),
        (CHAT, {"top_logprobs": 0}, {"output_logprobs": False, "top_logprobs": 0}),
        (TEXT, {"logprobs": 0, "top_logprobs": 0}, {"output_logprobs": True, "top_logprobs": 0}),
        (TEXT, {"logprobs": 5}, {"output_logprobs": True, "top_logprobs": 5}),
        (TEXT, {"logprobs": None}, {"output_logprobs": False, "top_logprobs": 0}),
        (CHAT, {"ignore_eos": True}, {"ignore_eos": True}),
        (CHAT, {}, {"temperature": None, "top_p": None, "top_k": None, "mode": "free"}),
        (CHAT, {"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": None, "top_k": None}),
        (CHAT, {"top_p": 1}, {"temperature": None, "top_p": None, "top_k": None}),
        (CHAT, {"top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5, "top_k": None}),
        (CHAT, {"top_k": 5}, {"temperature": 1.0, "top_p": None, "top_k": 5}),
        (CHAT, {"free": {"deadline": 5}}, {"deadline": 2}),
        (CHAT, {"free": {"deadline": 1}}, {"deadline": 1}),
        (CHAT, {"prediction": PREDICTION}, {"mode": "lossless", "predicted_output": "a"}),
        (CHAT, {"prediction": {**PREDICTION, "content": PARTS}},
         {"mode": "lossless", "predicted_output": "ab"}),
        (CHAT, {"prediction": {**PREDICTION, "content": ""}}, {"mode": "free", "predicted_output": None}),
    ],
)  # fmt: skip
def test_options_are_read_in_the_form_of_clients(
    base: dict[str, Any], fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    options = read(base, **fields).options("free", 2)
    assert {name: getattr(options, name) for name in expected} == expected


def test_prompts_can_be_texts_ids_or_messages() -> None:
    for prompt, prompts in (("x", ["x"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2]], [[1], [2]])):
        assert read(TEXT, prompt=prompt).prompts == prompts
    chat = read(CHAT, messages=[{"role": "developer", "content": PARTS}])
    assert chat.prompts == [[{"role": "system", "content": "ab"}]]


def test_every_error_has_a_status_and_a_code() -> None:
    for error, status, code in (
        (QueueFullError("x"), 429, "queue_full"),
        (PromptError("x"), 400, "invalid_prompt"),
        (OptionError("mode is 'x'"), 400, "invalid_value"),
        (EngineError("x"), 500, "engine_error"),
        (OSError("x"), 500, "internal_error"),
    ):
        assert (api_error(error).status, api_error(error).code) == (status, code)
    assert api_error(OptionError("max_new_tokens is 0; choose")).message == "max_tokens is 0; choose"
    assert api_error(OptionError("the session is closed; open a new one")).status == 503


LONG = "a" * 5000
LONG_VALUES: list[Any] = [
    LONG, [LONG], {LONG: 1}, {"type": LONG}, [{"type": LONG}], [{"role": LONG, "content": LONG}],
    [{"role": "user", "content": [{"type": LONG}]}], {"type": "json_schema", "json_schema": {LONG: 1}}, {"mode": LONG},
    [{"type": "function", "function": {"name": LONG}}], {"type": "function", "function": {"name": LONG}},
]  # fmt: skip


def refusal_of(kind: Any, body: dict[str, Any]) -> ApiError | None:
    try:
        request = parse(msgspec.json.encode(body), kind)
        request = request.chat() if hasattr(request, "chat") else request
        if isinstance(request, GenerationRequest):
            assert request.prompts
            request.options(None, None)
    except (ApiError, OptionError) as error:
        return api_error(error)
    return None


@pytest.mark.parametrize("path", POST)
def test_long_values_are_cut_in_messages(path: str) -> None:
    _, kind, _ = POST[path]
    required = {"prompt": "x", "input": "x", **CHAT, "max_tokens": 1, "tokens": [1]}
    base = {name: required[name] for name in kind.__struct_fields__ if name in required}
    refused = 0
    for name in (*kind.__struct_fields__, LONG):
        for value in LONG_VALUES:
            error = refusal_of(kind, {**base, name: value})
            if error is not None:
                refused += 1
                assert error.status == 400
                assert len(error.message) < 330
                assert len(error.param or "") < 100
    assert refused > 10
