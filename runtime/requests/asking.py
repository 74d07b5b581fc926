"""The ways to ask a session for text: whole, as a stream, for asyncio, one prompt or many, several results of one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Unpack, overload

import numpy as np

from runtime.errors import OptionError
from runtime.keywords import GenerationKeywords, merged
from runtime.options import GenerationOptions, SessionOptions
from runtime.requests.prompt_list import PromptList, is_list_of_prompts
from runtime.requests.request import Request, check_count
from runtime.requests.request_builder import RequestBuilder
from runtime.requests.stream import AsyncStream, Stream
from runtime.result import GenerationResult
from runtime.scheduling.scheduler import Scheduler
from runtime.text.prompt import Prompt


class Asking:
    """What of `Session` makes requests; the session opens and closes what they run on."""

    options: SessionOptions
    _builder: RequestBuilder
    _scheduler: Scheduler
    _closed: bool

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Prompt],
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Any,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any:
        """Decode one prompt to its end, or each of a list of prompts. `options` are GenerationOptions; keyword
        arguments are its fields, and take precedence.

        A prompt is text, a list of token ids, or a list of {"role", "content"} for the bundle's chat template. `cancel`
        ends it after the next token. A list of prompts gives a list of results in the same order. Raises PromptError,
        OptionError, QueueFullError; for a list BatchError, after all have ended, where any failed.
        """
        if not is_list_of_prompts(prompt):
            return self.stream(prompt, options, cancel=cancel, **keywords).drain()
        prompts = self._prompts(prompt, cancel, merged(GenerationOptions, options, keywords))
        prompts.begin()
        try:
            prompts.wait()
        except BaseException:
            prompts.abandon()
            raise
        return prompts.results()

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Stream:
        """Decode one prompt token by token; arguments as for `generate`, and raises what that does, at the call. The
        request enters the queue at once, and is decoded as its tokens are read. Closing the stream ends it."""
        return Stream(self._scheduler, self._request(prompt, cancel, merged(GenerationOptions, options, keywords)))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> GenerationResult: ...

    @overload
    async def agenerate(
        self,
        prompt: Sequence[Prompt],
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]: ...

    async def agenerate(
        self,
        prompt: Any,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> Any:
        """`generate` for asyncio: a result, or a list of them. Cancelling the task ends the request."""
        if not is_list_of_prompts(prompt):
            return await self.astream(prompt, options, cancel=cancel, **keywords).drain()
        from runtime.requests.asyncio_bridge import all_of

        prompts = self._prompts(prompt, cancel, merged(GenerationOptions, options, keywords))
        return await all_of(self._scheduler, prompts)

    def astream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> AsyncStream:
        """`stream` for asyncio: raises QueueFullError at the call, before a server begins to answer. Leaving the loop
        ends the request."""
        return AsyncStream(self._scheduler, self._request(prompt, cancel, merged(GenerationOptions, options, keywords)))

    def encode(self, prompt: Prompt) -> np.ndarray:
        """The token ids, int64 [n], that `generate` reads of a prompt: it takes them as the prompt, too. Raises
        PromptError."""
        return self._builder.encode(prompt)

    def generate_best(
        self,
        prompt: Prompt,
        num_return_sequences: int,
        options: GenerationOptions | None = None,
        *,
        cancel: threading.Event | None = None,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]:
        """Several continuations of one prompt, which is read once, best first: samples by log-probability per token, or
        with `num_beams` the best beams by their scores. At most MOST_SEQUENCES (runtime/requests/request.py).

        Other arguments as for `generate`. Cancelled, or at its deadline, it returns those that are finished. Raises as
        `generate` does, and CapacityError for beams whose caches would not fit the memory.
        """
        chosen = merged(GenerationOptions, options, keywords)
        check_count(num_return_sequences, chosen)
        request = self._request(prompt, cancel, chosen, num_return_sequences)
        Stream(self._scheduler, request).drain()
        return request.best()

    def _request(
        self, prompt: Prompt, cancel: threading.Event | None, options: GenerationOptions, count: int | None = None
    ) -> Request:
        self._refuse_if_closed()
        return self._builder.request(prompt, options, self._builder.caller(options, cancel), count)

    def _prompts(
        self, prompts: Sequence[Prompt], cancel: threading.Event | None, options: GenerationOptions
    ) -> PromptList:
        self._refuse_if_closed()
        caller = self._builder.caller(options, cancel)

        def ask(prompt: Prompt) -> Request:
            return self._builder.request(prompt, options, caller)

        return PromptList(self._scheduler, ask, prompts, self.options.slots, caller.until)

    def _refuse_if_closed(self) -> None:
        self._scheduler.process.check()
        if self._closed:
            raise OptionError("the session is closed; open a new one")
