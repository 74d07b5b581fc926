"""Reads answers while a server is idle, so that the next turns of chats find them in the cache."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from runtime import FreeExportError, GenerationOptions, GenerationResult, Session
from runtime.engines.prefix_store import BLOCK

IDLE = 0.2  # seconds without a request before answers are read
# Tokens that are read at once. A request that arrives meanwhile waits for them, about 0.03 s with
# SmolLM2-135M.
PIECE = 64
MOST = 16  # maximum number of waiting answers. The oldest are dropped


@dataclass(frozen=True)
class UnreadAnswer:
    """An answer to read.

    Attributes:
        session: The session that reads it.
        tokens: Whole blocks of the prompt and the answer, int64 [n].
        start: Number of leading tokens that the prefix cache has.
        options: Options of the requests that read it.
    """

    session: Session
    tokens: np.ndarray
    start: int
    options: GenerationOptions


class AnswerReader:
    """Reads answers again as part of a prompt, newest first, while no request runs.

    The prefix cache keeps a generated token only where a decoding step computes the bits of a
    prompt (docs/serving.md, "Prefix caching"). Other answers would be read at the beginning of the
    next turn, when its client waits.

    Args:
        idle: Set while no request runs.
    """

    def __init__(self, idle: asyncio.Event) -> None:
        self._idle = idle
        self._waiting = deque[UnreadAnswer](maxlen=MOST)
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Number of answers that wait."""
        return len(self._waiting)

    def add(
        self,
        session: Session,
        prompt: np.ndarray,
        options: GenerationOptions,
        result: GenerationResult,
    ) -> None:
        """Read the answer to a prompt later, unless the prefix cache has it.

        Args:
            session: The session that answered.
            prompt: Tokens of the prompt, int64 [n].
            options: Options of the request.
            result: The answer.
        """
        limits = session.options
        if not limits.prefix_cache_mb or session.manifest.encoder_decoder:
            return
        if limits.slots == 1 and not limits.queue:  # a request would be refused meanwhile
            return
        end = min(len(prompt) + len(result.token_ids), session.capacity) // BLOCK * BLOCK
        start = max(len(prompt), session.cached_answer_limit) // BLOCK * BLOCK
        if end <= start:
            return
        tokens = np.concatenate([prompt, np.array(result.token_ids, np.int64)])[:end]
        read = GenerationOptions(
            max_new_tokens=0,
            mode=options.mode,
            threshold=options.threshold,
            drafts=options.drafts,
            cache_salt=options.cache_salt,
        )
        self._waiting.append(UnreadAnswer(session, tokens, start, read))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop reading."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while self._waiting:
            await self._idle.wait()
            await asyncio.sleep(IDLE)
            while self._waiting and self._idle.is_set():
                await self._read_piece(self._waiting.pop())

    async def _read_piece(self, answer: UnreadAnswer) -> None:
        """Read a piece of an answer, and queue the rest."""
        end = answer.start + PIECE
        with suppress(FreeExportError):  # the session was closed, or its queue is full
            await answer.session.astream(answer.tokens[:end], answer.options).drain()
            if end < len(answer.tokens):
                self._waiting.append(replace(answer, start=end))
