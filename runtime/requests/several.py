"""Several continuations of one prompt, which is read once: samples drawn one after the other, or the best beams."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from runtime.decoding.decoder import Decoder
from runtime.decoding.slot_call import Waiting
from runtime.errors import OptionError
from runtime.options import GenerationOptions
from runtime.requests.request_builder import RequestBuilder
from runtime.requests.response import Response
from runtime.result import GenerationResult, Token
from runtime.text.prompt import Prompt

# Most samples of one request: they are decoded one after the other in one slot.
MOST_SEQUENCES = 1024


class Several:
    """`count` of them, in the slot of one request, its `row`; `first` is the first one's reply. It was asked for at
    `began`, by the monotonic clock. Raises OptionError, PromptError."""

    def __init__(
        self,
        intake: RequestBuilder,
        prompt: Prompt,
        count: int,
        cancel: threading.Event | None,
        options: GenerationOptions,
        began: float,
    ) -> None:
        self._intake, self._began = intake, began
        self._request, self._ending = intake.request(prompt, replace(options, output_logprobs=True), cancel, began)
        _check(count, self._request.options.samples, self._request.options.num_beams)
        self._starts = self._request.several(count)
        self.first = self._reply(0)
        self.row = intake.placed(self._run, self._request, self._ending)
        self._done: list[GenerationResult] = []

    def results(self) -> list[GenerationResult]:
        """Those that came to their end, best first."""
        done = list(self._done)
        if self._request.options.num_beams > 1:
            return done
        return sorted(done, key=lambda result: -sum(result.logprobs or ()) / len(result.token_ids))

    def _run(self, decoder: Decoder) -> Generator[Token | Waiting, None, None]:
        try:
            for number in range(len(self._starts)):
                reply = self._reply(number) if number else self.first
                yield from reply.run(decoder)
                if not reply.result.complete:
                    return
                self._done.append(reply.result)
        finally:
            self._intake.learn(self._request)

    def _reply(self, number: int) -> Response:
        return self._intake.reply(self._starts[number], self._request, self._ending, self._began)


def _check(count: Any, samples: bool, beams: int) -> None:
    most: float = MOST_SEQUENCES if samples else beams
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
        raise OptionError(
            f"num_return_sequences is {count!r}; choose 1 to {MOST_SEQUENCES} with do_sample=True or a temperature "
            "above 0, or up to num_beams"
        )
