"""Clients of a soak test: each asks, and leaves, breaks off or fails in ways of its own, and checks what it got."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import numpy as np

from runtime import BatchError, GenerationOptions, GenerationResult, QueueFullError, Session
from runtime.decoding.decoder import Decoder, Waiting
from runtime.result import Token
from runtime.stream import Stream
from tools.soak.faults import Faults, InjectedError
from tools.soak.requests import Ask

# Seconds before a refused client asks again.
PAUSE = 0.05


class Clients:
    """`asks` of one `session`, whose calls have `faults`. `violations`: what went wrong. `done` counts requests by what
    was done with them, `refused` those that found the queue full; `tokens` that came."""

    def __init__(self, session: Session, asks: Sequence[Ask], faults: Faults) -> None:
        self.violations: list[str] = []
        self.done: Counter[str] = Counter()
        self.refused = self.tokens = 0
        self.busy_since: dict[int, float] = {}
        self._session, self._asks, self._faults = session, asks, faults
        self._lock = threading.Lock()
        # Of what a logits processor is given, that is no generated token; None: the prompt.
        self._start = 1 if session.manifest.encoder_decoder else None
        self._kinds: dict[str, Callable[[Ask, Random], str | None]] = {
            "whole": self._whole,
            "list": self._list,
            "stream": self._stream,
            "stops reading": self._stops_reading,
            "cancels": self._cancels,
            "deadline": self._deadline,
            "callback raises": self._callback_raises,
            "engine fails": self._engine_fails,
            "coroutine": self._coroutine,
            "task cancelled": self._task_cancelled,
        }

    def run(self, number: int, stop: threading.Event, seed: int) -> None:
        """Ask until `stop`."""
        source = Random(seed * 1000 + number)
        while not stop.is_set():
            kind, ask = source.choice(list(self._kinds)), source.choice(self._asks)
            self.busy_since[number] = time.monotonic()
            try:
                wrong = self._kinds[kind](ask, source)
            except QueueFullError:
                with self._lock:
                    self.refused += 1
                time.sleep(PAUSE)
                continue
            except Exception as error:
                wrong = f"{type(error).__name__}: {error} of {ask.told()}"
            finally:
                self.busy_since.pop(number, None)
            with self._lock:
                self.done[kind] += 1
                if wrong is not None:
                    self.violations.append(f"{kind}: {wrong}")

    def _whole(self, ask: Ask, source: Random) -> str | None:
        return self._checked(ask, self._session.generate(ask.prompt, **ask.options))

    def _list(self, ask: Ask, source: Random) -> str | None:
        """Several at once, one of which may not fit."""
        prompts: list[Any] = [ask.prompt] * source.randint(1, 3)
        bad = source.random() < 0.5
        if bad:
            prompts.insert(source.randrange(len(prompts) + 1), [self._session.manifest.vocab_size])
        try:
            results: list[Any] = self._session.generate(prompts, **ask.options)
        except BatchError as error:
            results = error.results
        failed = [result for result in results if not isinstance(result, GenerationResult)]
        if len(failed) != bad:
            return f"{failed} of {ask.told()}"
        found = [self._checked(ask, result) for result in results if isinstance(result, GenerationResult)]
        return next((wrong for wrong in found if wrong), None)

    def _stream(self, ask: Ask, source: Random) -> str | None:
        with self._session.stream(ask.prompt, **ask.options) as stream:
            tokens = list(stream)
        if "".join(token.text for token in tokens) != ask.alone.text:
            return f"streamed text of {ask.told()} differs"
        return ask.departs([token.id for token in tokens]) or self._checked(ask, stream.result)

    def _stops_reading(self, ask: Ask, source: Random) -> str | None:
        """Then closes the stream, forgets it, or reads on."""
        stream, ids = self._session.stream(ask.prompt, **ask.options), list[int]()
        for _ in range(source.randint(0, 5)):
            ids += [token.id for token in [next(stream, None)] if token is not None]
        time.sleep(source.random() * 0.2)
        end = source.randrange(3)
        if end == 0:
            stream.close()
        elif end == 1:
            ids += [token.id for token in stream]
            return ask.departs(ids) or self._checked(ask, stream.result)
        self._count(len(ids))
        return ask.departs(ids)

    def _cancels(self, ask: Ask, source: Random) -> str | None:
        cancel = threading.Event()
        stream, ids = self._session.stream(ask.prompt, cancel=cancel, **ask.options), list[int]()
        for _ in range(source.randint(0, 5)):
            ids += [token.id for token in [next(stream, None)] if token is not None]
        cancel.set()
        ids += [token.id for token in stream]
        return ask.departs(ids) or self._cut_short(ask, stream.result)

    def _deadline(self, ask: Ask, source: Random) -> str | None:
        deadline = source.choice((1e-6, 0.02, 0.1, 30.0))
        return self._cut_short(ask, self._session.generate(ask.prompt, deadline=deadline, **ask.options))

    def _callback_raises(self, ask: Ask, source: Random) -> str | None:
        number, start = source.randint(0, 12), self._start or len(ask.prompt)

        def raising(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            if ids.shape[-1] == start + number:
                raise ArithmeticError("a callback that raises")
            return scores

        ask_ = partial(self._session.generate, ask.prompt, logits_processor=raising, **ask.options)
        return self._fails(ask, ask_, ArithmeticError, len(ask.alone.token_ids) > number)

    def _engine_fails(self, ask: Ask, source: Random) -> str | None:
        """At a shallow step. Beams have engine calls of their own."""
        number = source.randint(0, 12)
        request = self._session._sequence(ask.prompt, GenerationOptions(**ask.options), None)
        run = request.run

        def doomed(decoder: Decoder) -> Generator[Token | Waiting, None, None]:
            self._faults.left[decoder] = number
            try:
                yield from run(decoder)
            finally:
                del self._faults.left[decoder]

        request.run = doomed  # type: ignore[method-assign]
        steps = 0 if ask.options.get("num_beams", 1) > 1 else ask.alone.stats.candidates
        return self._fails(ask, Stream(self._session._scheduler, request).drain, InjectedError, steps > number)

    def _fails(self, ask: Ask, run: Callable[[], GenerationResult], kind: type[Exception], must: bool) -> str | None:
        """Whether it fails so where it `must`, and where not, only on what was drafted or run ahead in vain."""
        try:
            result = run()
        except kind as error:
            in_vain = self._session.overlap or ask.options["mode"] in ("lossless", "rollback")
            return None if must or in_vain else f"{error} of {ask.told()}, before it should"
        return f"no {kind.__name__} of {ask.told()}" if must else self._checked(ask, result)

    def _coroutine(self, ask: Ask, source: Random) -> str | None:
        return self._checked(ask, asyncio.run(self._session.agenerate(ask.prompt, **ask.options)))

    def _task_cancelled(self, ask: Ask, source: Random) -> str | None:
        async def main() -> GenerationResult | None:
            task = asyncio.create_task(self._session.agenerate(ask.prompt, **ask.options))
            await asyncio.sleep(source.random() * 0.1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                result: GenerationResult = await task
                return result
            return None

        result = asyncio.run(main())
        return None if result is None else self._checked(ask, result)

    def _checked(self, ask: Ask, result: GenerationResult) -> str | None:
        self._count(len(result.token_ids))
        return ask.differs(result)

    def _cut_short(self, ask: Ask, result: GenerationResult) -> str | None:
        if result.complete:
            return self._checked(ask, result)
        self._count(len(result.token_ids))
        return ask.departs(result.token_ids)

    def _count(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens
