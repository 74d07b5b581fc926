"""OpenAI's /v1/responses: text in, text out, whole or as events. Nothing is stored, and there are no tools."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from freeexport.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Count,
    Free,
    JsonSchema,
    Message,
    Part,
    ResponseFormat,
    StreamOptions,
    unsupported,
)
from freeexport.serving.replies import Reply, usage
from runtime import GenerationResult, Session, Token

TEXTS = ("input_text", "output_text", "text")


class InputItem(msgspec.Struct):
    role: str
    content: str | list[Part]
    type: Literal["message"] = "message"


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat = msgspec.field(default_factory=TextFormat)


class ResponseRequest(msgspec.Struct, kw_only=True):
    input: str | Annotated[list[InputItem], msgspec.Meta(min_length=1, max_length=10_000)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    text: Text = msgspec.field(default_factory=Text)
    user: str | None = None
    free: Free = msgspec.field(default_factory=Free)

    def chat(self) -> ChatRequest:
        """Return the chat that asks for the same. Raises ApiError for a part that is no text."""
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            messages.append(Message("user", self.input))
        else:
            messages += [_message(item, f"input[{number}]") for number, item in enumerate(self.input)]
        form = self.text.format
        schema = JsonSchema(name=form.name, schema=form.schema) if form.type == "json_schema" else None
        return ChatRequest(
            messages=messages,
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            stream_options=StreamOptions(include_usage=True) if self.stream else None,
            response_format=ResponseFormat(type=form.type, json_schema=schema),
            user=self.user,
            free=self.free,
        )


def _message(item: InputItem, where: str) -> Message:
    if isinstance(item.content, str):
        return Message(item.role, item.content)
    for number, part in enumerate(item.content):
        if part.type not in TEXTS or part.text is None:
            raise unsupported(f"{where}.content[{number}].type", "this model reads text", f" {part.type[:40]!r}")
    return Message(item.role, "".join(part.text or "" for part in item.content))


class ResponseReply(Reply):
    """Formats a response, whole or as the events that end with it."""

    end = b""

    def __init__(
        self, session: Session, model: str, chat: ChatRequest | CompletionRequest, asked: ResponseRequest
    ) -> None:
        super().__init__(session, model, chat)
        self.id, self._item = (f"{kind}_{secrets.token_hex(12)}" for kind in ("resp", "msg"))
        self._asked, self._number = asked, 0

    def encode(self, data: Any) -> bytes:
        """Return events as they are sent, numbered."""
        written = []
        for event in data:
            kind, numbered = event["type"], {**event, "sequence_number": self._number}
            written.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(numbered)))
            self._number += 1
        return b"".join(written)

    def failed(self, error: ApiError) -> bytes:
        found = error.body["error"]
        return self.encode([{"type": "error", **{name: found[name] for name in ("code", "message", "param")}}])

    def whole(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> dict[str, Any]:
        return self._response(results[0], prompts)

    def opening(self, index: int) -> Any:
        begun = self._response(None, ())
        return [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": self._message(None)},
            {"type": "response.content_part.added", **self._place, "part": self._part("")},
        ]

    def chunk(self, index: int, tokens: Sequence[Token], result: GenerationResult | None = None) -> Any:
        text = "".join(token.text for token in tokens)
        events = [{"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": []}] if text else []
        if result is not None:
            done = {**self._place, "text": result.text, "logprobs": []}
            events += [
                {"type": "response.output_text.done", **done},
                {"type": "response.content_part.done", **self._place, "part": self._part(result.text)},
                {"type": "response.output_item.done", "output_index": 0, "item": self._message(result)},
            ]
        return events

    def usage(self, results: Sequence[GenerationResult], prompts: Sequence[int]) -> Any:
        response = self._response(results[0], prompts)
        return [{"type": f"response.{response['status']}", "response": response}]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _message(self, result: GenerationResult | None) -> dict[str, Any]:
        content = [] if result is None else [self._part(result.text)]
        item = {"id": self._item, "type": "message", "role": "assistant", "content": content}
        return {**item, "status": _status(result)}

    def _response(self, result: GenerationResult | None, prompts: Sequence[int]) -> dict[str, Any]:
        asked, cut = self._asked, result is not None and result.finish_reason == "length"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "model": self._model,
            "status": _status(result),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "text": asked.text,
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "store": False,
            "metadata": {},
            "output": [] if result is None else [self._message(result)],
            "usage": None if result is None else _counted(result, prompts),
        }


def _status(result: GenerationResult | None) -> str:
    if result is None:
        return "in_progress"
    return "incomplete" if result.finish_reason == "length" else "completed"


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
