"""Anthropic's /v1/messages, whole or as events, and /v1/messages/count_tokens.

Input is text, calls of tools and their results. Output is text and calls. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec

from freeexport.serving.errors import ApiError, invalid, unsupported
from freeexport.serving.protocol import (
    ChatRequest,
    Count,
    Free,
    Function,
    FunctionCall,
    Message,
    Named,
    Salt,
    Stop,
    StreamOptions,
    Tool,
    ToolCall,
    ToolChoice,
)
from freeexport.serving.replies import EventReply, usage, with_end
from runtime import GenerationResult, Token
from runtime.errors import shown

PATH = "/v1/messages"
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
STOP_REASONS = {
    "eos": "end_turn",
    "stop": "stop_sequence",
    "length": "max_tokens",
    "deadline": "max_tokens",
}
# Types of content blocks by role.
BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use")}


class ContentBlock(msgspec.Struct, kw_only=True):
    """A text, a call of a tool, or the result of a call. Other types are refused."""

    type: str
    text: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: str | list[ContentBlock] = ""


class ConversationTurn(msgspec.Struct):
    role: Literal["user", "assistant"]
    content: str | list[ContentBlock]


class ClientTool(msgspec.Struct, kw_only=True):
    """A tool that the client runs. Tools that a server runs are refused."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,64}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] = "custom"


class ClientToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class CountRequest(msgspec.Struct, kw_only=True):
    """A request to count the tokens of a message's prompt."""

    messages: Annotated[list[ConversationTurn], msgspec.Meta(min_length=1, max_length=10_000)]
    model: str | None = None
    system: str | list[ContentBlock] = ""
    tools: Annotated[list[ClientTool], msgspec.Meta(max_length=128)] = []
    tool_choice: ClientToolChoice | None = None

    def chat(self, **options: Any) -> ChatRequest:
        """Convert to an equivalent chat request with further fields.

        Raises:
            ApiError: If a content block is unsupported, or the tools are invalid.
        """
        messages = list[Message]()
        if system := _text(self.system, "system"):
            messages.append(Message("system", system))
        for number, turn in enumerate(self.messages):
            messages += _converted(turn, f"messages[{number}].content")
        if self.messages[-1].role == "assistant":
            raise invalid(
                "messages",
                "the last message has role 'assistant', and answers that are begun by the client "
                "are not supported; end with a message of role 'user'",
            )
        chosen = self.tool_choice or ClientToolChoice(type="auto")
        choice: Any = {"any": "required", "tool": ToolChoice("function", Named(chosen.name))}
        return ChatRequest(
            messages=messages,
            model=self.model,
            tools=[
                Tool(
                    type="function",
                    function=Function(
                        name=tool.name, description=tool.description, parameters=tool.input_schema
                    ),
                )
                for tool in self.tools
            ],
            tool_choice=choice.get(chosen.type, chosen.type),
            parallel_tool_calls=not chosen.disable_parallel_tool_use,
            **options,
        )


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Count
    stop_sequences: Annotated[list[Stop], msgspec.Meta(max_length=16)] = []
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    stream: bool = False
    cache_salt: Salt | None = None
    free: Free = msgspec.field(default_factory=Free)

    def chat(self, **options: Any) -> ChatRequest:
        """Convert to an equivalent chat request. See `CountRequest.chat`."""
        return super().chat(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop_sequences,
            stream=self.stream,
            stream_options=StreamOptions(include_usage=True) if self.stream else None,
            cache_salt=self.cache_salt,
            free=self.free,
            **options,
        )


def _converted(turn: ConversationTurn, where: str) -> list[Message]:
    """Return the messages of a turn: each result of a call, and each run of texts and calls.

    Raises:
        ApiError: If a content block is unsupported.
    """
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    messages = list[Message]()
    for place, block in enumerate(turn.content):
        found = f"{where}[{place}]"
        _check(block, found, BLOCKS[turn.role])
        if block.type == "tool_result":
            result = _text(block.content, f"{found}.content")
            messages.append(Message("tool", result, tool_call_id=block.tool_use_id or None))
            continue
        if not (messages and messages[-1].role == turn.role):
            messages.append(Message(turn.role, ""))
        message = messages[-1]
        if block.type == "text":
            message.content = f"{message.content}{block.text}"
        else:
            arguments = msgspec.json.encode(block.input).decode()
            call = ToolCall(FunctionCall(block.name, arguments), block.id)
            message.tool_calls = [*(message.tool_calls or ()), call]
    return messages or [Message(turn.role, "")]


