"""Constrained answers and function calls: their grammar, how they are read, and the official client's own types."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from running_server import MESSAGES, Running, running

from freeexport.serving.errors import ApiError
from freeexport.serving.parsing import parse
from freeexport.serving.protocol import ChatRequest, CompletionRequest
from freeexport.serving.tools import (
    CallForm,
    CallReader,
    calls_grammar,
    constraint,
    form_of,
    read_calls,
    tools_as_text,
)
from runtime import Session
from runtime.text.grammar import Grammars

pytest.importorskip("llguidance")

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo \"N\""]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS: Any = [WEATHER, CLOCK]
MARKED, BARE, PARAMETERS = CallForm(), CallForm(marked=False), CallForm(marked=False, key="parameters")


def chat(**fields: Any) -> ChatRequest:
    return parse(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatRequest)


def written(form: CallForm, *calls: tuple[str, str]) -> str:
    """Calls as a model writes them."""
    bodies = [f'{form.begin}{{"name": "{name}", "{form.key}": {given}}}{form.end}' for name, given in calls]
    if form.marked:
        return "\n".join(bodies)
    return bodies[0] if len(bodies) == 1 else f"[{', '.join(bodies)}]"


ROME, OSLO = ("weather", '{"city": "Rome"}'), ("weather", '{"city": "Oslo \\"N\\""}')
NOW = ("clock", "{}")
ONE: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False}
NAMED: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "clock"}}}
JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("fields", "form", "text", "allowed"),
    [
        ({"tools": TOOLS}, MARKED, "plain < text", True),
        ({"tools": TOOLS}, MARKED, "", True),
        ({"tools": TOOLS}, MARKED, "I ask.\n" + written(MARKED, ROME), True),
        ({"tools": TOOLS}, MARKED, written(MARKED, ROME, NOW, OSLO), True),
        ({"tools": TOOLS}, MARKED, written(MARKED, ROME) + " and text", False),
        ({"tools": TOOLS}, MARKED, written(MARKED, ("other", "{}")), False),
        ({"tools": TOOLS}, MARKED, written(MARKED, ("weather", '{"city": "Bonn"}')), False),
        ({"tools": TOOLS}, MARKED, written(MARKED, ("clock", '{"zone": 1}')), False),
        (ONE, MARKED, written(MARKED, ROME, NOW), False),
        ({"tools": TOOLS, "tool_choice": "required"}, MARKED, "plain text", False),
        ({"tools": TOOLS, "tool_choice": "required"}, MARKED, written(MARKED, NOW, ROME), True),
        (NAMED, MARKED, written(MARKED, NOW), True),
        (NAMED, MARKED, written(MARKED, ROME), False),
        (NAMED, MARKED, written(MARKED, NOW, NOW), False),
        ({"tools": TOOLS, **JSON}, MARKED, '{"a": 1}', True),
        ({"tools": TOOLS, **JSON}, MARKED, written(MARKED, NOW), True),
        ({"tools": TOOLS, **JSON}, MARKED, "plain text", False),
        ({"tools": TOOLS}, BARE, "plain [text]", True),
        ({"tools": TOOLS}, BARE, "[plain text]", False),
        ({"tools": TOOLS}, BARE, written(BARE, ROME), True),
        ({"tools": TOOLS}, BARE, written(BARE, ROME, NOW), True),
        (ONE, BARE, written(BARE, ROME, NOW), False),
        ({"tools": TOOLS, "tool_choice": "required"}, PARAMETERS, written(PARAMETERS, OSLO), True),
        ({"tools": TOOLS, "tool_choice": "required"}, PARAMETERS, written(BARE, OSLO), False),
    ],
)
def test_answers_obey_the_tool_call_grammar(
    fields: dict[str, Any], form: CallForm, text: str, allowed: bool, session: Session
) -> None:
    request, tokenizer = chat(**fields), session.tokenizer
    assert tokenizer is not None
    ends = session.manifest.eos_token_ids
    grammars = Grammars(tokenizer, session.manifest.vocab_size, ends)
    grammar = grammars.open("grammar", calls_grammar(request.offered, request, form), 4096)
    ids = [*(tokenizer.encode(text, special=False) if text else ()), ends[0]]
    assert (grammar.allows(session.encode(MESSAGES)[:0], ids) == len(ids)) == allowed


@pytest.mark.parametrize("form", [MARKED, BARE, PARAMETERS])
def test_tool_calls_are_parsed_from_any_chunking(form: CallForm) -> None:
    before = "I ask <tool_ca\n" if form.marked else ""
    text = before + written(form, ROME, NOW, OSLO)
    answer, calls = read_calls(text, form)
    assert answer == before
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [ROME, NOW, OSLO]
    assert len({call["id"] for call in calls}) == 3
    source = random.Random(0)
    for _ in range(200):
        reader, told, found, rest = CallReader(form), "", dict[int, dict[str, str]](), text
        while rest:
            size = source.randint(1, 9)
            piece, rest = rest[:size], rest[size:]
            part, deltas = reader.read(piece, last=not rest)
            told += part
            for delta in deltas:
                if "id" in delta:
                    found[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
                found[delta["index"]]["arguments"] += delta["function"]["arguments"]
        assert told == before
        assert [tuple(call.values()) for call in found.values()] == [ROME, NOW, OSLO]
    # Cut short: what is there of the last.
    assert (
        read_calls(written(form, OSLO)[: -len(form.end) - 5], form)[1][0]["function"]["arguments"]
        == '{"city": "Oslo \\"N'
    )
    assert read_calls("plain text", form) == ("plain text", [])


def test_tool_call_format_is_that_of_the_template(session: Session) -> None:
    class Template:
        special_ids = (5,)

        def __init__(self, source: str, special: str = "") -> None:
            self.chat_template, self._special = source, special

        def token(self, token_id: int) -> str:
            return self._special

    def form(source: str, special: str = "") -> CallForm:
        return form_of(Template(source, special))  # type: ignore[arg-type]

    assert form_of(session.tokenizer) == CallForm(shown=False)
    assert form("{% for tool in tools %}<tool_call>") == CallForm()
    assert form('{{ tools }}{"name": "f", "parameters": {}}') == PARAMETERS
    assert form("{{ tools }}[TOOL_CALLS]") == BARE
    assert form("{{ tools }}<tool_call>", "<tool_call>") == BARE
    assert form_of(None) == CallForm(shown=False)


def test_tools_are_described_in_text_if_the_template_has_none() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES,
                {"role": "assistant", "content": "",
                 "tool_calls": [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": {}}}]},
                {"role": "tool", "content": "noon", "tool_call_id": "1"}]  # fmt: skip
    told = tools_as_text(messages, TOOLS, CallForm(shown=False))
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n# Functions")
    assert '{"name": "clock"}' in told[0]["content"]
    assert told[2]["content"] == written(MARKED, NOW)
    assert told[3]["content"] == "<tool_response>\nnoon\n</tool_response>"
    assert tools_as_text(MESSAGES, TOOLS, MARKED)[0]["role"] == "system"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type", "Invalid enum value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "regex"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].function.name", "duplicate"),
        ({"tools": [CLOCK] * 129}, "tools", "length <= 128"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters", "not an object schema"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "names 'x'"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "Invalid enum value"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs", "with tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid enum value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema", "missing required field `name`"),
        ({"response_format": {"type": "json_object", "key": 1}}, "response_format", "unknown field `key`"),
        ({"structured_outputs": {}}, "structured_outputs", "has no constraint"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "has regex and choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "unknown field `structural_tag`"),
        ({"structured_outputs": {"regex": "a"}, **JSON}, "structured_outputs", "with response_format"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a", "arguments": ""}}]}]},
         "messages[0].tool_calls", "given with role 'user'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}]},
         "messages[0].tool_calls[0].function.arguments", "not a JSON object"),
    ],
)  # fmt: skip
def test_inconsistent_fields_are_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as raised:
        _ = chat(**fields).prompts
    assert (raised.value.status, raised.value.param) == (400, param)


def test_response_constraints_become_session_options() -> None:
    schema = {"type": "integer"}
    named = {"name": "n", "schema": schema, "strict": True}
    for fields, expected in (
        ({}, ("", {})),
        ({"response_format": {"type": "text"}}, ("", {})),
        (JSON, ("response_format", {"json_schema": {"type": "object"}})),
        (
            {"response_format": {"type": "json_schema", "json_schema": named}},
            ("response_format", {"json_schema": schema}),
        ),
        ({"structured_outputs": {"json": schema}}, ("structured_outputs.json", {"json_schema": schema})),
        (
            {"structured_outputs": {"json_object": True}},
            ("structured_outputs.json_object", {"json_schema": {"type": "object"}}),
        ),
        ({"structured_outputs": {"choice": ["a"]}}, ("structured_outputs.choice", {"choice": ["a"]})),
        ({"structured_outputs": {"regex": "a"}}, ("structured_outputs.regex", {"regex": "a"})),
        ({"structured_outputs": {"grammar": "b"}}, ("structured_outputs.grammar", {"grammar": "b"})),
        ({"tools": TOOLS, "tool_choice": "none"}, ("", {})),
    ):
        assert constraint(chat(**fields), MARKED) == expected
        if "tools" not in fields:
            body = json.dumps({"prompt": "x", **fields}).encode()
            assert constraint(parse(body, CompletionRequest), MARKED) == expected
    with pytest.raises(ApiError, match="calls are JSON as its answers are"):
        constraint(chat(tools=TOOLS, **JSON), BARE)


# Over the wire


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Running]:
    with running(chat, names=("chat",), slots=4) as server:
        yield server


ASKED: dict[str, Any] = {"model": "chat", "messages": MESSAGES, "max_tokens": 200}


@pytest.mark.parametrize(
    ("fields", "names"),
    [({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "clock"}), (NAMED, {"clock"})],
)
def test_tool_calls_have_the_clients_types_whole_and_streamed(
    fields: dict[str, Any], names: set[str], client: openai.OpenAI
) -> None:
    asked = {**ASKED, "tools": TOOLS, **fields, "n": 2}
    whole = client.chat.completions.create(**asked)
    for choice in whole.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or ()
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name in names
        given = json.loads(call.function.arguments)
        assert given in ({"city": "Rome"}, {"city": 'Oslo "N"'}) if call.function.name == "weather" else given == {}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    for streamed, choice in zip(final.choices, whole.choices, strict=True):
        assert streamed.finish_reason == "tool_calls"
        (ours,), (theirs,) = streamed.message.tool_calls or (), choice.message.tool_calls or ()
        assert (ours.function.name, ours.function.arguments) == (theirs.function.name, theirs.function.arguments)


def test_conversation_continues_after_a_tool_call(client: openai.OpenAI) -> None:
    asked = {**ASKED, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**asked).choices[0].message
    (call,) = message.tool_calls or ()
    messages: list[Any] = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}]
    again = client.chat.completions.create(**{**asked, "messages": messages, "tool_choice": "auto", "max_tokens": 8})
    assert again.usage is not None
    assert again.usage.prompt_tokens > 100
    assert again.choices[0].finish_reason in ("length", "stop", "tool_calls")
    cut = client.chat.completions.create(**{**asked, "max_tokens": 40}).choices[0]
    assert cut.finish_reason == "length"


def test_responses_call_functions_and_continue(client: openai.OpenAI) -> None:
    chosen = client.chat.completions.create(**{**ASKED, **NAMED}).choices[0].message.tool_calls or ()
    tools: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"model": "chat", "tools": tools, "tool_choice": {"type": "function", "name": "clock"}}
    asked |= {"input": MESSAGES, "max_output_tokens": 200}
    whole = client.responses.create(**asked)
    (call,) = whole.output
    assert (call.type, call.status, call.name) == ("function_call", "completed", "clock")
    assert call.arguments == chosen[0].function.arguments
    with client.responses.stream(**asked) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        final = stream.get_final_response().output
    assert kinds[2] == "output_item.added"
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert [(one.name, one.arguments) for one in final] == [(call.name, call.arguments)]  # type: ignore[union-attr]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Noon."}
    items = [*MESSAGES, call.model_dump(exclude={"parsed_arguments"}), result]
    again = client.responses.create(**{**asked, "input": items, "tool_choice": "auto", "max_output_tokens": 8})
    assert again.usage is not None
    assert again.usage.input_tokens > whole.usage.input_tokens  # type: ignore[union-attr]
    assert again.output


class Package(BaseModel):
    kind: Literal["library", "program"]
    free: bool
    sizes: tuple[Literal[1, 2], Literal[3, 4]]


def test_answers_are_parsed_into_the_clients_models(client: openai.OpenAI) -> None:
    choice = client.chat.completions.parse(**ASKED, response_format=Package).choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Package)
    given = {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}
    assert client.chat.completions.create(**ASKED, **given).choices[0].message.content in ("yes", "no")
    text = client.completions.create(
        model="chat", prompt="x", max_tokens=9, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}
    )
    assert text.choices[0].text.isdigit()
    streamed = client.chat.completions.create(**ASKED, stream=True, **given)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) in ("yes", "no")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}},
         "response_format", "response_format cannot be used: Unsatisfiable schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"if": {}}}}},
         "response_format", "Unimplemented keys"),
        ({"structured_outputs": {"json": {"properties": {f"k{n}": {} for n in range(9999)}}}},
         "structured_outputs.json", "9999 keys"),
        ({"structured_outputs": {"grammar": "start: %json " + json.dumps({f"k{n}": {} for n in range(9999)})}},
         "structured_outputs.grammar", "9999 keys"),
        ({"structured_outputs": {"regex": "(" * 99}}, "structured_outputs.regex", "cannot be used"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "choice is \\[\\]|give a list"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"enum": []}}}]},
         "tools", "cannot be used"),
        ({"structured_outputs": {"json": {"enum": ["x" * 300_000]}}}, "structured_outputs.json", "at most 262144"),
        ({"free": {"mode": "fast"}, **JSON}, "free.mode", "Invalid enum"),
    ],
)  # fmt: skip
def test_unsupported_constraint_is_a_bad_request(
    fields: dict[str, Any], param: str, message: str, server: Running
) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**ASKED, **fields}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert re.search(message, error["message"])
    assert len(error["message"]) < 500
