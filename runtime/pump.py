"""Requests of asyncio programs: a thread that drives them, and tells their event loops what has come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from runtime.prompts import Prompts
from runtime.result import GenerationResult, Token
from runtime.row import Row
from runtime.scheduler import Awaited, Scheduler

if TYPE_CHECKING:
    import asyncio


class Pump:
    """Its thread starts with the first request, and sleeps where there is none."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pump")

    async def all_of(self, prompts: Prompts) -> list[GenerationResult]:
        """Results of prompts that have not begun; they are ended where the task is cancelled."""
        import asyncio  # 0.1 s, and few need it

        news = asyncio.Event()
        prompts.told = _teller(news)
        prompts.begin()
        self._drive(prompts)
        try:
            while not prompts.ready(whole=True):
                await news.wait()
                news.clear()
        except BaseException:
            prompts.abandon()
            raise
        return prompts.results()

    async def tokens_of(self, row: Row) -> AsyncIterator[Token]:
        """The tokens of a row that has not joined; it is ended where the reader leaves."""
        import asyncio

        news = asyncio.Event()
        row.told = _teller(news)
        self._scheduler.join(row)
        self._drive(row)
        try:
            while True:
                ended = row.ended
                while row.tokens:
                    yield row.tokens.popleft()
                if ended:
                    break
                await news.wait()
                news.clear()
        finally:
            row.abandoned = True
        if row.error is not None:
            raise row.error

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _drive(self, awaited: Awaited) -> None:
        self._thread.submit(self._wait, awaited)

    def _wait(self, awaited: Awaited) -> None:
        while True:
            try:
                return self._scheduler.wait(awaited, True)
            except Exception:
                raise
            except BaseException:
                continue  # the request that raised it has ended; the others go on


def _teller(news: asyncio.Event) -> Callable[[], None]:
    import asyncio

    loop = asyncio.get_running_loop()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(news.set)

    return tell
