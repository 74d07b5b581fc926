"""Many requests at the same engines: each turn runs what they wait for, several as one engine call.

A thread that waits for a request drives all of them (runtime/scheduling/leader.py). Only where a step of one may take
long, as code of its caller's or many beams, and for asyncio, a thread of the scheduler's own does: no caller's thread
is stuck in it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from runtime.decoding.decoder import Decoder
from runtime.decoding.slot_call import SlotCall, Waiting
from runtime.engines.cross_cache import CrossCache
from runtime.engines.runner import Event, Runner
from runtime.errors import OptionError, QueueFullError, interrupted
from runtime.scheduling.batched_call import BatchedCall
from runtime.scheduling.batching import BatchPolicy, BatchRules
from runtime.scheduling.callbacks import inside
from runtime.scheduling.forks import Process
from runtime.scheduling.leader import REENTRY, Awaited, Leader
from runtime.scheduling.task import Task

# Seconds between looks at whether a slot is free that someone drives by hand.
WAIT = 0.005


class Scheduler:
    """Thread-safe, in the process that made it: others get OptionError. Setting `closing` ends requests after their
    next token. `decoders`: one for each slot; `batches` for
    each lane that runs calls of several; at most `queue` requests wait for a slot."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        batches: Mapping[Runner, BatchedCall],
        cross: CrossCache,
        queue: int,
        rules: BatchRules = BatchRules(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._free, self._cross, self._queue = list(decoders), cross, queue
        self._calls = BatchPolicy(batches, decoders[0].lanes[0], rules)
        self._rows: list[Task] = []
        self._waiting: deque[Task] = deque()
        self._borrowed = self._turns = 0
        self._aside = 0  # requests of which a step may take long
        self._closed = self.closing = False
        self._lock = threading.Lock()
        self._wheel = Leader(self._lock)
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

    def wait(self, awaited: Awaited, whole: bool, until: float = math.inf) -> bool:
        """Until it is ready; this thread drives meanwhile where no other does. False where it is not ready shortly
        after `until`, by the monotonic clock, and another thread drives."""
        return self._wait(awaited, whole, until, own=False)

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

    def _wait(self, awaited: Awaited, whole: bool, until: float, own: bool) -> bool:
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

    def _attend(self, awaited: Awaited, whole: bool) -> None:
        try:
            while not awaited.ready(whole):
                try:
                    self._wait(awaited, whole, math.inf, own=True)
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

    # A turn

    def _sweep(self) -> bool:
        """Rows that were left or are late leave, waiting ones get free slots, cancelled ones go: whether any did."""
        gone, now = False, time.monotonic()
        for row in tuple(self._rows):
            if row.abandoned or row.until <= now:
                self._end(row)
                gone = True
        return (bool(self._waiting) and self._admit()) or gone

    def _admit(self) -> bool:
        begun, left = list[Task](), list[Task]()
        with self._lock:
            while self._waiting and (self._free or self._waiting[0].abandoned):
                row = self._waiting.popleft()
                if row.abandoned:
                    left.append(row)
                    continue
                row.begin(self._free.pop(0))
                begun.append(row)
            left += [row for row in self._waiting if row.abandoned or row.caller.gone()]
            for row in left:
                if row in self._waiting:
                    self._waiting.remove(row)
            self._aside -= sum(row.aside for row in left)
        self._rows += begun
        with ExitStack() as ends:  # one that is interrupted keeps no other from its end
            for row in left:
                ends.callback(row.end)
        return bool(begun or left)

    def _turn(self, moved: bool, awaited: Awaited, whole: bool) -> None:
        if len(self._rows) == 1 and isinstance(call := self._rows[0].waits, SlotCall):
            self._run_alone(self._rows[0], call, awaited, whole)
        else:
            self._turns += 1
            moved = self._resume() or moved
            moved = self._run_calls() or moved
            if not moved:
                self._idle()
        if self._wheel.followers:
            self._wheel.wake()

    def _run_alone(self, task: Task, call: Waiting, awaited: Awaited, whole: bool) -> None:
        """Turns of the only task, while nothing else is to be done. Most turns are these. What they touch has left the
        processor's cache during the engine call, so each function and array here counts."""
        while isinstance(call, SlotCall):
            self._turns += 1
            try:
                call.run()
            except Exception as error:
                self._advance(task, error)
            else:
                self._advance(task)
            call = task.waits
            late = task.until != math.inf and task.until <= time.monotonic()
            if self._waiting or self._wheel.followers or task.abandoned or late or awaited.ready(whole):
                return

    def _resume(self) -> bool:
        """Go on with rows whose event has happened, and with one that waits for its turn alone: the next piece of a
        prompt, which must not keep the others waiting for long."""
        happened = [row for row in self._rows if isinstance(row.waits, Event) and row.waits.done()]
        for row in happened:
            self._advance(row)
        in_line = [row for row in self._rows if row.waits is None]
        for row in in_line[:1]:
            # To the end of the line.
            self._rows.remove(row)
            self._rows.append(row)
            if row.begun and row.caller.gone():
                self._end(row)
            else:
                self._advance(row)
        return bool(happened or in_line)

    def _run_calls(self) -> bool:
        chosen = self._calls.choose(self._rows, self._turns)
        if not chosen:
            return False
        if len(chosen) > 1 and not self._borrowed:
            self._close_gaps()
        waiting = {id(row.waits): row for row in chosen}
        works = [row.waits for row in chosen if isinstance(row.waits, SlotCall)]
        interrupted: BaseException | None = None
        for work, error in self._calls.run(works, together=not self._borrowed):
            try:
                self._advance(waiting[id(work)], error)
            except BaseException as interruption:
                interrupted = interruption
        if interrupted is not None:
            raise interrupted
        return True

    def _advance(self, row: Task, error: Exception | None = None) -> None:
        try:
            going = row.advance(error)
        except Exception as failure:
            self._end(row, failure)
            return
        except BaseException as interruption:
            if row.aside:  # no interruption of a caller's thread: it comes from its own caller's code
                self._end(row, interruption)
                return
            self._end(row, interrupted(interruption))
            raise
        row.since = self._turns
        if not going:
            self._end(row)
        elif row.told is not None:
            row.told()

    def _end(self, row: Task, error: BaseException | None = None) -> None:
        decoder = row.decoder
        self._rows.remove(row)
        with suppress(Exception):
            row.stop()
        self._cross.forget(decoder.slot)
        decoder.reset()
        with self._lock:
            self._give_back(decoder)
            self._aside -= row.aside
        row.end(error)

    def _give_back(self, decoder: Decoder) -> None:
        self._free.append(decoder)
        self._free.sort(key=lambda free: free.slot)

    def _close_gaps(self) -> None:
        """Move rows from the highest slots to free ones below: idle rows of a call cost as much as others."""
        while self._free:
            last = max(self._rows, key=lambda row: row.decoder.slot).decoder
            if last.slot < self._free[0].slot or last.in_background:
                return
            self._cross.forget(last.slot)
            last.move(self._free[0])
            self._free.sort(key=lambda free: free.slot)

    def _idle(self) -> None:
        events = [row.waits for row in self._rows if isinstance(row.waits, Event)]
        if events:
            with suppress(Exception):  # it reaches the row that waits for it
                events[0].wait()
        else:
            time.sleep(WAIT)


class _Emptiness(NamedTuple):
    scheduler: Scheduler

    def ready(self, whole: bool) -> bool:
        return self.scheduler.empty
