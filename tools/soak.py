"""Many clients at one session for minutes: nothing may be lost or mixed up, and nothing may grow.

    python -m tools.soak BUNDLE --seconds 300

The clients ask for random prompts, lengths, modes and samplings; they cancel, set deadlines, stop reading, raise in
callbacks, and engine calls fail. Every result must be the one that the request gives alone, or its beginning where it
was cut short. At the end nothing may be left in the session, and in a minute or more memory must not have grown:
resident memory at half time and at the end, each after the allocator gave back what was free. Ends with 1 where it is
not so.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import click
import numpy as np
import psutil

from runtime import BatchError, GenerationOptions, GenerationResult, QueueFullError, Session
from runtime.batching import BatchedCall
from runtime.decoding.calls import SlotCall, Waiting
from runtime.decoding.decoder import Decoder
from runtime.options import MODES
from runtime.result import Token
from runtime.stream import Stream

MOST_TOKENS = 40
# Seconds before a refused client asks again.
PAUSE = 0.05
# Share of the calls of several rows that fail; each row then runs alone.
FAILING_CALLS = 0.01
# Seconds after which a request that has not ended counts as lost.
LOST = 60.0
# Growth from half time to the end that is not a leak: a share, and bytes.
SHARE, ALLOWED = 0.03, 16e6
# Seconds below which memory still grows because slots, threads and calls are used for the first time.
SETTLED = 60.0


@dataclass(frozen=True)
class Ask:
    """A prompt with its options, and its result `alone`."""

    prompt: list[int]
    options: dict[str, Any]
    alone: GenerationResult

    def differs(self, result: GenerationResult) -> str | None:
        """Say how a result is not the one alone; None where it is."""
        names = ["token_ids", "text", "finish_reason"]
        # How long lossless drafts are is a matter of timing.
        names += [] if self.options["mode"] == "lossless" else ["exited"]
        wrong = [name for name in names if getattr(result, name) != getattr(self.alone, name)]
        return f"{', '.join(wrong)} of {self.told()} differ from what it gives alone" if wrong else None

    def departs(self, ids: Sequence[int]) -> str | None:
        """Say how tokens are not the beginning of those alone; None where they are."""
        return None if tuple(ids) == self.alone.token_ids[: len(ids)] else f"tokens of {self.told()} are not its own"

    def told(self) -> str:
        return f"{len(self.prompt)} ids with {self.options}"


def draw_asks(session: Session, count: int, source: Random) -> list[Ask]:
    """Draw `count` requests, each run alone."""
    vocabulary = session.manifest.vocab_size
    longest = (session.manifest.encoder_capacity or session.capacity) - MOST_TOKENS
    asks: list[Ask] = []
    for _ in range(count):
        length = min(longest, source.choice((1, 3, 8, source.randint(9, 60))))
        prompt = [source.randrange(3, vocabulary) for _ in range(length)]
        options = draw_options(session, source)
        asks.append(Ask(prompt, options, session.generate(prompt, **options)))
    return asks


def draw_options(session: Session, source: Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "mode": source.choice(MODES),
        "max_new_tokens": source.randint(1, MOST_TOKENS),
        "ignore_eos": source.random() < 0.7,
    }
    if options["mode"] != "full":
        options["threshold"] = source.choice((0.0, 0.2, 0.5, 0.9))
    if options["mode"] == "rollback":
        options["rollback_threshold"] = source.choice((1.0, 3.0))
    if source.random() < 0.3:
        options["max_pending"] = min(session.manifest.max_pending, source.choice((1, 2, 5)))
    if source.random() < 0.4:
        options |= {"temperature": source.choice((0.7, 1.2)), "seed": source.randrange(1000)}
        options |= {"top_p": 0.9} if source.random() < 0.5 else {}
    if source.random() < 0.1:
        options["repetition_penalty"] = 1.2
    if source.random() < 0.2:
        options["output_logprobs"] = True
    if source.random() < 0.1 and session.tokenizer is not None:
        options["stop"] = ("e", "\n")
    beams = session.manifest.encoder_decoder and options["mode"] == "full" and not options.keys() & {"seed", "stop"}
    return {**options, "num_beams": 3} if beams and source.random() < 0.2 else options


class InjectedError(RuntimeError):
    """A failure of an engine."""


class Faults:
    """Failures of engines. `left`: of slots whose requests are to fail, the shallow steps until then. Now and then a
    call of several rows fails too, before or after it has written."""

    def __init__(self, seed: int) -> None:
        self.left: dict[Decoder, int] = {}
        self._source = Random(seed)

    @contextmanager
    def injected(self) -> Iterator[None]:
        run_one, run_several = SlotCall.run, BatchedCall.run

        def one(call: SlotCall) -> None:
            self._check([call])
            run_one(call)
            self._count([call])

        def several(batch: BatchedCall, calls: Sequence[SlotCall]) -> None:
            chance = self._source.random()
            if chance < FAILING_CALLS / 2:
                raise InjectedError("a call that fails")
            self._check(calls)
            run_several(batch, calls)
            if chance > 1 - FAILING_CALLS / 2:
                raise InjectedError("a call that fails at its end")
            self._count(calls)

        with mock.patch.object(SlotCall, "run", one), mock.patch.object(BatchedCall, "run", several):
            yield

    def _check(self, calls: Sequence[SlotCall]) -> None:
        if any(_is_step(call) and self.left.get(call.owner) == 0 for call in calls):
            raise InjectedError("an engine that fails")

    def _count(self, calls: Sequence[SlotCall]) -> None:
        for call in calls:
            if _is_step(call) and call.owner in self.left:
                self.left[call.owner] -= 1


def _is_step(call: SlotCall) -> bool:
    return "input_ids" in call.inputs


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
        """Ask several prompts at once, one of which may not fit."""
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
        """Stop reading, then close the stream, forget it, or read on."""
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
        """Let a shallow step fail. Beams have engine calls of their own."""
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
        """Check that it fails so where it `must`, and else only on what was drafted or run ahead in vain."""
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


def resident() -> int:
    """Resident bytes, after garbage is collected and glibc has given back what is free: each thread's heap keeps the
    most that it ever held."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def left_over(session: Session) -> list[str]:
    """List what a session holds that nobody asks any more."""
    gc.collect()  # streams that were forgotten
    session._scheduler.drain()
    scheduler = session._scheduler
    runners = scheduler._free[0].runners if scheduler._free else ()
    facts = [
        (scheduler.empty, "requests are left"),
        (sorted(decoder.slot for decoder in scheduler._free) == list(range(session.options.slots)), "slots are lost"),
        (not any(runner.cache.lengths.any() for runner in runners), "the KV cache is not empty"),
        (not scheduler._cross._placed, "prompts are left for cross-attention"),
    ]
    return [what for holds, what in facts if not holds]


