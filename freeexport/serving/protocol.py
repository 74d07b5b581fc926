"""Requests as OpenAI's clients write them: typed, validated, and refused by the name of the field."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from freeexport.serving.errors import ApiError, invalid
from runtime import GenerationOptions
from runtime.options import MOST_TOP_LOGPROBS, Mode

MOST_CHOICES, MOST_MESSAGES = 128, 10_000
MOST_STOPS, LONGEST_STOP = 16, 1024
MOST_BIASES = 1024
MOST_COMPLETION_LOGPROBS = 5

# Fields that say nothing with these values, as clients send them unasked. Others of the same name are refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
# Why a field of OpenAI's is refused, where that is not plain.
BECAUSE = {
    "frequency_penalty": "repetition_penalty is the penalty there is",
    "presence_penalty": "repetition_penalty is the penalty there is",
    "top_logprobs": "in completions, logprobs is how many",
    "best_of": "use n",
}

Count = Annotated[int, msgspec.Meta(ge=1)]
Stop = Annotated[str, msgspec.Meta(max_length=LONGEST_STOP)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]


class Free(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that FREE adds. `deadline`: seconds for the whole request. `exits`: chunks say which of their tokens
    exited."""

    mode: Mode | None = None
    threshold: float | None = None
    deadline: float | None = None
    exits: bool = False


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False


class Request(msgspec.Struct, kw_only=True):
    """The fields that chats and completions share."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MOST_CHOICES)] = 1
    logit_bias: Annotated[dict[TokenId, float], msgspec.Meta(max_length=MOST_BIASES)] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = None
    free: Free = msgspec.field(default_factory=Free)

    # Where chats and completions differ: the most tokens, whether they have log-probabilities, how many alternatives
    # each has, and the text that the answer is expected to be but for changes.
    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return False

    @property
    def alternatives(self) -> int:
        return 0

    @property
    def expected(self) -> str:
        return ""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options is given without stream; add stream: true")

    def options(self, mode: Mode | None, deadline: float | None) -> GenerationOptions:
        """Options of one choice, but for `max_new_tokens` and the seed. `mode` and `deadline` are the server's own.
        Raises OptionError."""
        sampling = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p")}
        temperature = self.temperature
        if temperature is None and (self.top_k or self.min_p or self.top_p not in (None, 1)):
            temperature = 1.0
        if not temperature:  # greedy: these choose nothing
            sampling = {}
        deadlines = [seconds for seconds in (self.free.deadline, deadline) if seconds is not None]
        return GenerationOptions(
            mode=self.free.mode or ("lossless" if self.expected else mode),
            threshold=self.free.threshold,
            deadline=min(deadlines, default=None),
            temperature=temperature,
            repetition_penalty=self.repetition_penalty,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            sequence_bias=self.logit_bias or None,
            predicted_output=self.expected or None,
            output_logprobs=self.wants_logprobs,
            top_logprobs=self.alternatives,
            cache_salt=self.cache_salt,
            **sampling,
        )


class Part(msgspec.Struct):
    type: str
    text: str | None = None


def joined(content: str | list[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise _unsupported(f"{where}[{place}].type {part.type[:40]!r}", "this model reads text")
    return "".join(part.text or "" for part in content)


NOTHING = msgspec.Raw(b"null")


class Message(msgspec.Struct):
    role: str
    content: str | list[Part]
    name: str | None = None
    tool_calls: msgspec.Raw = NOTHING  # unread: there may be a million of them
    tool_call_id: str | None = None

    def plain(self, number: int) -> dict[str, str]:
        """For a chat template. `developer` is OpenAI's new name of the system."""
        used = {
            "name": self.name,
            "tool_calls": bytes(self.tool_calls) not in (b"null", b"[]"),
            "tool_call_id": self.tool_call_id,
        }
        for field in filter(used.get, used):
            raise _unsupported(f"messages[{number}].{field}", "messages have a role and a text")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": joined(self.content, f"messages[{number}].content")}


Messages = Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MOST_MESSAGES)]


def plain(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [message.plain(number) for number, message in enumerate(messages)]


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["content"]
    content: str | list[Part]


class ChatRequest(Request, kw_only=True):
    messages: Messages
    prediction: Prediction | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_LOGPROBS)] = 0

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def alternatives(self) -> int:
        return self.top_logprobs

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            wrong = f"top_logprobs is {self.top_logprobs} without logprobs; add logprobs: true"
            raise invalid("top_logprobs", wrong)
        if self.prediction is not None and self.free.mode not in (None, "lossless"):
            wrong = f"prediction is given with free.mode {self.free.mode!r}, which drafts nothing"
            raise invalid("prediction", f"{wrong}; choose 'lossless', or leave the mode out")

    @property
    def expected(self) -> str:
        return "" if self.prediction is None else joined(self.prediction.content, "prediction.content")

    @property
    def prompts(self) -> list[Any]:
        return [plain(self.messages)]


class CompletionRequest(Request, kw_only=True):
    prompt: str | list[int | str | list[int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_COMPLETION_LOGPROBS)] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    def check(self) -> None:
        super().check()
        if isinstance(self.prompt, list) and len({type(part) for part in self.prompt}) != 1:
            wrong = "mixes texts and token ids" if self.prompt else "is an empty list"
            raise invalid("prompt", f"prompt {wrong}; give a text, token ids, or a list of them")

    @property
    def prompts(self) -> list[Any]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


class TokenizeRequest(msgspec.Struct):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct):
    tokens: list[TokenId]
    model: str | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def parse(body: bytes, kind: type[Body]) -> Body:
    """A request body as `kind`. Raises ApiError naming what is not JSON, not supported, or of a wrong type."""
    try:
        # Values are not read yet: a million tools cost nothing.
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise ApiError(400, "the body is no JSON object; send the fields of a request", "invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error) from None
    values = {name: bytes(value) for name, value in given.items() if bytes(value) != b"null"}
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name in [name for name in values if name not in known]:
        if not _neutral(name, values.pop(name)):
            raise _unsupported(name[:80], BECAUSE.get(name, "remove it"), name[:80])
    try:
        request = msgspec.json.decode(
            b"{%s}" % b",".join(b'"%s":%s' % (name.encode(), value) for name, value in values.items()), type=kind
        )
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        param = re.sub(r"^(`key` in )?`\$\.?|`$", "", path) or None
        raise ApiError(400, f"{param or 'the body'}: {message}", "invalid_type", param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error) from None
    if isinstance(request, Request):
        request.check()
    return request


def _unsupported(what: str, advice: str, param: str | None = None) -> ApiError:
    return ApiError(400, f"{what} is not supported; {advice}", "unsupported", param or what.partition(" ")[0])


def _not_json(error: BaseException) -> ApiError:
    return ApiError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}", "invalid_json")


def _neutral(name: str, value: bytes) -> bool:
    if name not in NEUTRAL or len(value) > 100:
        return False
    try:
        return msgspec.json.decode(value) in NEUTRAL[name]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
