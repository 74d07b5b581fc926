"""The choices of one request: how they enter the session's queue, and how they are answered, whole or as a stream of
server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec
import numpy as np

from freeexport.serving.grammar_trial import GrammarTrial
from freeexport.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    api_error,
    draining,
    invalid,
)
from freeexport.serving.replies import Reply
from freeexport.serving.service import Record
from freeexport.serving.tools import CallForm, constraint, form_of, shown
from runtime import (
    AsyncStream,
    GenerationOptions,
    GenerationResult,
    OptionError,
    PromptLengthError,
    Session,
    Token,
)
from runtime.options import Mode
from runtime.text.prompt import encode_expected

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Generating = ChatRequest | CompletionRequest

# Prompts of fewer characters are encoded on the event loop, where a thread would take longer.
SHORT = 2000
# Characters that a template writes around a message, about.
MARKUP = 30
# Seconds of silence after which a comment keeps proxies from closing the connection.
PING_SECONDS = 15.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PING = b": ping\n\n"


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Generation:
    """`streams`: one for each choice, those of the first prompt first. `prompts`: tokens of each. `deadline`: status
    and seconds of the one that counts."""

    streams: list[AsyncStream]
    prompts: list[int]
    deadline: tuple[int, float] | None

    async def results(self) -> list[GenerationResult]:
        """Decode all choices to their end, or to the deadline. Raises ApiError as `checked` does."""
        async with _together([stream.drain() for stream in self.streams]) as tasks:
            return [self.checked(await task) for task in tasks]

    def checked(self, result: GenerationResult) -> GenerationResult:
        """Raise ApiError where the server ends, or where the deadline passed before any choice had a token."""
        if result.finish_reason == "deadline" and self.deadline is not None:
            if not any(stream.result.token_ids for stream in self.streams):
                status, seconds = self.deadline
                limit = "the request's deadline" if status == 408 else "the server's limit"
                passed = f"{limit} of {seconds:g} s passed before the first token"
                raise ApiError(
                    status,
                    f"{passed}; ask later, or for more time",
                    "deadline_exceeded",
                    again=False,
                )
            return result
        if result.interrupted:
            raise draining()  # the session was closed: a client that left is not told
        return result

    async def end(self) -> list[GenerationResult]:
        """Give the slots back, and return the results so far. Idempotent."""
        for stream in self.streams:
            await stream.aclose()
        return [stream.result for stream in self.streams]


async def begin(
    session: Session,
    trial: GrammarTrial,
    request: Generating,
    mode: Mode | None,
    deadline: float | None,
) -> Generation:
    """Encode the prompts, and let every choice enter the queue, or none. `mode` and `deadline` are the server's.

    Raises ApiError, PromptError, OptionError, QueueFullError.
    """
    options, prompts, form = (
        request.options(mode, deadline),
        request.prompts,
        form_of(session.tokenizer),
    )
    count, most = len(prompts) * request.n, session.options.slots + session.options.queue
    if count > most:
        asked = f"n is {request.n}" + (f" for {len(prompts)} prompts" if len(prompts) > 1 else "")
        raise invalid("n", f"{asked}; this server takes {most} choices at once, ask for fewer")

    def encode() -> tuple[list[np.ndarray], GenerationOptions]:
        given, read = options, prompts
        tools = [msgspec.to_builtins(tool) for tool in request.offered]
        if isinstance(request, ChatRequest) and not form.shown:
            read, tools = [shown(messages, tools, form) for messages in prompts], []
        encoded = [
            session.encode(prompt, tools=tools, src_lang=given.src_lang, tgt_lang=given.tgt_lang)
            for prompt in read
        ]
        languages = session.manifest.languages
        told = languages is not None and languages.target == "prompt"  # by the ids
        given = replace(given, src_lang=None, tgt_lang=None if told else given.tgt_lang)
        if given.predicted_output is not None:
            expected = given.predicted_output
            ids = encode_expected(
                expected, session.tokenizer, session.manifest.vocab_size, session.capacity
            )
            given = replace(given, predicted_output=ids.tolist())
        return encoded, given

    short = not request.offered and sum(map(_size, (*prompts, request.expected))) <= SHORT
    encoded, options = encode() if short else await asyncio.to_thread(encode)
    if request.offered or request.schema is not None or request.structured_outputs is not None:
        options = await _constrained(options, request, form, session, trial)
    limits = [_limit(options, request, len(ids), session) for ids in encoded]
    ends = (
        None
        if options.deadline is None
        else (408 if options.deadline == request.free.deadline else 504, options.deadline)
    )
    generation = Generation([], [len(ids) for ids in encoded], ends)
    try:
        for ids, limit in zip(encoded, limits, strict=True):
            for number in range(request.n):
                seed = None if request.seed is None else (request.seed + number) % 2**64
                generation.streams.append(
                    session.astream(ids, replace(options, max_new_tokens=limit, seed=seed))
                )
    except BaseException:
        await generation.end()
        raise
    return generation


async def _constrained(
    options: GenerationOptions,
    request: Generating,
    form: CallForm,
    session: Session,
    trial: GrammarTrial,
) -> GenerationOptions:
    """Add the constraint of a request. Raises ApiError for one that cannot be met, or not be compiled in time."""
    field, constrained = await asyncio.to_thread(constraint, request, form)
    try:
        options = await asyncio.to_thread(replace, options, **constrained)
        if options.constraint is not None:
            await trial.check(*options.constraint)
            await asyncio.to_thread(session.prepare, options)
    except OptionError as error:
        raise invalid(field, field + str(error).removeprefix(next(iter(constrained)))) from None
    return options


class EventStream:
    """An ASGI response: the chunks of all choices as they come, and pings while there are none. `record` ends with
    it."""

    def __init__(
        self, generation: Generation, reply: Reply, request: Generating, record: Record
    ) -> None:
        self._generation, self._reply, self._request, self._record = (
            generation,
            reply,
            request,
            record,
        )
        self._written = 0.0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        status, failed = 499, None
        try:
            await while_there(receive, self._answer(send))
            status = 200
        except ClientGone:
            pass
        except Exception as error:
            failed = api_error(error)
            status = failed.status
            await self._write(send, self._reply.failed(failed) + self._reply.end)
            await send({"type": "http.response.body", "body": b""})
            if status == 500:
                raise
        finally:
            self._record.results = await self._generation.end()
            self._record.end(status, failed)

    async def _answer(self, send: Send) -> None:
        headers = [*HEADERS, (b"x-request-id", self._reply.id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._written = asyncio.get_running_loop().time()
        choices = [self._choice(*each, send) for each in enumerate(self._generation.streams)]
        async with _together([*choices, self._ping(send)]) as (*tasks, _):
            results = list(await asyncio.gather(*tasks))
        if self._request.include_usage:
            await self._write(
                send, self._reply.encode(self._reply.usage(results, self._generation.prompts))
            )
        await self._write(send, self._reply.end)
        await send({"type": "http.response.body", "body": b""})

    async def _choice(self, index: int, stream: AsyncStream, send: Send) -> GenerationResult:
        opening = self._reply.opening(index)
        if opening is not None:
            await self._write(send, self._reply.encode(opening))
        held: list[Token] = []  # no text yet: a letter may have several tokens
        async with stream:
            async for token in stream:
                held.append(token)
                chunk = self._reply.chunk(index, held) if token.text else None
                if chunk is not None:
                    await self._write(send, self._reply.encode(chunk))
                    held.clear()
        result = self._generation.checked(stream.result)
        await self._write(send, self._reply.encode(self._reply.chunk(index, held, result)))
        return result

    async def _ping(self, send: Send) -> None:
        while True:
            silent = asyncio.get_running_loop().time() - self._written
            if silent >= PING_SECONDS:
                await self._write(send, PING)
            await asyncio.sleep(PING_SECONDS - silent if silent < PING_SECONDS else PING_SECONDS)

    async def _write(self, send: Send, data: bytes) -> None:
        self._written = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        await asyncio.sleep(0)  # where tokens are there already, others have their turn


async def while_there(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Return or raise as `work` does; raise ClientGone, and cancel it, where the client disconnects first."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with _together([work, disconnected()]) as (task, gone):
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        result: Result = task.result()
        return result


@asynccontextmanager
async def _together(
    works: Sequence[Coroutine[Any, Any, Any]],
) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Run as tasks, none of which outlives the block."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _limit(options: GenerationOptions, request: Generating, prompt: int, session: Session) -> int:
    """Return the request's limit of tokens, or the most that fits, up to the session's default."""
    read = 1 if session.manifest.encoder_decoder else prompt
    room = session.capacity - read + 1  # the newest token is never read back
    if request.limit is None:
        return min(options.max_new_tokens, room)
    if request.limit > room:
        raise PromptLengthError(
            f"the prompt has {prompt} tokens and max_tokens is {request.limit}, but {room} tokens fit after it in the "
            f"{session.capacity} positions of a slot; shorten one of them"
        )
    return request.limit


def _size(prompt: str | list[Any]) -> int:
    """Return the characters of a prompt, of which a chat's template may make many more."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(
        MARKUP + len(part["role"]) + len(part["content"]) if isinstance(part, dict) else 1
        for part in prompt
    )
