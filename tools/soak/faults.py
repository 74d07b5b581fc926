"""Engine failures for a soak test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from unittest import mock

from runtime.decoding.slot import Slot
from runtime.decoding.slot_call import SlotCall
from runtime.scheduling.batched_call import BatchedCall

# Share of the calls of several rows that fail; each row then runs alone.
FAILING_CALLS = 0.01


class InjectedError(RuntimeError):
    """A failure of an engine."""


class Faults:
    """Failures of engines. `left`: of slots whose requests are to fail, the shallow steps until then. Now and then a
    call of several rows fails too, before or after it has written."""

    def __init__(self, seed: int) -> None:
        self.left: dict[Slot, int] = {}
        self._source = Random(seed)

    @contextmanager
    def injected(self) -> Iterator[None]:
        run_one, run_several = SlotCall.run, BatchedCall.run

        def one(work: SlotCall) -> None:
            self._check([work])
            run_one(work)
            self._count([work])

        def several(batch: BatchedCall, works: Sequence[SlotCall]) -> None:
            chance = self._source.random()
            if chance < FAILING_CALLS / 2:
                raise InjectedError("a call that fails")
            self._check(works)
            run_several(batch, works)
            if chance > 1 - FAILING_CALLS / 2:
                raise InjectedError("a call that fails at its end")
            self._count(works)

        with mock.patch.object(SlotCall, "run", one), mock.patch.object(BatchedCall, "run", several):
            yield

    def _check(self, works: Sequence[SlotCall]) -> None:
        if any(_is_step(work) and self.left.get(work.calls) == 0 for work in works):
            raise InjectedError("an engine that fails")

    def _count(self, works: Sequence[SlotCall]) -> None:
        for work in works:
            if _is_step(work) and work.calls in self.left:
                self.left[work.calls] -= 1


def _is_step(work: SlotCall) -> bool:
    return "input_ids" in work.inputs
