"""Many requests at the same engines: each turn runs what they wait for, several as one engine call.

A thread that waits for a request drives all of them (runtime/scheduling/leader.py). Only where a step of one may take
long, as code of its caller's or many beams, and for asyncio, a thread of the scheduler's own does: no caller's thread
is stuck in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from runtime.decoding.decoder import Decoder
from runtime.engines.cross_cache import CrossCache
from runtime.engines.runner import Runner
from runtime.errors import OptionError, QueueFullError
from runtime.scheduling.batched_call import BatchedCall
from runtime.scheduling.batching import BatchRules
from runtime.scheduling.callbacks import inside
from runtime.scheduling.forks import Process
from runtime.scheduling.leader import REENTRY, Awaited
from runtime.scheduling.task import Task
from runtime.scheduling.turns import WAIT, Turns


class Scheduler(Turns):
    """Thread-safe, in the process that made it: others get OptionError. Setting `closing` ends requests after their
    next token. `decoders`: one for each slot; `batches` for each engine that runs calls of several; at most `queue`
    requests wait for a slot."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        batches: Mapping[Runner, BatchedCall],
        cross: CrossCache,
        queue: int,
        rules: BatchRules = BatchRules(),  # noqa: B008 - it cannot be changed
    ) -> None:
        super().__init__(decoders, batches, cross, rules)
        self._queue = queue
        self._closed = self.closing = False
        self._thread: ThreadPoolExecutor | None = None
        self._attended = 0  # what that thread waits for now, and will
        self.clock = self._wheel.clock
        self.process = Process()

    # What threads ask for

    def join(self, row: Task, forced: bool = False) -> None:
        """Queue a request. Raises QueueFullError, and OptionError after `close` and within a callback, unless
        `forced`."""
        self.process.check()
        if not forced:
            self._refuse_within_callback()
        row.observe("queued", None)  # before another thread may begin it
        try:
            self._let_in(row, forced)
        except (OptionError, QueueFullError) as error:
            row.observe("refused", error)
            raise

    def _let_in(self, row: Task, forced: bool) -> None:
        with self._lock:
            if self._closed and not forced:
                raise OptionError("the session is closed; open a new one")
            if not forced and self.waiting >= self._queue + len(self._free):
                wait = "request waits" if self._queue == 1 else "requests wait"
                raise QueueFullError(
                    f"{self._queue} {wait} for a slot already; ask again later, or open the session "
                    "with a larger queue or more slots"
                )
            self._waiting.append(row)
            self._aside += row.aside

    def wait(self, awaited: Awaited, whole: bool, until: float = math.inf, own: bool = False) -> bool:
        """Until it is ready; this thread drives meanwhile where no other does: the scheduler's `own`, or another. False
        where it is not ready shortly after `until`, by the monotonic clock, and another thread drives."""
        self.process.check()
        while not awaited.ready(whole):
            drives = own or not self._aside
            follower = self._wheel.take(awaited, whole, drives, own)
            if follower is None:
                self._drive(awaited, whole, own)
                continue
            with self._wheel.followed(follower):
                if not drives and self._attended:
                    self._wheel.leave_to_own()
                elif not drives:
                    self.attend(awaited, whole)
                woken = self._wheel.sleep(follower, until)
            if not woken:
                return False
        return True

    def attend(self, awaited: Awaited, whole: bool) -> None:
        """Let the scheduler's own thread wait for it, and so drive."""
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
            self._thread.submit(self._attend, awaited, whole)
            self._attended += 1

    def release(self) -> None:
        """Let the own thread end with what it does."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    def close(self) -> None:
        """Let nobody in any more."""
        self._closed = True

    def drain(self) -> None:
        """Until nobody waits or decodes."""
        self.wait(_Emptiness(self), whole=True)

    @property
    def empty(self) -> bool:
        return not self._rows and not self._waiting

    @property
    def driven_here(self) -> bool:
        """Whether this thread drives: then it must not wait."""
        return self._wheel.here

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting) - sum(row.abandoned for row in tuple(self._waiting))

    @contextmanager
    def borrowed(self) -> Iterator[Decoder]:
        """A free slot, to drive by hand. As long as any is lent, calls are of one sequence each."""
        self.process.check()
        self._refuse_within_callback()
        decoder = None
        while decoder is None:
            with self._lock:
                if not self._wheel.taken and self._free:
                    decoder = self._free.pop(0)
                    self._borrowed += 1
            if decoder is None:
                time.sleep(WAIT)
        try:
            yield decoder
        finally:
            decoder.reset()
            with self._lock:
                self._borrowed -= 1
                self._give_back(decoder)

    def _refuse_within_callback(self) -> None:
        if self._wheel.here or inside(self):
            raise OptionError(REENTRY)

    # Who drives

    def _attend(self, awaited: Awaited, whole: bool) -> None:
        try:
            while not awaited.ready(whole):
                try:
                    self.wait(awaited, whole, own=True)
                except Exception:
                    raise
                except BaseException:
                    continue  # the request that raised it has ended; the others go on
        finally:
            with self._lock:
                self._attended -= 1
            self._wheel.relay()

    def _drive(self, awaited: Awaited, whole: bool, own: bool) -> None:
        try:
            while True:
                swept = self._sweep()
                if awaited.ready(whole) or (self._aside and not own):
                    return
                self._turn(swept, awaited, whole)
        finally:
            self._wheel.leave(own=self._aside > 0)


class _Emptiness(NamedTuple):
    scheduler: Scheduler

    def ready(self, whole: bool) -> bool:
        return self.scheduler.empty
