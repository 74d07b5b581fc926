"""How an event loop hears from the thread that drives its requests. Imports asyncio: 0.1 s, and few need it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from runtime.requests.prompt_list import PromptList
from runtime.result import GenerationResult
from runtime.scheduling.patience import patience
from runtime.scheduling.scheduler import Scheduler


class News:
    """For one task of the event loop that runs where it is made."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def tell(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._event.set)

    async def come(self, seconds: float | None) -> bool:
        """Wait for what was told since the last time, so long at most: whether there was anything."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


async def all_of(scheduler: Scheduler, prompts: PromptList) -> list[GenerationResult]:
    """Results of prompts that have not begun; they are ended where the task is cancelled."""
    news = News()
    prompts.told = news.tell
    prompts.begin()
    scheduler.attend(prompts, True)
    try:
        while not prompts.ready(whole=True):
            if not await news.come(patience(prompts.until)):
                prompts.leave()
                break
    except BaseException:
        prompts.abandon()
        raise
    return prompts.results()
