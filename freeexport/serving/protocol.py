"""Types of OpenAI-compatible requests, and messages for chat templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec

from freeexport.serving.errors import invalid, unsupported
from runtime import GenerationOptions
from runtime.errors import shown
from runtime.options.checks import LONGEST_SALT
from runtime.options.generation_options import MAX_TOP_LOGPROBS, Mode

Count = Annotated[int, msgspec.Meta(ge=1)]
Stop = Annotated[str, msgspec.Meta(max_length=1024)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
Salt = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_SALT)]
Language = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Free(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of early exit, an extension of OpenAI's requests.

    Attributes:
        mode: Decoding mode. Default: "lossless" with a prediction, else the server's mode.
        threshold: Confidence above which tokens exit. Default: the model's threshold.
        deadline: Time limit for the whole request, in seconds.
        exits: Report for each token if it exited.
        sources: Report where each token came from, and the acceptance of drafts by position.
    """

    mode: Mode | None = None
    threshold: float | None = None
    deadline: float | None = None
    exits: bool = False
    sources: bool = False


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # as in vLLM: usage so far in every chunk


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] = {}
    description: str | None = None
    strict: bool | None = None  # ignored, because answers always match the schema


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            wrong = (
                f"json_schema is {'given' if self.json_schema else 'missing'} "
                f"with type {self.type!r}"
            )
            raise invalid(
                "response_format",
                f"response_format: {wrong}; send a json_schema with type 'json_schema' only",
            )


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Constraint on the answer, as in vLLM. Exactly one field must be set."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            wrong = "has no constraint" if not given else f"has {given[0]} and {given[1]}"
            raise invalid("structured_outputs", f"structured_outputs {wrong}; give one")

    @property
    def constraint(self) -> tuple[str, Any]:
        name = next(
            name for name in self.__struct_fields__ if getattr(self, name) not in (None, False)
        )
        return name, {"type": "object"} if name == "json_object" else getattr(self, name)


class Function(msgspec.Struct, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: Function


class Named(msgspec.Struct):
    name: str


class ToolChoice(msgspec.Struct):
    type: Literal["function"]
    function: Named


class GenerationRequest(msgspec.Struct, kw_only=True):
    """Fields shared by chats and completions."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=16)] | None = None
    seed: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] = 1
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=1024)] = {}
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: Salt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    free: Free = msgspec.field(default_factory=Free)

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "stream_options", "stream_options is given without stream; add stream: true"
            )
        if self.schema is not None and self.structured_outputs is not None:
            raise invalid(
                "structured_outputs", "structured_outputs is given with response_format; choose one"
            )

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of the answer. None: the answer is text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.schema

    @property
    def offered(self) -> list[Tool]:
        """Functions that the answer may call."""
        return []

    @property
    def must_call(self) -> bool:
        """True if the answer must be a call."""
        return False

    @property
    def parallel(self) -> bool:
        """True if the answer may have several calls."""
        return False

    @property
    def limit(self) -> int | None:
        """Maximum number of tokens, or None."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives per token. None: return no log-probabilities."""
        raise NotImplementedError

    @property
    def expected(self) -> str:
        """Predicted output, which the answer is expected to resemble. Default: empty."""
        return ""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, mode: Mode | None, deadline: float | None) -> GenerationOptions:
        """Return the options of one choice, except `max_new_tokens` and the seed.

        Args:
            mode: Mode if the request has none.
            deadline: The server's time limit in seconds. The shorter limit applies.

        Raises:
            OptionError: If an option is invalid.
        """
        temperature = self.temperature
        if temperature is None and (self.top_k or self.min_p or self.top_p not in (None, 1)):
            temperature = 1.0
        greedy = not temperature  # the other sampling parameters then have no effect
        deadlines = [seconds for seconds in (self.free.deadline, deadline) if seconds is not None]
        return GenerationOptions(
            mode=self.free.mode or ("lossless" if self.expected else mode),
            threshold=self.free.threshold,
            deadline=min(deadlines, default=None),
            temperature=temperature,
            top_p=None if greedy else self.top_p,
            top_k=None if greedy else self.top_k,
            min_p=None if greedy else self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            sequence_bias=self.logit_bias or None,
            ignore_eos=self.ignore_eos,
            predicted_output=self.expected or None,
            output_logprobs=self.alternatives is not None,
            top_logprobs=self.alternatives or 0,
            cache_salt=self.cache_salt,
        )


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


