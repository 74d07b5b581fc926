"""Engine calls of one sequence, and coroutines that wait for them.

Decoding is written as coroutines: generators that yield what they wait for and resume when it is
done. Mostly they wait for an engine call, which may run together with those of other sequences.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from runtime.engines.onnx import Call
from runtime.engines.runner import Event, Runner

T = TypeVar("T")


class Prediction(NamedTuple):
    """Prediction of the token after a row.

    Attributes:
        token: The most likely token.
        confidence: Confidence of the shallow decoder in [0, 1]. None if its head did not run.
        nll: Negative log-likelihood in nats of the drafted token, by the deep decoder.
        logits: float32 [V], or None unless requested. A view that is valid until the same engine's
            next call.
    """

    token: int
    confidence: float | None = None
    nll: float | None = None
    logits: np.ndarray | None = None


# Number of sequences for which an unused bound call is kept. Binding a new one takes three times as
# long as rebinding.
KEPT = 3

# Prediction at a row without the head.
NOTHING = Prediction(-1)


class Owner(Protocol):
    """The decoder of a sequence: its slot and the arrays that cross-attention reads."""

    slot: int
    cross: dict[str, np.ndarray]

    def bind(self, call: SlotCall) -> Call: ...


class SlotCall:
    """One engine call for the rows of one sequence.

    `inputs` and `outputs` are arrays of this sequence alone, named as the engine's: "input_ids"
    int64 [1, k], or "hidden" float32 [1, k, d] and "emitted" int64 [R]; "token", "confidence" or
    "nll", "logits" for R rows.

    Args:
        owner: The sequence's decoder.
        runner: Runs the engine.
        inputs: Arrays by name. The first has k rows.
        outputs: Arrays by name.
        heads: Number of last rows, R, for which the head runs.
        exits: Also run the exit's own layers, if any, for all rows.

    Attributes:
        query_lengths: Engine input int32 [1]: `rows`.
        head_rows: Engine input int64 [R]: the last `heads` rows.
        seconds: Duration of the last engine call that included it.
        batch_size: Number of sequences in that call.
    """

    __slots__ = (
        *("_age", "_call", "_cross", "_kept", "batch_size", "exits", "head_rows", "heads"),
        *("inputs", "outputs", "owner", "query_lengths", "rows", "runner", "seconds"),
    )

    def __init__(
        self,
        owner: Owner,
        runner: Runner,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        heads: int,
        exits: bool = False,
    ) -> None:
        rows = next(iter(inputs.values())).shape[1]
        self.owner = owner
        self.runner = runner
        self.inputs = inputs
        self.outputs = outputs
        self.rows = rows
        self.heads = heads
        self.exits = exits
        self.query_lengths = np.array([rows], np.int32)
        self.head_rows = np.arange(rows - heads, rows, dtype=np.int64)
        self.seconds = 0.0
        self.batch_size = 1
        self._call: Call | None = None
        # Bound to the cross-attention arrays of the sequence `_age` sequences ago.
        self._kept: Call | None = None
        self._age = 0
        self._cross: Mapping[str, Any] = {}

    def shrink(self, rows: int, heads: int) -> None:
        """Use only the first `rows` rows and `heads` predictions. The others become padding."""
        if (rows, heads) != (self.rows, self.heads):
            self.rows = rows
            self.heads = heads
            self.query_lengths[0] = rows
            self.head_rows[:heads] = range(rows - heads, rows)
            self.head_rows[heads:] = rows - 1

    def submit(self) -> Event:
        """Start the call on its own, on the thread or stream of its engine."""
        return self.runner.submit(self._bound())

    def run(self) -> None:
        """Run the call on its own, to completion."""
        call = self._call or self._bound()
        self.seconds = self.runner.run(call)
        self.batch_size = 1

    def _bound(self) -> Call:
        if self._call is None and self._kept is not None:
            self._kept.rebind(self._cross, {})
            self._call = self._kept
            self._kept = None
        elif self._call is None:
            self._call = self.owner.bind(self)
        return self._call

    def attend(self, cross: Mapping[str, Any]) -> None:
        """Set the cross-attention arrays for the next runs.

        A call that was not used for KEPT sequences is dropped, with the arrays it is bound to.
        """
        if self._call is not None:
            self._kept = self._call
            self._call = None
            self._age = 0
        elif self._age == KEPT:
            self._kept = None
        self._age += 1
        self._cross = cross

    def forget(self) -> None:
        """Drop the bound calls because the slot has changed."""
        self._call = self._kept = None


# Yielded before engine calls that a sequence runs itself because it is alone. Nothing to wait for.
RUN_INLINE = Event(0.0)

# A call to run, an event to wait for, or None to let others have a turn.
Waiting = SlotCall | Event | None
Waits = Generator[Waiting, None, T]


def finish(coroutine: Waits[T]) -> T:
    """Run a coroutine to completion and return its result. It waits for its own events."""
    try:
        while True:
            waits = next(coroutine)
            if isinstance(waits, SlotCall):
                waits.run()
    except StopIteration as end:
        result: T = end.value
        return result
