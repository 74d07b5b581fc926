"""Scheduler of a session: decodes many requests with the same engines, in one worker thread.

Each turn admits sequences to free slots and runs the engine calls that sequences wait for, several
as one. Callers wait for the tokens that it delivers.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.calls import RUN_INLINE, SlotCall
from runtime.decoding.decoder import Decoder
from runtime.engines.kv_cache import CrossCache
from runtime.engines.runner import Event, Runner
from runtime.errors import EngineError, OptionError, QueueFullError
from runtime.requests.batching import BatchedCall, BatchPolicy
from runtime.requests.sequence import Sequence

# Seconds between checks for a slot that is to be borrowed.
WAIT = 0.005
REENTRY = "a callback called its own session, which waits for the callback; open another session"
CLOSED = "the session is closed; open a new one"


class Scheduler:
    """Schedules requests. Thread-safe within the process that created it.

    A forked process has no worker, so calls raise OptionError there. The worker runs only while
    there are requests. `_lock` guards the state that other threads change, too.

    Args:
        decoders: One per slot.
        batches: Batched calls of the engines that support them.
        cross: Cross-attention of all slots.
        queue: Maximum number of sequences that wait for a slot.
        costs: Measured costs of engine calls.
        packed: Padding and idle rows of deep passes cost nothing.
    """

    def __init__(
        self,
        decoders: List[Decoder],
        batches: Mapping[Runner, BatchedCall],
        cross: CrossCache,
        queue: int,
        costs: CallCosts | None = None,
        packed: bool = False,
    ) -> None:
        self._free = list(decoders)
        self._cross = cross
        self._queue = queue
        self._calls = BatchPolicy(
            batches,
            decoders[0].runners[0],
            costs or CallCosts(),
            packed=packed,
            exit=decoders[0].exit,
        )
        self._rows: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._borrowed = self._turns = 0
        self._lock = threading.Lock()
        self._closed = self._closing = False
        self._pid = os.getpid()
        self._thread: ThreadPoolExecutor | None = None
        self._idle = threading.Event()
        self._idle.set()
        _LIVE.add(self)

    # Called from any thread

    @property
    def forked(self) -> bool:
        """True if this process is a fork of the one that opened the session."""
        return os.getpid() != self._pid

    @property
    def inside(self) -> bool:
        """True within a callback of a request, or a task or thread that carries its context."""
        return any(call.running and call.owner is self for call in _CALLS.get())

    @property
    def empty(self) -> bool:
        """True if no sequence runs or waits."""
        return not self._rows and not self._waiting

    @property
    def running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return len(self._waiting) - sum(each.abandoned for each in tuple(self._waiting))

    def check(self) -> None:
        """Check that requests are possible here.

        Raises:
            OptionError: In a forked process, or within a callback of a request.
        """
        if self.forked:
            raise OptionError(
                f"the session was opened before process {os.getpid()} was forked; open one in "
                "this process, or start it with multiprocessing's 'spawn'"
            )
        if self.inside:
            raise OptionError(REENTRY)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            OptionError: If the scheduler is closed, in a forked process, or within a callback.
            QueueFullError: If the queue is full.
        """
        self.check()
        observer = sequence.observer
        observer.tell("queued", sequence.number)  # before the worker can start it
        try:
            with self._lock:
                self._let_in(sequence)
        except (OptionError, QueueFullError) as error:
            observer.tell("ended", sequence.number, error=error)
            raise

    def _let_in(self, sequence: Sequence) -> None:
        if self._closed:
            raise OptionError(CLOSED)
        waiting = sum(not (each.abandoned or each.follows) for each in self._waiting)
        # Slots of abandoned sequences become free at the next turn.
        free = len(self._free) + sum(each.abandoned for each in tuple(self._rows))
        if waiting >= self._queue + free:
            wait = "request waits" if self._queue == 1 else "requests wait"
            raise QueueFullError(
                f"{self._queue} {wait} for a slot already; retry later, or open the session "
                "with a larger queue or more slots"
            )
        if self._idle.is_set():
            self._start()
            self._idle.clear()
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        if self._closing:
            sequence.response.cancelled = True
        self._waiting.append(sequence)

    def _start(self) -> None:
        """Start the worker, which first takes the lock."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
        try:
            self._thread.submit(self._work)
        except RuntimeError:
            raise OptionError("the interpreter is shutting down; submit requests earlier") from None

    def close(self, drain: bool = False) -> None:
        """Refuse new sequences and end all others after their next token.

        Args:
            drain: First wait until all have ended.
        """
        self._closed = True
        if self.forked:
            return
        if drain:
            self.drain()
        self.end_soon()
        with self._lock:
            thread = self._thread
            self._thread = None
            self._unbind()
        if thread is not None:
            thread.shutdown(wait=False)

    def _unbind(self) -> None:
        """Drop the calls of a closed scheduler, whose reference cycles would keep engines alive."""
        if self._closed and self.empty:
            for decoder in self._free:
                decoder.forget_calls()

    def drain(self) -> None:
        """Wait until no sequence runs or waits.

        Raises:
            OptionError: Within a callback of a request.
        """
        self.check()
        self._idle.wait()

    def end_soon(self) -> None:
        """End all sequences after their next token."""
        with self._lock:
            self._closing = True
            for sequence in (*self._rows, *self._waiting):
                sequence.response.cancelled = True

    @contextmanager
    def borrowed(self) -> Iterator[Decoder]:
        """Context manager: yields a free slot for direct use, once no sequence runs.

        While any slot is borrowed, calls are not batched.
        """
        self.check()
        decoder = None
        while decoder is None:
            with self._lock:
                if self._idle.is_set() and self._free:
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
                self._unbind()

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a callback so that this session refuses requests from it while it runs."""

        def call(*arguments: Any) -> Any:
            here = _Callback(self)
            token = _CALLS.set((*_CALLS.get(), here))
            try:
                return callback(*arguments)
            finally:
                here.running = False
                _CALLS.reset(token)

        return call

    # Called from the worker

    def _work(self) -> None:
        """Take turns until no sequence runs or waits."""
        while True:
            with self._lock:
                if self.empty:
                    self._unbind()
                    self._idle.set()
                    return
            try:
                self.turn()
            except BaseException as error:  # not of a request, whose errors end only the request
                for sequence in tuple(self._rows):
                    self._end(
                        sequence,
                        EngineError(f"{type(error).__name__} in the worker: {error}; retry"),
                    )

    def turn(self) -> None:
        """Admit sequences and advance the running ones.

        A single sequence is advanced until another one arrives.
        """
        now = time.monotonic()
        gone = [each for each in self._rows if each.abandoned or each.response.until <= now]
        for sequence in gone:
            self._end(sequence)
        moved = (bool(self._waiting) and self._admit()) or bool(gone)
        waits = self._rows[0].waits if len(self._rows) == 1 else None
        if waits is RUN_INLINE or isinstance(waits, SlotCall):
            decoder = self._rows[0].decoder
            decoder.only_sequence = True
            try:
                self._run_only(self._rows[0])
            finally:
                decoder.only_sequence = False
            return
        self._turns += 1
        moved = self._resume() or moved
        if self._run_calls() or moved:
            return
        events = [each.waits for each in self._rows if isinstance(each.waits, Event)]
        if events:
            with suppress(Exception):  # raised again in the sequence that waits for it
                events[0].wait()
        else:
            time.sleep(WAIT)

    def _admit(self) -> bool:
        """Give free slots to waiting sequences, and end those that should no longer wait.

        Both are followed by the next request of their list of prompts. Returns True if anything
        changed.
        """
        changed = False
        while True:
            started = list[Sequence]()
            gone = list[Sequence]()
            left = deque[Sequence]()
            with self._lock:
                for each in self._waiting:
                    if self._free and not (each.abandoned or self._closing):
                        each.enter(self._free.pop(0))
                        started.append(each)
                    elif (
                        each.abandoned
                        or self._closing
                        or (each.response.interruptible and each.response.interruption())
                    ):
                        gone.append(each)
                    else:
                        left.append(each)
                self._waiting = left
                self._rows += started
            made = [each.follow() for each in (*started, *gone) if each.follow is not None]
            following = [each for each in made if each is not None]
            with self._lock:
                for sequence in following:
                    self._enqueue(sequence)
            for sequence in gone:
                sequence.response.finish()
                sequence.end()
            changed = changed or bool(started or gone)
            if not following:
                return changed

    def _run_only(self, sequence: Sequence) -> None:
        """Advance the only sequence until something else needs attention.

        Most turns run here. Their code and data have left the processor's cache during the engine
        call, so every function and array counts.
        """
        waiting = self._waiting
        until = sequence.response.until
        may_be_late = until != math.inf
        call = sequence.waits
        while True:
            self._turns += 1
            error: Exception | None = None
            if call is not RUN_INLINE:
                if not isinstance(call, SlotCall):
                    return
                try:
                    call.run()
                except Exception as failure:
                    error = failure
            try:
                going = sequence.advance(error)
            except BaseException as failure:
                self._end(sequence, failure)
                return
            if not going:
                self._end(sequence)
                return
            if waiting or sequence.abandoned or (may_be_late and until <= time.monotonic()):
                return
            call = sequence.waits

    def _resume(self) -> bool:
        """Advance the sequences whose event is done, and one of those that wait for a turn alone.

        The latter reads the next piece of a prompt, which must not delay the others for long.
        Returns True if there was any.
        """
        happened = [
            each for each in self._rows if isinstance(each.waits, Event) and each.waits.done()
        ]
        for sequence in happened:
            self._advance(sequence)
        in_line = [each for each in self._rows if each.waits is None]
        for sequence in in_line[:1]:
            # Move it to the end of the line.
            self._rows.remove(sequence)
            self._rows.append(sequence)
            if sequence.started and sequence.response.interruption():
                self._end(sequence)
            else:
                sequence.decoder.others = len(self._rows) > 1
                self._advance(sequence)
        return bool(happened or in_line)

    def _run_calls(self) -> bool:
        """Run the calls of one engine that the policy chooses. Returns False if there are none."""
        chosen = self._calls.choose(self._rows, self._turns)
        if not chosen:
            return False
        if len(chosen) > 1 and not self._borrowed:
            self._close_gaps()
        waiting = {id(each.waits): each for each in chosen}
        calls = [each.waits for each in chosen if isinstance(each.waits, SlotCall)]
        for call, error in self._calls.run(calls, together=not self._borrowed):
            self._advance(waiting[id(call)], error)
        return True

    def _advance(self, sequence: Sequence, error: Exception | None = None) -> None:
        try:
            going = sequence.advance(error)
        except BaseException as failure:  # raised by the engine or by the caller's code
            self._end(sequence, failure)
            return
        sequence.since = self._turns
        if not going:
            self._end(sequence)

    def _end(self, sequence: Sequence, error: BaseException | None = None) -> None:
        decoder = sequence.decoder
        self._rows.remove(sequence)
        with suppress(Exception):
            sequence.stop()
        self._cross.forget(decoder.slot)
        decoder.reset()
        with self._lock:
            self._give_back(decoder)
        sequence.end(error)

    def _give_back(self, decoder: Decoder) -> None:
        self._free.append(decoder)
        self._free.sort(key=lambda free: free.slot)

    def _close_gaps(self) -> None:
        """Move sequences from the highest slots to free lower ones.

        Idle rows of a call cost as much as others.
        """
        while self._free:
            last = max(self._rows, key=lambda each: each.decoder.slot).decoder
            if last.slot < self._free[0].slot or last.in_background:
                return
            self._cross.forget(last.slot)
            last.move(self._free[0])
            self._free.sort(key=lambda free: free.slot)


class _Callback:
    """A running callback of a request."""

    def __init__(self, owner: Scheduler) -> None:
        self.owner = owner
        self.running = True


# Callbacks of this context and of those it was copied from. Tasks of an event loop and
# asyncio.to_thread start with a copy.
_CALLS: ContextVar[tuple[_Callback, ...]] = ContextVar("freeexport callbacks", default=())
_LIVE: WeakSet[Scheduler] = WeakSet()


def _at_exit() -> None:
    for scheduler in tuple(_LIVE):
        if not scheduler.forked:
            scheduler.end_soon()


# The interpreter waits for its threads before it runs other exit handlers, so requests that nobody
# reads must end here.
if hasattr(threading, "_register_atexit"):
    threading._register_atexit(_at_exit)
