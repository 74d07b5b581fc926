"""The choices of one request: how they enter the session's queue, what comes of them, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from freeexport.serving.errors import ApiError, draining, invalid
from freeexport.serving.protocol import ChatRequest, CompletionRequest
from runtime import AsyncStream, GenerationOptions, GenerationResult, PromptLengthError, Session, Token
from runtime.options import Mode
from runtime.text.prompt import encode_expected

Result = TypeVar("Result")
# Prompts of fewer characters are encoded on the event loop, where a thread would take longer.
SHORT = 2000
# Characters that a template writes around a message, about.
MARKUP = 30


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Generation:
    """`streams`: one for each choice, those of the first prompt first. `prompts`: tokens of each."""

    streams: list[AsyncStream]
    prompts: list[int]
    deadline: tuple[int, float] | None

    async def results(self) -> list[GenerationResult]:
        """Of all choices, in order. Raises ApiError where one did not come to its end."""
        async with _together([stream.drain() for stream in self.streams]) as tasks:
            results = [await task for task in tasks]
        for result in results:
            self.check(result)
        return results

    def check(self, result: GenerationResult) -> None:
        """Raises ApiError where it was cut short."""
        if result.finish_reason == "deadline" and self.deadline is not None:
            status, seconds = self.deadline
            whose = "the request's deadline" if status == 408 else "the server's limit"
            raise ApiError(
                status,
                f"{whose} of {seconds:g} s passed after {len(result.token_ids)} tokens; ask for fewer, or later",
                "deadline_exceeded",
            )
        if not result.complete:
            raise draining()  # the session was closed: a client that left is not told

    async def end(self) -> None:
        """Give the slots back. Idempotent."""
        for stream in self.streams:
            await stream.aclose()


async def begin(
    session: Session, request: ChatRequest | CompletionRequest, mode: Mode | None, deadline: float | None
) -> Generation:
    """Encode the prompts, and let every choice enter the queue, or none. `mode` and `deadline` are the server's.

    Raises ApiError, PromptError, OptionError, QueueFullError.
    """
    options = request.options(mode, deadline)
    prompts = request.prompts
    _check_count(request, len(prompts), session)

    def encode() -> tuple[list[np.ndarray], list[int] | None]:
        expected = options.predicted_output
        limits = session.tokenizer, session.manifest.vocab_size, session.capacity
        return (
            [session.encode(prompt) for prompt in prompts],
            None if expected is None else encode_expected(expected, *limits).tolist(),
        )

    short = sum(map(_size, (*prompts, request.expected))) <= SHORT
    encoded, expected = encode() if short else await asyncio.to_thread(encode)
    options = replace(options, predicted_output=expected)
    asked = [
        (ids, number, _limited(options, request, len(ids), session)) for ids in encoded for number in range(request.n)
    ]
    streams: list[AsyncStream] = []
    try:
        for ids, number, limited in asked:
            streams.append(session.astream(ids, replace(limited, seed=_seed(request.seed, number))))
    except BaseException:
        for stream in streams:
            await stream.aclose()
        raise
    own = request.free.deadline
    ends = None if options.deadline is None else (408 if options.deadline == own else 504, options.deadline)
    return Generation(streams, [len(ids) for ids in encoded], ends)


async def each_token(stream: AsyncStream, say: Callable[[Token], Awaitable[None]]) -> GenerationResult:
    """Say every token as it comes; the result."""
    async with stream:
        async for token in stream:
            await say(token)
    return stream.result


async def while_there(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns or raises; ClientGone where the client disconnects first, which cancels it."""

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
async def _together(works: Sequence[Coroutine[Any, Any, Any]]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """As tasks, none of which outlives the block."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_count(request: ChatRequest | CompletionRequest, prompts: int, session: Session) -> None:
    count, most = prompts * request.n, session.options.slots + session.options.queue
    if count > most:
        what = f"n is {request.n}" + (f" for {prompts} prompts" if prompts > 1 else "")
        raise invalid("n", f"{what}; this server takes {most} choices at once, ask for fewer")


def _limited(
    options: GenerationOptions, request: ChatRequest | CompletionRequest, prompt: int, session: Session
) -> GenerationOptions:
    """With the request's limit of tokens, or the most that fits, up to the session's default."""
    read = 1 if session.manifest.encoder_decoder else prompt
    room = session.capacity - read + 1  # the newest token is never read back
    if request.limit is None:
        return replace(options, max_new_tokens=min(options.max_new_tokens, room))
    if request.limit > room:
        raise PromptLengthError(
            f"the prompt has {prompt} tokens and max_tokens is {request.limit}, but {room} tokens fit after it in the "
            f"{session.capacity} positions of a slot; shorten one of them"
        )
    return replace(options, max_new_tokens=request.limit)


def _seed(seed: int | None, number: int) -> int | None:
    """Each choice draws tokens of its own."""
    return None if seed is None else (seed + number) % 2**64


def _size(prompt: str | list[Any]) -> int:
    """Characters, of which a chat's template may make many more."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(MARKUP + len(part["role"]) + len(part["content"]) if isinstance(part, dict) else 1 for part in prompt)