@dataclass
class Soaked:
    """`memory`: resident bytes at half time and at the end. `violations` is empty where all is well."""

    seconds: float
    done: Counter[str]
    refused: int
    tokens: int
    memory: list[int]
    violations: list[str] = field(default_factory=list)

    @property
    def leaked(self) -> int:
        """Bytes that are still resident at the end and were not at half time."""
        return self.memory[-1] - self.memory[0]


def soak(
    bundle: Path, seconds: float, concurrent: int, slots: int, queue: int, asks: int, seed: int, **options: Any
) -> Soaked:
    """Run the test. `options` are those of the session."""
    with Session(bundle, slots=1, **{**options, "overlap": False, "prefix_cache_mb": 0}) as session:
        drawn = draw_asks(session, asks, Random(seed))
    with Session(bundle, slots=slots, queue=queue, **options) as session:
        faults, stop = Faults(seed), threading.Event()
        clients = Clients(session, drawn, faults)
        threads = [
            threading.Thread(target=clients.run, args=(number, stop, seed), daemon=True) for number in range(concurrent)
        ]
        with faults.injected():
            began = time.monotonic()
            for thread in threads:
                thread.start()
            memory = _watch(clients, seconds)
            stop.set()
            ended = time.monotonic()
            for thread in threads:
                thread.join(max(0.0, ended + LOST - time.monotonic()))
        found = Soaked(ended - began, clients.done, clients.refused, clients.tokens, memory, clients.violations)
        alive = sum(thread.is_alive() for thread in threads)
        found.violations += [f"{alive} clients wait for ever"] if alive else left_over(session)
    if found.seconds >= SETTLED and found.leaked > SHARE * found.memory[-1] + ALLOWED:
        found.violations.append(f"memory grew by {found.leaked / 1e6:.0f} MB")
    return found


def _watch(clients: Clients, seconds: float) -> list[int]:
    """Watch until the end, early where something is wrong: memory at half time and then."""
    watched, waited = 0.0, dict[tuple[int, float], float]()
    memory = list[int]()
    while watched < seconds and not clients.violations:
        began = time.monotonic()
        time.sleep(seconds / 200)
        if not memory and watched >= seconds / 2:
            memory.append(resident())
        # Of a process that was itself kept from running, by whatever else this machine does, nobody is lost.
        step = min(time.monotonic() - began, 2 * seconds / 200 + 1)
        watched += step
        waited = {asked: waited.get(asked, 0.0) + step for asked in list(clients.busy_since.items())}
        lost = sum(already > LOST for already in waited.values())
        if lost:
            clients.violations.append(f"requests of {lost} clients have not ended after {LOST:.0f} s")
            faulthandler.dump_traceback()
    return [*memory, resident()]


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
def main(bundle: Path, **given: Any) -> None:
    found = soak(bundle, **given)
    click.echo(report(found))
    if found.violations:
        raise SystemExit(1)


def report(found: Soaked) -> str:
    total = found.done.total()
    before, after = found.memory[0] / 1e6, found.memory[-1] / 1e6
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(found.done.items()))
    lines = [
        f"{total} requests in {found.seconds:.0f} s ({kinds}), {found.refused} refused, {found.tokens} tokens",
        f"memory {before:.0f} MB at half time, {after:.0f} MB at the end: {after - before:+.1f} MB",
    ]
    kept = [f"VIOLATION {what}" for what in found.violations[:20]] or ["nothing lost, nothing mixed up, nothing left"]
    return "\n".join([*lines, *kept])


if __name__ == "__main__":
    main()
