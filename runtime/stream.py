"""The tokens of one request for one reader."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.reply import Reply
from runtime.result import GenerationResult, Token
from runtime.row import Row
from runtime.scheduler import Scheduler


class Stream(Iterator[Token]):
    """The tokens of one request, as they become final. It takes a place among the requests at the first `next`, which
    raises QueueFullError where there is none. `result` is complete once the stream has ended."""

    def __init__(self, scheduler: Scheduler, row: Row, reply: Reply) -> None:
        self._scheduler, self._row, self._reply = scheduler, row, reply
        self._joined = False

    def __next__(self) -> Token:
        row = self._row
        self._wait(whole=False)
        if row.tokens:
            return row.tokens.popleft()
        error, row.error = row.error, None
        if error is not None:
            raise error
        raise StopIteration

    def drain(self) -> GenerationResult:
        """To the end, without reading the tokens one by one: the result."""
        self._wait(whole=True)
        self._row.tokens.clear()
        if self._row.error is not None:
            raise self._row.error
        return self.result

    def close(self) -> None:
        """End the request and give its slot back. Idempotent."""
        self._row.abandoned = True
        if not self._joined:
            self._joined = self._row.ended = True
        elif not self._scheduler.driven_here:
            self._scheduler.wait(self._row, whole=True)
        self._row.tokens.clear()
        self._row.error = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Nothing that takes a lock: this may be anywhere. Whoever drives next ends the request.
        self._row.abandoned = True

    @property
    def result(self) -> GenerationResult:
        """The tokens so far, read or not; `finish_reason` is "cancelled" unless the request came to its end."""
        return self._reply.result

    def _wait(self, whole: bool) -> None:
        if not self._joined:
            self._scheduler.join(self._row)
            self._joined = True
        try:
            if not self._row.ready(whole):
                self._scheduler.wait(self._row, whole)
        except BaseException:
            self._row.abandoned = True
            raise
