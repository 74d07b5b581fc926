"""Choices of one request: queues them in the session, and streams their chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np

from freeexport.serving.answers import AnswerReader
from freeexport.serving.errors import ApiError, draining, invalid
from freeexport.serving.events import EventStream, together
from freeexport.serving.grammar_trial import GrammarTrial
from freeexport.serving.protocol import ChatRequest, CompletionRequest
from freeexport.serving.replies import Reply
from freeexport.serving.service import RequestLog
from freeexport.serving.tools import CallForm, constraint, form_of, tools_as_text
from runtime import (
    AsyncStream,
    GenerationOptions,
    GenerationResult,
    OptionError,
    PromptLengthError,
    Session,
    Token,
)
from runtime.options.generation_options import Mode
from runtime.text.prompt import encode_expected

Generating = ChatRequest | CompletionRequest

# Prompts of up to this many characters are encoded on the event loop, where a thread would take
# longer.
SHORT = 2000
# Approximate number of characters that a chat template adds to a message.
MARKUP = 30


@dataclass(frozen=True)
class Choices:
    """Running choices of one request.

    Attributes:
        streams: One stream per choice, ordered by prompt.
        prompts: Number of tokens of each prompt.
        deadline: HTTP status if the deadline passes, and the deadline in seconds.
        ended: Called with the answer of a chat when it is complete or cut off by its limit.
            Default: nothing is called.
    """

    streams: list[AsyncStream]
    prompts: list[int]
    deadline: tuple[int, float] | None
    ended: Callable[[GenerationResult], None] | None = None

    async def results(self) -> list[GenerationResult]:
        """Decode all choices until they end or the deadline passes.

        Raises:
            ApiError: See `checked`.
        """
        async with together([stream.drain() for stream in self.streams]) as tasks:
            return [self.checked(await task) for task in tasks]

    def checked(self, result: GenerationResult) -> GenerationResult:
        """Return a result if it can be sent.

        Raises:
            ApiError: If the session was closed, or the deadline passed before any choice had a
                token.
        """
        if result.finish_reason == "deadline" and self.deadline is not None:
            if not any(stream.result.token_ids for stream in self.streams):
                status, seconds = self.deadline
                limit = "the request's deadline" if status == 408 else "the server's limit"
                expired = f"{limit} of {seconds:g} s passed before the first token"
                raise ApiError(
                    status,
                    f"{expired}; retry later or raise the limit",
                    "deadline_exceeded",
                    again=False,
                )
            return result
        if result.interrupted:
            raise draining()  # the session was closed
        return result

    async def end(self) -> list[GenerationResult]:
        """Release the slots and return the results so far."""
        for stream in self.streams:
            await stream.aclose()
        results = [stream.result for stream in self.streams]
        if self.ended is not None and results and not results[0].interrupted:
            self.ended(results[0])
        return results


async def begin(
    session: Session,
    trial: GrammarTrial,
    request: Generating,
    mode: Mode | None,
    deadline: float | None,
    answers: AnswerReader,
) -> Choices:
    """Encode the prompts and queue all choices of a request.

    If one choice cannot be queued, none is.

    Args:
        session: Session of the requested model.
        trial: Checks constraints for the same bundle.
        request: A chat or a completion.
        mode: Mode if the request has none. Default: the session's default.
        deadline: The server's time limit in seconds. Default: no limit.
        answers: Reads the answers of chats.

    Raises:
        ApiError: If the request has too many choices or an invalid constraint.
        PromptError: If a prompt cannot be encoded or is too long.
        OptionError: If an option is invalid.
        QueueFullError: If the queue has no space for all choices.
    """
    options = request.options(mode, deadline)
    prompts = request.prompts
    form = form_of(session.tokenizer)
    count = len(prompts) * request.n
    most = session.options.slots + session.options.queue
    if count > most:
        wrong = f"n is {request.n}" + (f" for {len(prompts)} prompts" if len(prompts) > 1 else "")
        raise invalid("n", f"{wrong}; this server takes {most} choices at once; request fewer")

    def encode() -> tuple[list[np.ndarray], GenerationOptions]:
        given = options
        encoded = encoded_prompts(
            session, request, src_lang=given.src_lang, tgt_lang=given.tgt_lang
        )
        languages = session.manifest.languages
        # The encoded prompt may already name the target language.
        in_prompt = languages is not None and languages.target == "prompt"
        given = replace(given, src_lang=None, tgt_lang=None if in_prompt else given.tgt_lang)
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
        options = await _constrained(options, request, form, session=session, trial=trial)
    limits = [_limit(options, request, len(ids), session) for ids in encoded]
    ends = (
        None
        if options.deadline is None
        else (408 if options.deadline == request.free.deadline else 504, options.deadline)
    )
    ended = None
    if isinstance(request, ChatRequest) and request.n == 1:
        ended = partial(answers.add, session, encoded[0], options)
    generation = Choices([], [len(ids) for ids in encoded], ends, ended)
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


def encoded_prompts(
    session: Session, request: Generating, **languages: str | None
) -> list[np.ndarray]:
    """Return the token ids, int64 [n], of each prompt of a request.

    Args:
        session: Session of the requested model.
        request: A chat or a completion.
        **languages: See `Session.encode`.

    Raises:
        PromptError: If a prompt cannot be encoded or is too long.
        OptionError: If a language is invalid.
    """
    prompts = request.prompts
    tools = [msgspec.to_builtins(tool) for tool in request.offered]
    form = form_of(session.tokenizer)
    if isinstance(request, ChatRequest) and not form.shown:
        prompts = [tools_as_text(messages, tools, form) for messages in prompts]
        tools = []
    return [session.encode(prompt, tools=tools, **languages) for prompt in prompts]


async def _constrained(
    options: GenerationOptions,
    request: Generating,
    form: CallForm,
    session: Session,
    trial: GrammarTrial,
) -> GenerationOptions:
    """Return options with the constraint of a request.

    Raises:
        ApiError: If the constraint is invalid or cannot be compiled in time.
    """
    field, constrained = await asyncio.to_thread(constraint, request, form)
    try:
        options = await asyncio.to_thread(replace, options, **constrained)
        if options.constraint is not None:
            await trial.check(*options.constraint)
            await asyncio.to_thread(session.prepare, options)
    except OptionError as error:
        raise invalid(field, field + str(error).removeprefix(next(iter(constrained)))) from None
    return options


class ChoiceStream(EventStream):
    """Streams the chunks of all choices."""

    def __init__(
        self, generation: Choices, reply: Reply, request: Generating, record: RequestLog
    ) -> None:
        super().__init__(reply.id, record)
        self._generation = generation
        self._reply = reply
        self._request = request

    async def _events(self) -> None:
        choices = [self._choice(*each) for each in enumerate(self._generation.streams)]
        async with together(choices) as tasks:
            results = list(await asyncio.gather(*tasks))
        if self._request.include_usage:
            await self._write(
                self._reply.encode(self._reply.usage(results, self._generation.prompts))
            )
        await self._write(self._reply.end)

    async def _choice(self, index: int, stream: AsyncStream) -> GenerationResult:
        opening = self._reply.opening(index)
        if opening is not None:
            await self._write(self._reply.encode(opening))
        held: list[Token] = []  # no text yet: a character may take several tokens
        async with stream:
            async for token in stream:
                held.append(token)
                chunk = self._reply.chunk(index, held) if token.text else None
                if chunk is not None:
                    await self._write(self._reply.encode(chunk))
                    held.clear()
        result = self._generation.checked(stream.result)
        await self._write(self._reply.encode(self._reply.chunk(index, held, result)))
        return result

    def _failed(self, error: ApiError) -> bytes:
        return self._reply.failed(error) + self._reply.end

    async def _end(self) -> list[GenerationResult]:
        return await self._generation.end()


def _limit(options: GenerationOptions, request: Generating, prompt: int, session: Session) -> int:
    """Return the request's token limit. Default: the session's, reduced to what fits in a slot.

    Raises:
        PromptLengthError: If the request's limit does not fit in a slot.
    """
    read = 1 if session.manifest.encoder_decoder else prompt
    room = session.capacity - read + 1  # the last token is never an input
    if request.limit is None:
        return min(options.max_new_tokens, room)
    if request.limit > room:
        raise PromptLengthError(
            f"the prompt has {prompt} tokens and max_tokens is {request.limit}, but {room} tokens "
            f"fit after it in the {session.capacity} positions of a slot; "
            "shorten the prompt or lower max_tokens"
        )
    return request.limit


def _size(prompt: str | list[Any]) -> int:
    """Estimate the characters of a prompt. A token ID counts as one.

    The chat template of some models adds many more.
    """
    if isinstance(prompt, str):
        return len(prompt)
    return sum(
        MARKUP + len(part["role"]) + len(part["content"]) if isinstance(part, dict) else 1
        for part in prompt
    )