def content_text(content: str | list[ContentPart], where: str) -> str:
    """Join the text parts of a content.

    Raises:
        ApiError: If a part is not text.
    """
    if isinstance(content, str):
        return content
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise unsupported(
                f"{where}[{place}].type", "the model accepts only text", f" {shown(part.type)}"
            )
    return "".join(part.text or "" for part in content)


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], msgspec.Meta(max_length=128)] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], msgspec.Meta(min_length=1, max_length=10_000)]


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """Convert messages to dictionaries for a chat template. Role `developer` becomes `system`.

    Raises:
        ApiError: If a message is invalid.
    """
    converted_messages = list[dict[str, Any]]()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        calls = message.tool_calls or []
        if message.name is not None and message.role != "tool":
            raise unsupported(f"{where}.name", "remove it")
        if (calls and message.role != "assistant") or (
            message.tool_call_id and message.role != "tool"
        ):
            field = "tool_calls" if calls else "tool_call_id"
            raise invalid(
                f"{where}.{field}",
                f"{where}.{field} is given with role {shown(message.role)}; remove it",
            )
        if message.content is None and not calls:
            raise invalid(f"{where}.content", f"{where}.content is missing; send text")
        role = "system" if message.role == "developer" else message.role
        converted: dict[str, Any] = {
            "role": role,
            "content": content_text(message.content or "", f"{where}.content"),
        }
        if calls:
            converted["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)
            ]
        if role == "tool":
            converted |= {
                name: value
                for name in ("name", "tool_call_id")
                if (value := getattr(message, name)) is not None
            }
        converted_messages.append(converted)
    return converted_messages


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """Return a call with parsed arguments, which chat templates expect."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise invalid(
            f"{where}.function.arguments", f"{where}.function.arguments is not a JSON object"
        ) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


class PredictedContent(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["content"]
    content: str | list[ContentPart]


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Messages
    prediction: PredictedContent | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[list[Tool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tools()
        if self.top_logprobs and not self.logprobs:
            wrong = f"top_logprobs is {self.top_logprobs} without logprobs; add logprobs: true"
            raise invalid("top_logprobs", wrong)
        if self.prediction is not None and self.free.mode not in (None, "lossless"):
            wrong = f"prediction is given with free.mode {self.free.mode!r}, which drafts nothing"
            raise invalid("prediction", f"{wrong}; use 'lossless' or omit the mode")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        chosen = (
            self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        )
        if chosen is not None and chosen not in names:
            raise invalid(
                "tool_choice",
                f"tool_choice names {shown(chosen)}, which is not in tools; add the function",
            )
        if self.tool_choice == "required" and not names:
            raise invalid("tool_choice", "tool_choice is 'required' without tools; add tools")
        for number, tool in enumerate(self.tools or ()):
            where = f"tools[{number}].function"
            if tool.function.name in names[:number]:
                raise invalid(
                    f"{where}.name",
                    f"{where}.name {tool.function.name!r} is a duplicate; rename one function",
                )
            if (tool.function.parameters or {}).get("type", "object") != "object":
                raise invalid(
                    f"{where}.parameters",
                    f"{where}.parameters is not an object schema; use type 'object'",
                )
        if self.offered and self.structured_outputs is not None:
            raise invalid(
                "structured_outputs", "structured_outputs is given with tools; choose one"
            )

    @property
    def offered(self) -> list[Tool]:
        if self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [tool for tool in self.tools or () if named in (None, tool.function.name)]

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def parallel(self) -> bool:
        return self.parallel_tool_calls and not isinstance(self.tool_choice, ToolChoice)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def expected(self) -> str:
        return (
            ""
            if self.prediction is None
            else content_text(self.prediction.content, "prediction.content")
        )

    @property
    def prompts(self) -> list[Any]:
        return [plain(self.messages)]


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[int | str | list[int]]
    # 0 only reads the prompt, for its log-probabilities or the prefix cache.
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    echo: bool = False
    # Languages of the prompt and the answer, for translation models.
    src_lang: Language | None = None
    tgt_lang: Language | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.echo and self.logprobs is not None:
            raise invalid(
                "stream", "stream is given with echo and logprobs; request the answer whole"
            )
        if isinstance(self.prompt, list) and len({type(part) for part in self.prompt}) != 1:
            wrong = "mixes text and token ids" if self.prompt else "is an empty list"
            raise invalid("prompt", f"prompt {wrong}; send text, token ids, or a list of either")

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def options(self, mode: Mode | None, deadline: float | None) -> GenerationOptions:
        return replace(
            super().options(mode, deadline),
            src_lang=self.src_lang,
            tgt_lang=self.tgt_lang,
            prompt_logprobs=self.logprobs if self.echo else None,
        )

    @property
    def prompts(self) -> list[Any]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct):
    tokens: list[TokenId]
    model: str | None = None
