"""OpenAI's /v1/responses, whole or as events.

Input is text. Output is text and function calls. Nothing is stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from freeexport.serving.errors import ApiError, invalid, unsupported
from freeexport.serving.protocol import (
    ChatRequest,
    ContentPart,
    Count,
    Free,
    Function,
    FunctionCall,
    JsonSchema,
    Message,
    Named,
    ResponseFormat,
    Salt,
    StreamOptions,
    Tool,
    ToolCall,
    ToolChoice,
)
from freeexport.serving.replies import REASONS, EventReply, usage, with_end
from runtime import GenerationResult, Token
from runtime.errors import shown

TEXTS = ("input_text", "output_text", "text")


class InputItem(msgspec.Struct, kw_only=True):
    """A message, an earlier function call, or the output of a function."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str = ""
    content: str | list[ContentPart] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[ContentPart] | None = None


class FunctionTool(Function, kw_only=True):
    type: Literal["function"]


class FunctionChoice(Named):
    type: Literal["function"]


class ResponseTextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: ResponseTextFormat = msgspec.field(default_factory=ResponseTextFormat)


class ResponseRequest(msgspec.Struct, kw_only=True):
    input: str | Annotated[list[InputItem], msgspec.Meta(min_length=1, max_length=10_000)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    text: Text = msgspec.field(default_factory=Text)
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool = True
    user: str | None = None
    metadata: dict[str, str] = {}  # returned unchanged
    cache_salt: Salt | None = None
    free: Free = msgspec.field(default_factory=Free)

    def chat(self) -> ChatRequest:
        """Convert to an equivalent chat request.

        Raises:
            ApiError: If an item is invalid or a part is not text.
        """
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            messages.append(Message("user", self.input))
        else:
            for number, item in enumerate(self.input):
                _add(messages, item, f"input[{number}]")
        tools = [
            Tool(
                type="function",
                function=Function(
                    **{name: getattr(tool, name) for name in Function.__struct_fields__}
                ),
            )
            for tool in self.tools or ()
        ]
        chosen = self.tool_choice
        form = self.text.format
        schema = (
            JsonSchema(name=form.name, schema=form.schema) if form.type == "json_schema" else None
        )
        return ChatRequest(
            messages=messages,
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            stream_options=StreamOptions(include_usage=True) if self.stream else None,
            response_format=ResponseFormat(type=form.type, json_schema=schema),
            tools=tools or None,
            tool_choice=ToolChoice("function", chosen)
            if isinstance(chosen, FunctionChoice)
            else chosen,
            parallel_tool_calls=self.parallel_tool_calls,
            user=self.user,
            cache_salt=self.cache_salt,
            free=self.free,
        )


def _add(messages: list[Message], item: InputItem, where: str) -> None:
    """Append an item to a chat. Calls join the preceding message of the assistant.

    Raises:
        ApiError: If an item has no text, or a part is not text.
    """
    if item.type == "function_call":
        if not (messages and messages[-1].role == "assistant"):
            messages.append(Message("assistant", ""))
        call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id)
        if messages[-1].tool_calls is None:
            messages[-1].tool_calls = []
        messages[-1].tool_calls.append(call)
        return
    name = "output" if item.type == "function_call_output" else "content"
    content = getattr(item, name)
    if content is None:
        raise invalid(f"{where}.{name}", f"{where}.{name} is missing; send text")
    for number, part in enumerate(() if isinstance(content, str) else content):
        if part.type not in TEXTS or part.text is None:
            raise unsupported(
                f"{where}.{name}[{number}].type",
                "the model accepts only text",
                f" {shown(part.type)}",
            )
    text = content if isinstance(content, str) else "".join(part.text or "" for part in content)
    if name == "output":
        messages.append(Message("tool", text, tool_call_id=item.call_id or None))
    else:
        messages.append(Message(item.role, text))


