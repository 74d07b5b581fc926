"""Constrained answers and function calls.

Builds the grammar of an answer, describes tools in prompts, and parses calls.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from freeexport.serving.errors import invalid
from freeexport.serving.protocol import ChatRequest, CompletionRequest, Tool
from runtime import OptionError
from runtime.options.checks import check_schema
from runtime.text.grammar import JSON_FORM, written_form
from runtime.text.tokenizer import Tokenizer

MARK = "<tool_call>"
# For models whose chat template does not support tools.
INSTRUCTIONS = """# Functions

Call a function where it helps to answer. There are, a line each:
{functions}

To call one, answer with its name and arguments as JSON, between these marks, and nothing \
after them:
<tool_call>
{{"name": "the function", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""
HEAD = re.compile(r'\{"name": "([^"]*)", "\w+": ')


@dataclass(frozen=True)
class CallForm:
    """Format in which a model writes calls.

    Attributes:
        marked: A call is a JSON object between marks. Otherwise it is bare JSON, and several calls
            are a list.
        key: Key of the arguments.
        shown: The chat template supports tools.
    """

    marked: bool = True
    key: str = "arguments"
    shown: bool = True

    @property
    def begin(self) -> str:
        return f"{MARK}\n" if self.marked else ""

    @property
    def end(self) -> str:
        return "\n</tool_call>" if self.marked else ""


def form_of(tokenizer: Tokenizer | None) -> CallForm:
    """Infer the format of calls from a chat template."""
    template = (tokenizer.chat_template if tokenizer is not None else None) or ""
    shown = re.search(r"\btools\b", template) is not None
    # A mark that is a special token does not appear in text.
    special = tokenizer is not None and MARK in map(tokenizer.token, tokenizer.special_ids)
    marked = (MARK in template or not shown) and not special
    key = (
        "parameters"
        if '"parameters"' in template and '"arguments"' not in template and not marked
        else "arguments"
    )
    return CallForm(marked, key, shown)


def constraint(
    request: ChatRequest | CompletionRequest, form: CallForm
) -> tuple[str, dict[str, Any]]:
    """Return the request field that constrains an answer, and the session option for it.

    Without a constraint, both are empty.

    Raises:
        ApiError: If a schema is invalid.
    """
    tools = request.offered
    if tools:
        field = (
            "response_format"
            if request.must_call is False and request.schema is not None
            else "tools"
        )
        return field, {"grammar": calls_grammar(tools, request, form)}
    if request.schema is not None:
        return "response_format", {"json_schema": request.schema}
    given = request.structured_outputs
    if given is None:
        return "", {}
    name, value = given.constraint
    return f"structured_outputs.{name}", {
        "json_schema" if name in ("json", "json_object") else name: value
    }


def calls_grammar(
    tools: Sequence[Tool], request: ChatRequest | CompletionRequest, form: CallForm
) -> str:
    """Return a Lark grammar of calls.

    The grammar permits several calls if the request does, and an answer unless the request requires
    a call.

    Raises:
        ApiError: If a schema is invalid, or its answers would look like calls.
    """
    rules = list[str]()
    for number, tool in enumerate(tools):
        function = tool.function
        _check(f"tools[{number}].function.parameters", function.parameters)
        schema = {"type": "object", **(function.parameters or {"additionalProperties": False})}
        schema = written_form(
            {**schema, "x-guidance": {**JSON_FORM, "lenient": not function.strict}}
        )
        head = json.dumps(f'{{"name": "{function.name}", "{form.key}": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(schema)}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    begin = json.dumps(form.begin)
    end = json.dumps(form.end)
    if form.marked:
        rest = f'call {end} ("\\n" {begin} call {end})*' if request.parallel else f"call {end}"
        calls = f"{begin} {rest}"
    else:
        calls = 'call | "[" call (", " call)* "]"' if request.parallel else "call"
    if request.must_call:
        return "\n".join([f"start: {calls}", *rules])
    if request.schema is not None:
        if not form.marked:
            raise invalid(
                "response_format", "this model's calls are JSON as its answers are; leave out tools"
            )
        _check("response_format", request.schema)
        rules.append(f"answer: %json {json.dumps(written_form(request.schema))}")
        return "\n".join([f"start: answer | {calls}", *rules])
    if form.marked:
        rules += [f"head[lazy]: ANSWER {begin}", f"ANSWER: /(?s:.*)/ & ~/(?s:.*){MARK}(?s:.*)/"]
        return "\n".join([f"start: ANSWER | head {rest}", *rules])
    return "\n".join([f"start: ANSWER | {calls}", *rules, r"ANSWER: /([^{\[](?s:.*))?/"])


def _check(field: str, schema: Any) -> None:
    try:
        check_schema(field, schema)
    except OptionError as error:
        raise invalid(field, str(error)) from None


def tools_as_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], form: CallForm
) -> list[dict[str, Any]]:
    """Rewrite messages for a chat template that does not support tools.

    Functions are described in the system message. Calls and results become text.
    """
    rewritten = list[dict[str, Any]]()
    for message in messages:
        calls = "\n".join(
            f"""{form.begin}{
                json.dumps(
                    {"name": call["function"]["name"], form.key: call["function"]["arguments"]}
                )
            }{form.end}"""
            for call in message.get("tool_calls", ())
        )
        content = "\n".join(filter(None, (message["content"], calls)))
        if message["role"] == "tool":
            rewritten.append(
                {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
            )
        else:
            rewritten.append({"role": message["role"], "content": content})
    if tools:
        functions = "\n".join(json.dumps(tool["function"]) for tool in tools)
        instructions = INSTRUCTIONS.format(functions=functions)
        if rewritten and rewritten[0]["role"] == "system":
            rewritten[0]["content"] += f"\n\n{instructions}"
        else:
            rewritten.insert(0, {"role": "system", "content": instructions})
    return rewritten


class CallReader:
    """Incremental parser that splits an answer of `calls_grammar` into text and calls.

    Attributes:
        count: Number of calls that have started.
    """

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._left = ""
        self._state = "answer" if form.marked else "first"
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.count = 0

    def read(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Parse the next piece. Return its text, and its calls as deltas of a stream.

        Args:
            text: Text of the answer since the last call.
            last: The answer ends with this piece.
        """
        self._left += text
        answer = ""
        calls = dict[int, dict[str, Any]]()
        while self._left:
            before = self._state, self._left
            if self._state == "first":
                self._state = "head" if self._left[0] in "{[" else "rest"
                self._left = self._left.removeprefix("[")
            elif self._state == "rest":
                answer = answer + self._left
                self._left = ""
            elif self._state == "answer":
                answer += self._answer(last)
            elif self._state == "head":
                self._head(calls)
            elif self._state == "arguments":
                call = calls.setdefault(
                    self.count - 1, {"index": self.count - 1, "function": {"arguments": ""}}
                )
                call["function"]["arguments"] += self._arguments()
            elif self._left.startswith("}" + self._form.end):
                self._left = self._left.removeprefix("}" + self._form.end)
                self._state = "between"
            if self._state == "between":
                separator = f"\n{self._form.begin}" if self._form.marked else ", "
                if self._left.startswith(separator):
                    self._left = self._left.removeprefix(separator)
                    self._state = "head"
            if (self._state, self._left) == before:
                break
        return answer, list(calls.values())

    def _answer(self, last: bool) -> str:
        """Return the text before a mark or before a possible start of one."""
        text, mark, rest = self._left.partition(self._form.begin)
        if mark:
            self._left = rest
            self._state = "head"
            return text
        begins = (
            size
            for size in range(len(self._form.begin) - 1, 0, -1)
            if text.endswith(self._form.begin[:size])
        )
        end = len(text) - (0 if last else next(begins, 0))
        self._left = text[end:]
        return text[:end]

    def _head(self, calls: dict[int, dict[str, Any]]) -> None:
        match = HEAD.match(self._left)
        if match is not None:
            self._left = self._left[match.end() :]
            self._state = "arguments"
            function = {"name": match[1], "arguments": ""}
            id_ = f"call_{secrets.token_hex(12)}"
            calls[self.count] = {
                "index": self.count,
                "id": id_,
                "type": "function",
                "function": function,
            }
            self.count += 1

    def _arguments(self) -> str:
        """Return the text up to the end of the arguments, or all text if they go on."""
        for place, character in enumerate(self._left):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            else:
                self._quoted = character == '"'
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth and character in "}]":
                    text = self._left[: place + 1]
                    self._left = self._left[place + 1 :]
                    self._state = "tail"
                    return text
        text = self._left
        self._left = ""
        return text


def read_calls(text: str, form: CallForm) -> tuple[str, list[dict[str, Any]]]:
    """Return the text and calls of a complete answer. The last call may be cut short."""
    answer, calls = CallReader(form).read(text, last=True)
    return answer, [
        {name: value for name, value in call.items() if name != "index"} for call in calls
    ]
