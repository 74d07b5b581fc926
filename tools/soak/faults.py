"""Engine failures for a soak test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from unittest import mock

from runtime.batching import BatchedCall
from runtime.decoding.decoder import Decoder, SlotCall

# Share of the calls of several rows that fail; each row then runs alone.
FAILING_CALLS = 0.01


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
