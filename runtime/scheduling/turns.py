"""Turns: each admits tasks to free slots and runs the engine calls that they wait for, several as one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress

from runtime.decoding.decoder import Decoder
from runtime.decoding.slot_call import AT_ONCE, SlotCall, Waiting
from runtime.engines.cross_cache import CrossCache
from runtime.engines.runner import Event, Runner
from runtime.errors import interrupted
from runtime.scheduling.batched_call import BatchedCall
from runtime.scheduling.batching import BatchPolicy, BatchRules
from runtime.scheduling.leader import Awaited, Leader
from runtime.scheduling.task import Task

# Seconds between looks at whether a slot is free that someone drives by hand.
WAIT = 0.005


class Turns:
    """The tasks that have a slot, those that wait for one, and free slots. Only the thread that leads runs a turn;
    `_lock` guards what others change too: `_waiting`, `_free`, `_borrowed` and `_aside`."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        batches: Mapping[Runner, BatchedCall],
        cross: CrossCache,
        rules: BatchRules,
    ) -> None:
        self._free, self._cross = list(decoders), cross
        self._calls = BatchPolicy(batches, decoders[0].runners[0], rules)
        self._rows: list[Task] = []
        self._waiting: deque[Task] = deque()
        self._borrowed = self._turns = 0
        self._aside = 0  # tasks of which a step may take long
        self._lock = threading.Lock()
        self._wheel = Leader(self._lock)

    def _sweep(self) -> bool:
        """Drop abandoned and late tasks, admit waiting ones, drop cancelled ones. True if anything changed."""
        gone, now = False, time.monotonic()
        for task in tuple(self._rows):
            if task.abandoned or task.until <= now:
                self._end(task)
                gone = True
        return (bool(self._waiting) and self._admit()) or gone

    def _admit(self) -> bool:
        begun, left = list[Task](), list[Task]()
        with self._lock:
            while self._waiting and (self._free or self._waiting[0].abandoned):
                task = self._waiting.popleft()
                if task.abandoned:
                    left.append(task)
                    continue
                task.begin(self._free.pop(0))
                begun.append(task)
            left += [task for task in self._waiting if task.abandoned or task.caller.gone()]
            for task in left:
                if task in self._waiting:
                    self._waiting.remove(task)
            self._aside -= sum(task.aside for task in left)
        self._rows += begun
        with ExitStack() as ends:  # one that is interrupted keeps no other from its end
            for task in left:
                ends.callback(task.end)
        return bool(begun or left)

    def _turn(self, moved: bool, awaited: Awaited, whole: bool) -> None:
        if len(self._rows) == 1 and _goes_on(call := self._rows[0].waits):
            task = self._rows[0]
            decoder = task.decoder
            # An interrupt of a thread that waits for something else must not end the task.
            decoder.alone = awaited is task
            try:
                self._run_alone(task, call, awaited, whole)
            finally:
                decoder.alone = False
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
        wheel, may_be_late = self._wheel, task.until != math.inf
        while True:
            self._turns += 1
            error: Exception | None = None
            if call is not AT_ONCE:
                if not isinstance(call, SlotCall):
                    return
                try:
                    call.run()
                except Exception as failure:
                    error = failure
            try:
                going = task.advance(error)
            except BaseException as failure:
                self._fail(task, failure)
                return
            if task.told is not None or not going:
                self._advanced(task, going)
            if not going or self._waiting or wheel.followers or task.abandoned:
                return
            if may_be_late and task.until <= time.monotonic():
                return
            if not (whole and awaited is task) and awaited.ready(whole):
                return
            call = task.waits

    def _resume(self) -> bool:
        """Advance tasks whose event is done, and one of those that wait for a turn alone: the next piece of a
        prompt, which must not keep the others waiting for long. True if there was any."""
        happened = [task for task in self._rows if isinstance(task.waits, Event) and task.waits.done()]
        for task in happened:
            self._advance(task)
        in_line = [task for task in self._rows if task.waits is None]
        for task in in_line[:1]:
            # To the end of the line.
            self._rows.remove(task)
            self._rows.append(task)
            if task.begun and task.caller.gone():
                self._end(task)
            else:
                task.decoder.others = len(self._rows) > 1
                self._advance(task)
        return bool(happened or in_line)

    def _run_calls(self) -> bool:
        chosen = self._calls.choose(self._rows, self._turns)
        if not chosen:
            return False
        if len(chosen) > 1 and not self._borrowed:
            self._close_gaps()
        waiting = {id(task.waits): task for task in chosen}
        calls = [task.waits for task in chosen if isinstance(task.waits, SlotCall)]
        interrupted: BaseException | None = None
        for call, error in self._calls.run(calls, together=not self._borrowed):
            try:
                self._advance(waiting[id(call)], error)
            except BaseException as interruption:
                interrupted = interruption
        if interrupted is not None:
            raise interrupted
        return True

    def _advance(self, task: Task, error: Exception | None = None) -> None:
        try:
            going = task.advance(error)
        except BaseException as failure:
            self._fail(task, failure)
        else:
            self._advanced(task, going)

    def _advanced(self, task: Task, going: bool) -> None:
        task.since = self._turns
        if not going:
            self._end(task)
        elif task.told is not None:
            task.told()

    def _fail(self, task: Task, error: BaseException) -> None:
        """End it with its error. An interruption is raised again, unless the task runs its caller's own code, whose
        interruption that is."""
        if isinstance(error, Exception) or task.aside:
            self._end(task, error)
            return
        self._end(task, interrupted(error))
        raise error

    def _end(self, task: Task, error: BaseException | None = None) -> None:
        decoder = task.decoder
        self._rows.remove(task)
        with suppress(Exception):
            task.stop()
        self._cross.forget(decoder.slot)
        decoder.reset()
        with self._lock:
            self._give_back(decoder)
            self._aside -= task.aside
        task.end(error)

    def _give_back(self, decoder: Decoder) -> None:
        self._free.append(decoder)
        self._free.sort(key=lambda free: free.slot)

    def _close_gaps(self) -> None:
        """Move tasks from the highest slots to free ones below: idle rows of a call cost as much as others."""
        while self._free:
            last = max(self._rows, key=lambda task: task.decoder.slot).decoder
            if last.slot < self._free[0].slot or last.in_background:
                return
            self._cross.forget(last.slot)
            last.move(self._free[0])
            self._free.sort(key=lambda free: free.slot)

    def _idle(self) -> None:
        events = [task.waits for task in self._rows if isinstance(task.waits, Event)]
        if events:
            with suppress(Exception):  # it reaches the task that waits for it
                events[0].wait()
        else:
            time.sleep(WAIT)


def _goes_on(waits: Waiting) -> bool:
    """Whether a task that is alone needs nothing else to go on."""
    return waits is AT_ONCE or isinstance(waits, SlotCall)
