"""Many requests at the same engines: each turn runs what they wait for, several as one engine call.

There is no thread of its own. A thread that waits for a request drives all of them, one at a time; the others sleep
until what they wait for is there, or it is theirs to drive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

from runtime.batch import Batch, grouped
from runtime.cross_rows import CrossRows
from runtime.decoder import Decoder
from runtime.errors import EngineError, OptionError, QueueFullError
from runtime.lane import Event, Lane
from runtime.row import Row
from runtime.work import Work

# Turns that a deep pass waits for others to join it, unless half of the rows wait already.
PATIENCE = 4
# Seconds between looks at whether a slot is free that someone drives by hand.
WAIT = 0.005


class Awaited(Protocol):
    def ready(self, whole: bool) -> bool: ...


class _Follower(NamedTuple):
    """A thread that sleeps while another drives."""

    awaited: Awaited
    whole: bool
    awake: threading.Event


class Scheduler:
    """Thread-safe. `decoders`: one for each slot; `batches` for each lane that runs calls of several; at most `queue`
    requests wait for a slot."""

    def __init__(
        self, decoders: Sequence[Decoder], batches: Mapping[Lane, Batch], cross: CrossRows, queue: int
    ) -> None:
        self._free, self._batches, self._cross, self._queue = list(decoders), batches, cross, queue
        self._shallow = decoders[0].lanes[0]
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._borrowed = self._turns = 0
        self._closed = False
        self._lock = threading.Lock()
        self._driver: int | None = None
        self._followers: deque[_Follower] = deque()
        self._seconds, self._began = 0.0, 0.0

    # What threads ask for

    def join(self, row: Row, forced: bool = False) -> None:
        """Queue a request. Raises QueueFullError, and OptionError after `close`, unless `forced`."""
        with self._lock:
            if self._closed and not forced:
                raise OptionError("the session is closed; open a new one")
            if len(self._waiting) >= self._queue + len(self._free) and not forced:
                raise QueueFullError(
                    f"{self._queue} requests wait for a slot already; ask again later, or open the session "
                    "with a larger queue or more slots"
                )
            self._waiting.append(row)

    def wait(self, awaited: Awaited, whole: bool) -> None:
        """Until it is ready; this thread drives meanwhile where no other does."""
        while not awaited.ready(whole):
            follower = self._take_over(awaited, whole)
            if follower is not None:
                self._sleep(follower)
                continue
            try:
                while True:
                    swept = self._sweep()
                    if awaited.ready(whole):
                        break
                    self._turn(swept)
            finally:
                self._hand_over()

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
        return self._driver == threading.get_ident()

    def clock(self) -> float:
        """Seconds in which anyone drove: what a reader does between tokens does not count."""
        return self._seconds + (time.perf_counter() - self._began if self._driver is not None else 0.0)

    @contextmanager
    def borrowed(self) -> Iterator[Decoder]:
        """A free slot, to drive by hand. As long as any is lent, calls are of one sequence each."""
        decoder = None
        while decoder is None:
            with self._lock:
                if self._driver is None and self._free:
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

    # Who drives

    def _take_over(self, awaited: Awaited, whole: bool) -> _Follower | None:
        """None where this thread is the driver now."""
        with self._lock:
            if self._driver is None:
                self._driver, self._began = threading.get_ident(), time.perf_counter()
                return None
            if self.driven_here:
                raise OptionError(
                    "a callback of a request asked its own session, which waits for the callback; open another session"
                )
            follower = _Follower(awaited, whole, threading.Event())
            if awaited.ready(whole):
                follower.awake.set()
            else:
                self._followers.append(follower)
            return follower

    def _sleep(self, follower: _Follower) -> None:
        try:
            follower.awake.wait()
        except BaseException:
            with self._lock:
                if follower in self._followers:
                    self._followers.remove(follower)
                elif self._driver is None and self._followers:
                    self._followers.popleft().awake.set()  # it was this one's turn to drive
            raise

    def _hand_over(self) -> None:
        with self._lock:
            self._seconds, self._driver = self.clock(), None
            if self._followers:
                self._followers.popleft().awake.set()

    def _wake(self) -> None:
        if self._followers:
            with self._lock:
                asleep = deque[_Follower]()
                for follower in self._followers:
                    if follower.awaited.ready(follower.whole):
                        follower.awake.set()
                    else:
                        asleep.append(follower)
                self._followers = asleep

    # A turn

    def _sweep(self) -> bool:
        """Rows that were left leave, waiting ones get free slots, cancelled ones go: whether any did."""
        gone = [row for row in self._rows if row.abandoned]
        for row in gone:
            self._end(row)
        return self._admit() or bool(gone)

    def _admit(self) -> bool:
        if not self._waiting:
            return False
        begun, left = list[Row](), list[Row]()
        with self._lock:
            while self._waiting and (self._free or self._waiting[0].abandoned):
                row = self._waiting.popleft()
                if row.abandoned:
                    left.append(row)
                    continue
                row.begin(self._free.pop(0))
                begun.append(row)
            left += [row for row in self._waiting if row.abandoned or row.cancelled()]
            for row in left:
                if row in self._waiting:
                    self._waiting.remove(row)
        self._rows += begun
        for row in left:
            row.end()
        return bool(begun or left)

    def _turn(self, moved: bool) -> None:
        self._turns += 1
        moved = self._resume() or moved
        moved = self._run_calls() or moved
        if not moved:
            self._idle()
        self._wake()

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
            if row.begun and row.cancelled():
                self._end(row)
            else:
                self._advance(row)
        return bool(happened or in_line)

    def _run_calls(self) -> bool:
        chosen = self._choose()
        if not chosen:
            return False
        if len(chosen) > 1 and not self._borrowed:
            self._close_gaps()
        failed: dict[int, Exception] = {}
        by_work = {id(row.work): row for row in chosen}
        for group in self._groups([row.work for row in chosen if row.work is not None]):
            failed.update(self._run(group))
        interrupted: BaseException | None = None
        for key, row in by_work.items():
            try:
                self._advance(row, failed.get(key))
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted
        return True

    def _choose(self) -> list[Row]:
        """Rows that wait for one lane. Shallow steps first, so that deep passes collect. Those run once half of all
        wait for one, or one has waited long: a row that waits does nothing, so waiting for all would lose more than it
        saves."""
        working = [row for row in self._rows if row.work is not None]
        if len(working) == 1:
            return working
        shallow = [row for row in working if row.work is not None and row.work.lane is self._shallow]
        deep = [row for row in working if row not in shallow]
        waited = max((self._turns - row.since for row in deep), default=0)
        return deep if deep and (len(deep) >= len(shallow) or waited >= PATIENCE) else shallow

    def _groups(self, works: list[Work]) -> list[list[Work]]:
        if len(works) == 1 or self._borrowed or works[0].lane not in self._batches:
            return [[work] for work in works]
        return grouped(works)

    def _run(self, works: list[Work]) -> dict[int, Exception]:
        """Run them as one call: the errors, by the id of the work."""
        try:
            if len(works) == 1:
                works[0].run()
            else:
                self._batches[works[0].lane].run(works)
        except Exception as error:
            if len(works) == 1:
                return {id(works[0]): error}
            # Whose fault it was shows when each runs alone: nothing has been counted as written.
            return {key: failure for work in works for key, failure in self._run([work]).items()}
        return {}

    def _advance(self, row: Row, error: Exception | None = None) -> None:
        try:
            going = row.advance(error)
        except Exception as failure:
            self._end(row, failure)
            return
        except BaseException as interruption:
            self._end(row, EngineError(f"interrupted by {type(interruption).__name__} in the thread that drove it"))
            raise
        row.since = self._turns
        if going:
            row.tell()
        else:
            self._end(row)

    def _end(self, row: Row, error: Exception | None = None) -> None:
        decoder = row.decoder
        self._rows.remove(row)
        with suppress(Exception):
            row.stop()
        self._cross.forget(decoder.slot)
        decoder.reset()
        with self._lock:
            self._give_back(decoder)
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
