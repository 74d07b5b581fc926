"""Many clients at one session for minutes: nothing may be lost or mixed up, and nothing may grow.

    python -m tools.soak BUNDLE --seconds 300

The clients ask for random prompts, lengths, modes and samplings; they cancel, set deadlines, stop reading, raise in
callbacks, and engine calls fail. Every result must be the one that the request gives alone, or its beginning where it
was cut short. At the end nothing may be left in the session, and in a minute or more memory must not have grown:
resident memory at half time and at the end, each after the allocator gave back what was free. Exits with 1 otherwise.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import click
import numpy as np
import psutil

from runtime import BatchError, GenerationResult, QueueFullError, Session
from runtime.batching import BatchedCall
from runtime.decoding.decoder import SlotCall
from runtime.options import MODES

MOST_TOKENS = 40
# Seconds before a refused client asks again, and after which a request that has not ended counts as lost.
PAUSE, LOST = 0.05, 60.0
# Share of engine calls that fail.
FAILING_CALLS = 0.002
# Growth from half time to the end that is not a leak, a share and bytes, and seconds below which memory still grows
# because slots, threads and calls are used for the first time.
SHARE, ALLOWED, SETTLED = 0.03, 16e6, 60.0


class WrongError(Exception):
    """A result is not the one that the request gives alone."""


class InjectedError(RuntimeError):
    """A failure of an engine."""


@dataclass(frozen=True)
class Ask:
    """A prompt with its options, and its result `alone`."""

    prompt: list[int]
    options: dict[str, Any]
    alone: GenerationResult

    def check(self, result: GenerationResult, cut: bool = False) -> None:
        """Raise WrongError unless this is the result alone, or its beginning where it may be `cut` short and is."""
        if cut and not result.complete:
            self.check_ids(result.token_ids)
            return
        # How long lossless drafts are is a matter of timing.
        names = ("token_ids", "text", "finish_reason", "exited")[: 3 if self.options["mode"] == "lossless" else 4]
        wrong = [name for name in names if getattr(result, name) != getattr(self.alone, name)]
        if wrong:
            raise WrongError(f"{', '.join(wrong)} differ from what the request gives alone")

    def check_ids(self, ids: Sequence[int]) -> None:
        if tuple(ids) != self.alone.token_ids[: len(ids)]:
            raise WrongError("the tokens are not its own")


def draw_asks(session: Session, count: int, source: Random) -> list[Ask]:
    """Draw `count` requests, each run alone."""
    longest = (session.manifest.encoder_capacity or session.capacity) - MOST_TOKENS
    asks: list[Ask] = []
    for _ in range(count):
        length = min(longest, source.choice((1, 3, 8, source.randint(9, 60))))
        prompt = [source.randrange(3, session.manifest.vocab_size) for _ in range(length)]
        options = draw_options(session, source)
        asks.append(Ask(prompt, options, session.generate(prompt, **options)))
    return asks


def draw_options(session: Session, source: Random) -> dict[str, Any]:
    mode, chance = source.choice(MODES), source.random
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": source.randint(1, MOST_TOKENS)}
    options["ignore_eos"] = chance() < 0.7
    options |= {} if mode == "full" else {"threshold": source.choice((0.0, 0.2, 0.5, 0.9))}
    options |= {"rollback_threshold": source.choice((1.0, 3.0))} if mode == "rollback" else {}
    options |= {"max_pending": min(session.manifest.max_pending, source.choice((1, 2, 5)))} if chance() < 0.3 else {}
    if chance() < 0.4:
        options |= {"temperature": source.choice((0.7, 1.2)), "seed": source.randrange(1000)}
        options |= {"top_p": 0.9} if chance() < 0.5 else {}
    options |= {"repetition_penalty": 1.2} if chance() < 0.1 else {}
    options |= {"output_logprobs": True} if chance() < 0.2 else {}
    options |= {"stop": ("e", "\n")} if chance() < 0.1 and session.tokenizer is not None else {}
    beams = session.manifest.encoder_decoder and mode == "full" and not options.keys() & {"seed", "stop"}
    return options | ({"num_beams": 3} if beams and chance() < 0.2 else {})


@contextmanager
def failing_calls(seed: int) -> Iterator[Counter[str]]:
    """Let a share of engine calls fail, before or after they have written. Counts those of one row: the rows of a call
    of several then run alone."""
    source, failed = Random(seed), Counter[str]()

    def failing(run: Callable[..., None], rows: str) -> Callable[..., None]:
        def wrapped(*given: Any) -> None:
            chance = source.random()
            late = chance > 1 - FAILING_CALLS / 2
            failed[rows] += late or chance < FAILING_CALLS / 2
            if chance < FAILING_CALLS / 2:
                raise InjectedError("a call that fails")
            run(*given)
            if late:
                raise InjectedError("a call that fails at its end")

        return wrapped

    with (
        mock.patch.object(SlotCall, "run", failing(SlotCall.run, "one")),
        mock.patch.object(BatchedCall, "run", failing(BatchedCall.run, "several")),
    ):
        yield failed


class Clients:
    """Clients of one `session`. Each runs one of `asks` after the other, in some way.

    `violations`: what went wrong. `done` counts requests by their way, or as "refused" where the queue was full and
    "failed" where an engine failed. `memory`: resident bytes at half time and at the end.
    """

    def __init__(self, session: Session, asks: Sequence[Ask]) -> None:
        self.violations: list[str] = []
        self.done: Counter[str] = Counter()
        self.memory: list[int] = []
        self._session, self._asks, self._lock = session, asks, threading.Lock()
        self._ways: dict[str, Callable[[Ask, Random], None]] = {
            "whole": lambda ask, _: ask.check(session.generate(ask.prompt, **ask.options)),
            "coroutine": lambda ask, _: ask.check(asyncio.run(session.agenerate(ask.prompt, **ask.options))),
            "list": self._list,
            "stream": self._stream,
            "stops reading": self._stops_reading,
            "deadline": self._deadline,
            "task cancelled": self._task_cancelled,
            "callback raises": self._callback_raises,
        }

    def run(self, number: int, stop: threading.Event, seed: int) -> None:
        """Ask until `stop`."""
        source = Random(seed * 1000 + number)
        while not stop.is_set():
            way, ask = source.choice(list(self._ways)), source.choice(self._asks)
            outcome = way
            try:
                self._ways[way](ask, source)
            except QueueFullError:
                outcome = "refused"
                time.sleep(PAUSE)
            except InjectedError:
                outcome = "failed"
            except Exception as error:
                asked = f"{len(ask.prompt)} ids with {ask.options}"
                self.violations.append(f"{way}: {type(error).__name__}: {error}: {asked}")
            self._count(outcome)

    def _count(self, outcome: str, requests: int = 1) -> None:
        with self._lock:
            self.done[outcome] += requests

    def _list(self, ask: Ask, source: Random) -> None:
        """Ask several prompts at once, one of which may not fit."""
        prompts: list[Any] = [ask.prompt] * source.randint(1, 3)
        bad = source.random() < 0.5
        if bad:
            prompts.insert(source.randrange(len(prompts) + 1), [self._session.manifest.vocab_size])
        try:
            results: list[Any] = self._session.generate(prompts, **ask.options)
        except BatchError as error:
            results = error.results
        injected = sum(isinstance(result, InjectedError) for result in results)
        good = [result for result in results if isinstance(result, GenerationResult)]
        if len(good) != len(prompts) - bad - injected:
            raise WrongError(f"{results} of {len(prompts)} prompts")
        self._count("failed", injected)
        for result in good:
            ask.check(result)

    def _stream(self, ask: Ask, source: Random) -> None:
        with self._session.stream(ask.prompt, **ask.options) as stream:
            tokens = list(stream)
        if "".join(token.text for token in tokens) != ask.alone.text:
            raise WrongError("the streamed text differs")
        ask.check_ids([token.id for token in tokens])
        ask.check(stream.result)

    def _stops_reading(self, ask: Ask, source: Random) -> None:
        """Stop reading, then close the stream, forget it, cancel it, or read on."""
        cancel = threading.Event()
        stream = self._session.stream(ask.prompt, cancel=cancel, **ask.options)
        tokens = [next(stream, None) for _ in range(source.randint(0, 5))]
        time.sleep(source.random() * 0.2)
        end = source.choice(("close", "forget", "cancel", "read on"))
        if end == "close":
            stream.close()
        elif end != "forget":
            if end == "cancel":
                cancel.set()
            tokens += stream
            ask.check(stream.result, cut=end == "cancel")
        ask.check_ids([token.id for token in tokens if token is not None])

    def _deadline(self, ask: Ask, source: Random) -> None:
        deadline = source.choice((1e-6, 0.02, 0.1, 30.0))
        ask.check(self._session.generate(ask.prompt, deadline=deadline, **ask.options), cut=True)

    def _task_cancelled(self, ask: Ask, source: Random) -> None:
        async def main() -> None:
            task = asyncio.create_task(self._session.agenerate(ask.prompt, **ask.options))
            await asyncio.sleep(source.random() * 0.1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                ask.check(await task)

        asyncio.run(main())

    def _callback_raises(self, ask: Ask, source: Random) -> None:
        number = source.randint(0, 12)
        start = 1 if self._session.manifest.encoder_decoder else len(ask.prompt)  # ids before the first generated one
        must = len(ask.alone.token_ids) > number

        def raising(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            if ids.shape[-1] == start + number:
                raise ArithmeticError("a callback that raises")
            return scores

        try:
            result = self._session.generate(ask.prompt, logits_processor=raising, **ask.options)
        except ArithmeticError:
            # Or on what was drafted or run ahead in vain.
            if must or self._session.overlap or ask.options["mode"] in ("lossless", "rollback"):
                return
            raise
        if must:
            raise WrongError("no ArithmeticError")
        ask.check(result)


def resident() -> int:
    """Return resident bytes, after garbage is collected and glibc has given back what is free: each thread's heap keeps
    the most that it ever held."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def left_over(session: Session) -> list[str]:
    """List what a session holds that nobody asks any more."""
    gc.collect()  # streams that were forgotten
    scheduler = session._scheduler
    scheduler.drain()
    runners = scheduler._free[0].runners if scheduler._free else ()
    facts = [
        (scheduler.empty, "requests are left"),
        (sorted(decoder.slot for decoder in scheduler._free) == list(range(session.options.slots)), "slots are lost"),
        (not any(runner.cache.lengths.any() for runner in runners), "the KV cache is not empty"),
        (not scheduler._cross._placed, "prompts are left for cross-attention"),
    ]
    return [problem for holds, problem in facts if not holds]