class ResponseReply(EventReply):
    """Formats a response, whole or as a series of events that ends with it."""

    prefix = "resp"
    _original: ResponseRequest
    _number = 0  # of the next event

    def encode(self, data: Any) -> bytes:
        """Serialize events and number them."""
        numbered = [
            {**event, "sequence_number": number} for number, event in enumerate(data, self._number)
        ]
        self._number += len(numbered)
        return super().encode(numbered)

    def failed(self, error: ApiError) -> bytes:
        fields = error.body["error"]
        return self.encode(
            [{"type": "error", **{name: fields[name] for name in ("code", "message", "param")}}]
        )

    def whole(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        self._take(results[0].text, results[0])
        return self._response(results[0], prompts)

    def opening(self, index: int) -> Any:
        begun = self._response(None, ())
        return [
            {"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")
        ]

    def chunk(
        self, index: int, tokens: Sequence[Token], result: GenerationResult | None = None
    ) -> Any:
        return self._take("".join(token.text for token in tokens), result)

    def usage(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> Any:
        response = self._response(results[0], prompts)
        return [{"type": f"response.{response['status']}", "response": response}]

    def _take(self, text: str, result: GenerationResult | None) -> list[dict[str, Any]]:
        """Add text to the output and return the resulting events.

        Args:
            text: Text since the last call.
            result: Result of the answer, with its last text.
        """
        events = list[dict[str, Any]]()
        calls = list[dict[str, Any]]()
        if self._reader is not None:
            text, calls = self._reader.read(text, result is not None)
        if text or (result is not None and not self._parts and not calls):
            if not self._parts:
                message = {"type": "message", "role": "assistant", "content": list[Any]()}
                events += self._begin({"id": f"msg_{secrets.token_hex(12)}", **message})
                self._parts[-1]["content"] = [_part("")]
                events.append(self._event("content_part.added", content_index=0, part=_part("")))
            self._parts[0]["content"][0]["text"] += text
            if text:
                events.append(
                    self._event("output_text.delta", content_index=0, delta=text, logprobs=[])
                )
        for call in calls:
            if "id" in call:
                events += self._end("completed") if self._parts else []
                named = {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
                events += self._begin(
                    {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", **named}
                )
            if arguments := call["function"]["arguments"]:
                self._parts[-1]["arguments"] += arguments
                events.append(self._event("function_call_arguments.delta", delta=arguments))
        return events + (self._end(_status(result)) if result is not None else [])

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._parts.append({**item, "status": "in_progress"})
        return [self._event("output_item.added", item=dict(self._parts[-1]))]

    def _end(self, status: str) -> list[dict[str, Any]]:
        """Close the open item and return its last events."""
        item = self._parts[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            events = [
                self._event("output_text.done", content_index=0, text=part["text"], logprobs=[]),
                self._event("content_part.done", content_index=0, part=part),
            ]
        else:
            named = {name: item[name] for name in ("name", "arguments")}
            events = [self._event("function_call_arguments.done", **named)]
        return [*events, self._event("output_item.done", item=item)]

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return an event of the open item."""
        place: dict[str, Any] = {"output_index": len(self._parts) - 1}
        if "item" not in more:
            place["item_id"] = self._parts[-1]["id"]
        return {"type": f"response.{kind}", **place, **more}

    def _response(self, result: GenerationResult | None, prompts: Sequence[int]) -> dict[str, Any]:
        request = self._original
        cut = _status(result) == "incomplete"
        response = {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": _status(result),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "text": request.text,
            "tools": request.tools or [],
            "tool_choice": request.tool_choice or ("auto" if request.tools else "none"),
            "parallel_tool_calls": request.parallel_tool_calls,
            "store": False,
            "metadata": request.metadata,
            "output": list(self._parts),
            "usage": None if result is None else _counted(result, prompts),
        }
        return with_end(response, result)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(result: GenerationResult | None) -> str:
    if result is None:
        return "in_progress"
    return "incomplete" if REASONS[result.finish_reason] == "length" else "completed"


def _counted(result: GenerationResult, prompts: Sequence[int]) -> dict[str, Any]:
    counted = usage([result], prompts)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
        "free": counted["free"],
    }
