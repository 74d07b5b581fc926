"""A list of prompts as requests of one caller: how they join, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from time import monotonic
from typing import Any, TypeGuard

from runtime.decoding.response import Response
from runtime.errors import BatchError, interrupted
from runtime.requests.request import Request
from runtime.result import GenerationResult, Stats
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.task import Task
from runtime.text.prompt import Prompt

# Makes a request of a prompt, or raises what is wrong with it.
Ask = Callable[[Prompt], Request]


def is_list_of_prompts(prompt: Any) -> TypeGuard[Sequence[Prompt]]:
    """A list of texts, of lists, or of arrays; a list of token ids or of messages is one prompt."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return not isinstance(prompt[0], (Integral, float, Mapping))


class PromptList:
    """The requests of a list. As many are in the scheduler at once as there are `slots`, so a long list neither fills
    the queue nor keeps other callers out. `until` is the deadline of all, by the monotonic clock. `told` is called, by
    whichever thread drives, when all have ended."""

    def __init__(
        self, scheduler: Scheduler, ask: Ask, prompts: Sequence[Prompt], slots: int, until: float = math.inf
    ) -> None:
        self.told: Callable[[], None] | None = None
        self.until = until
        self._scheduler, self._ask, self._slots = scheduler, ask, slots
        self._left = iter(list(enumerate(prompts)))
        self._open = len(prompts)
        self._results: list[GenerationResult | BaseException | None] = [None] * len(prompts)
        self._under_way: dict[int, tuple[Task, Response]] = {}
        self._abandoned = False

    def begin(self) -> None:
        """Raises QueueFullError where not even the first finds a place, OptionError after the session was closed."""
        for count in range(self._slots):
            self._follow(forced=count > 0)

    def ready(self, whole: bool) -> bool:
        return self._open == 0

    def wait(self) -> None:
        if self._open and not self._scheduler.wait(self, True, self.until):
            self.leave()

    def abandon(self) -> None:
        self._abandoned = True
        for row, _ in list(self._under_way.values()):
            row.abandoned = True

    def leave(self) -> None:
        """Go at the deadline without the thread that drives, which is late: what is there are the results."""
        self.abandon()
        under_way = dict(self._under_way)
        for number, result in enumerate(self._results):
            if result is None:
                self._results[number] = under_way[number][1].leave() if number in under_way else _late()

    def results(self) -> list[GenerationResult]:
        """In the order of the prompts. Raises BatchError, with all that there is, where any failed."""
        results = list(self._results)
        failed = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
        for number in failed:
            result = results[number]
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result  # a callback ended more than its request
        if failed:
            first = results[failed[0]]
            raise BatchError(
                f"{len(failed)} of {len(results)} prompts failed, the first of them prompt {failed[0]}: "
                f"{type(first).__name__}: {first}; the exception's results have the others",
                results,
            )
        return [result for result in results if isinstance(result, GenerationResult)]

    def _follow(self, forced: bool) -> None:
        """Let the next prompt join; those of which no request can be made have failed."""
        interruption: BaseException | None = None
        for number, prompt in self._left:
            if self._abandoned or monotonic() >= self.until:
                self._finish(number, _late())
                continue
            try:
                request = self._ask(prompt)
            except Exception as error:  # this prompt's alone
                self._finish(number, error)
                continue
            except BaseException as error:  # of the thread that drives, and none of the prompts that follow
                self._finish(number, interrupted(error))
                interruption = error
                continue
            row, reply = request.task(), request.responses[0]
            row.told = partial(self._told, number, row, reply)
            row.abandoned = self._abandoned
            self._under_way[number] = row, reply
            self._scheduler.join(row, forced)
            break
        if interruption is not None:
            raise interruption

    def _told(self, number: int, row: Task, reply: Response) -> None:
        row.tokens.clear()
        if row.ended:
            del self._under_way[number]
            try:
                self._follow(forced=True)
            finally:
                self._finish(number, reply.result if row.error is None else row.error)

    def _finish(self, number: int, result: GenerationResult | BaseException) -> None:
        if self._results[number] is None:
            self._results[number] = result
        self._open -= 1
        if self._open == 0 and self.told is not None:
            self.told()


def _late() -> GenerationResult:
    """Of a prompt that the deadline found waiting for those before it."""
    return GenerationResult("", (), (), (), "deadline", Stats())