def soak(
    bundle: Path, seconds: float, concurrent: int, slots: int, queue: int, asks: int, seed: int, **options: Any
) -> Clients:
    """Run the test. `options` are those of the session."""
    with Session(bundle, slots=1, **{**options, "overlap": False, "prefix_cache_mb": 0}) as session:
        drawn = draw_asks(session, asks, Random(seed))
    with Session(bundle, slots=slots, queue=queue, **options) as session:
        clients, stop = Clients(session, drawn), threading.Event()
        threads = [threading.Thread(target=clients.run, args=(n, stop, seed), daemon=True) for n in range(concurrent)]
        with failing_calls(seed) as failed:
            for thread in threads:
                thread.start()
            began = time.monotonic()
            while (passed := time.monotonic() - began) < seconds and not clients.violations:
                if not clients.memory and passed >= seconds / 2:
                    clients.memory.append(resident())
                time.sleep(seconds / 200)
            clients.memory.append(resident())
            stop.set()
            ended = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, ended + LOST - time.monotonic()))
        if clients.done["failed"] > failed["one"]:
            clients.violations.append(f"{clients.done['failed']} requests failed, and {failed['one']} calls of one row")
        if alive := sum(thread.is_alive() for thread in threads):
            clients.violations.append(f"{alive} clients still wait after {LOST:.0f} s")
            faulthandler.dump_traceback()
        else:
            clients.violations += left_over(session)
    leaked = clients.memory[-1] - clients.memory[0]
    if seconds >= SETTLED and leaked > SHARE * clients.memory[-1] + ALLOWED:
        clients.violations.append(f"memory grew by {leaked / 1e6:.0f} MB")
    return clients


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=300.0)
@click.option("--concurrent", type=click.IntRange(1), default=64, help="Clients, a thread each.")
@click.option("--slots", type=click.IntRange(1), default=8)
@click.option("--queue", type=click.IntRange(0), default=48, help="Too few, so some are refused.")
@click.option("--prefix-cache-mb", type=click.IntRange(0), default=0, help="Reuse prompts.")
@click.option("--asks", type=click.IntRange(1), default=150, help="Different requests.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of each engine.")
@click.option("--seed", type=int, default=0)
def main(bundle: Path, seconds: float, **given: Any) -> None:
    found = soak(bundle, seconds, **given)
    before, after = found.memory[0] / 1e6, found.memory[-1] / 1e6
    ways = ", ".join(f"{way} {count}" for way, count in sorted(found.done.items()))
    click.echo(f"{found.done.total()} requests in {seconds:.0f} s: {ways}")
    click.echo(f"memory {before:.0f} MB at half time, {after:.0f} MB at the end: {after - before:+.1f} MB")
    for problem in found.violations[:20]:
        click.echo(f"VIOLATION {problem}")
    if found.violations:
        raise SystemExit(1)
    click.echo("nothing lost, nothing mixed up, nothing left")


if __name__ == "__main__":
    main()
