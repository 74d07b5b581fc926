"""Requests at a session, as many in flight at any time as asked for: as one ends, the next joins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from runtime import GenerationOptions, Session
from runtime.scheduling.task import Task


@dataclass
class Asked:
    """A request of the loop, and what came: seconds by the process's clock."""

    joined: float
    times: list[float] = field(default_factory=list)
    exits: int = 0


@dataclass(frozen=True)
class Window:
    """What came between `began`, when all in flight had their first token, and `ended`, after which no more joined."""

    began: float
    ended: float
    asked: list[Asked]

    @property
    def tokens(self) -> int:
        return sum(self.began < time <= self.ended for request in self.asked for time in request.times)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.ended - self.began)

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token of a request to its next."""
        pairs = [pair for request in self.asked for pair in itertools.pairwise(request.times)]
        return [later - earlier for earlier, later in pairs if self.began < later <= self.ended]

    @property
    def latencies(self) -> list[float]:
        """Seconds of whole requests, those too that came to their end after the window."""
        return [request.times[-1] - request.joined for request in self.asked if request.times]

    @property
    def exit_rate(self) -> float:
        """Share of the tokens after the first of each request."""
        later = sum(max(0, len(request.times) - 1) for request in self.asked)
        return sum(request.exits for request in self.asked) / max(1, later)


class ClosedLoop:
    """Keeps `count` requests in flight for `seconds`, then lets them end. Request i decodes `prompts[i]` with
    `options[i]`, both from the beginning again at their end."""

    def __init__(
        self, session: Session, prompts: Sequence[list[int]], options: Sequence[dict[str, Any]], count: int
    ) -> None:
        self._session, self._count, self._open = session, count, 0
        self._next = zip(itertools.cycle(prompts), itertools.cycle(options), strict=False)
        self._asked: list[Asked] = []
        self._errors: list[BaseException] = []
        self._seconds, self._began, self._ended = 0.0, 0.0, 0.0

    def run(self, seconds: float) -> Window:
        """Raises the first error of a request, after all have ended."""
        self._seconds = seconds
        for _ in range(self._count):
            self._join()
        self._session._scheduler.wait(self, whole=True)
        if self._errors:
            raise self._errors[0]
        return Window(self._began, self._ended, self._asked)

    def ready(self, whole: bool) -> bool:
        return self._open == 0

    def _join(self) -> None:
        prompt, options = next(self._next)
        row = self._session._request(prompt, None, GenerationOptions(**options)).task()
        asked = Asked(perf_counter())
        row.told = partial(self._told, asked, row)
        self._asked.append(asked)
        self._open += 1
        self._session._scheduler.join(row, forced=True)  # from the thread that drives, too

    def _told(self, asked: Asked, row: Task) -> None:
        now = perf_counter()
        asked.times += [now] * len(row.tokens)
        asked.exits += sum(token.exited for token in row.tokens)
        row.tokens.clear()
        if not self._began and all(request.times for request in self._asked):
            self._began = now
        if self._began and not self._ended and now - self._began >= self._seconds:
            self._ended = now
        if row.ended:
            self._open -= 1
            if row.error is not None:
                self._errors.append(row.error)
            if not self._ended and not self._errors:
                self._join()