def _text(content: str | list[ContentBlock], where: str) -> str:
    """Join the texts of a content.

    Raises:
        ApiError: If a block is not text.
    """
    if isinstance(content, str):
        return content
    for place, block in enumerate(content):
        _check(block, f"{where}[{place}]", ("text",))
    return "".join(block.text or "" for block in content)


def _check(block: ContentBlock, where: str, types: Sequence[str]) -> None:
    if block.type not in types:
        advice = f"send {' or '.join(map(repr, types))}"
        raise unsupported(f"{where}.type", advice, f" {shown(block.type)}")
    if block.type == "text" and block.text is None:
        raise invalid(f"{where}.text", f"{where}.text is missing; send text")
    if block.type == "tool_use" and not block.name:
        raise invalid(f"{where}.name", f"{where}.name is missing; name the tool")


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the body of an error in Anthropic's format."""
    kind = ERROR_TYPES.get(
        error.status, "api_error" if error.status >= 500 else "invalid_request_error"
    )
    return {"type": "error", "error": {"type": kind, "message": error.message}}


class MessageReply(EventReply):
    """Formats a message, whole or as events."""

    prefix = "msg"
    _original: MessagesRequest
    _arguments = ""  # JSON of the open call

    def failed(self, error: ApiError) -> bytes:
        return self.encode([error_body(error)])

    def whole(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        (result,) = results
        self._take(result.text, last=True)
        return with_end(
            {
                **self._message(),
                "content": self._parts,
                **self._stopped(result),
                "usage": _counted(result, prompts),
            },
            result,
        )

    def opening(self, index: int) -> Any:
        counts = {"input_tokens": sum(self.prompts), "output_tokens": 0}
        nothing: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counts,
        }
        return [{"type": "message_start", "message": {**self._message(), **nothing}}]

    def chunk(
        self, index: int, tokens: Sequence[Token], result: GenerationResult | None = None
    ) -> Any:
        return self._take("".join(token.text for token in tokens), result is not None)

    def usage(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> Any:
        (result,) = results
        ended = {
            "type": "message_delta",
            "delta": self._stopped(result),
            "usage": _counted(result, prompts),
        }
        return [with_end(ended, result), {"type": "message_stop"}]

    def _message(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}

    def _stopped(self, result: GenerationResult) -> dict[str, Any]:
        """Return why the answer ended, and the stop sequence that ended it."""
        reason = STOP_REASONS[result.finish_reason]
        found = None
        if reason == "stop_sequence" and self._tokenizer is not None:
            rest = self._tokenizer.decode(result.token_ids)[len(result.text) :]
            found = next(filter(rest.startswith, self._original.stop_sequences), None)
        called = any(block["type"] == "tool_use" for block in self._parts)
        if called and reason == "end_turn":
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": found}

    def _take(self, text: str, last: bool) -> list[dict[str, Any]]:
        """Add text to the content and return the resulting events.

        Args:
            text: Text since the last call.
            last: The answer ends with this text.
        """
        events = list[dict[str, Any]]()
        calls = list[dict[str, Any]]()
        if self._reader is not None:
            text, calls = self._reader.read(text, last)
        if text:
            if not self._parts:
                events.append(self._begin({"type": "text", "text": ""}))
            self._parts[-1]["text"] += text
            events.append(self._delta({"type": "text_delta", "text": text}))
        for call in calls:
            if "id" in call:
                events += self._end()
                name = call["function"]["name"]
                named = {"type": "tool_use", "id": call["id"], "name": name, "input": {}}
                events.append(self._begin(named))
            if arguments := call["function"]["arguments"]:
                self._arguments += arguments
                events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        return events + (self._end() if last else [])

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self._parts.append(block)
        place = len(self._parts) - 1
        return {"type": "content_block_start", "index": place, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._parts) - 1, "delta": delta}

    def _end(self) -> list[dict[str, Any]]:
        """Close the open block, if any. Arguments that were cut short stay empty."""
        if not self._parts:
            return []
        if self._arguments:
            with suppress(msgspec.DecodeError):
                self._parts[-1]["input"] = msgspec.json.decode(self._arguments)
            self._arguments = ""
        return [{"type": "content_block_stop", "index": len(self._parts) - 1}]


def _counted(result: GenerationResult, prompts: Sequence[int]) -> dict[str, Any]:
    counted = usage([result], prompts)
    cached = counted["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": counted["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": counted["completion_tokens"],
        "free": counted["free"],
    }
