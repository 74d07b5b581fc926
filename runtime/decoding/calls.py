"""Engine calls of one sequence, and coroutines that wait for them.

Decoding is written as coroutines: generators that yield what they wait for, mostly the sequence's part of an engine
call, which may be run together with those of others, and go on when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from runtime.engines.onnx import Call
from runtime.engines.runner import Event, Runner

T = TypeVar("T")


class Prediction(NamedTuple):
    """The arg max for the token after a row; `confidence` of the shallow decoder in [0, 1], None where its head did not
    run; `nll` in nats of the token that was drafted there, by the deep decoder; `logits` float32 [V] where they were
    asked for: a view, valid until the same engine's next call."""

    token: int
    confidence: float | None = None
    nll: float | None = None
    logits: np.ndarray | None = None


# Sequences for which a bound call is kept that none of them used: binding anew takes three times as long.
KEPT = 3

# The prediction at a row without the head.
NOTHING = Prediction(-1)

# What to run the shallow decoder on next while a sync pass runs, given its prediction after the token before (None at
# first) and the tokens that it has run ahead on. None: nothing more.
RunAhead = Callable[[Prediction | None, Sequence[int]], int | None]


class Owner(Protocol):
    """The decoder of a sequence: its slot, and what cross-attention reads there."""

    slot: int
    cross: dict[str, np.ndarray]

    def bind(self, call: SlotCall) -> Call: ...


class SlotCall:
    """`rows` rows of a sequence for the engine of `runner`, which is to run the head for the last `heads` of them.
    `exits`: and the exit's own layers, where it has any, for all.

    `inputs` and `outputs` are arrays of this sequence alone, named as the engine's: "input_ids" int64 [1, k], or
    "hidden" float32 [1, k, d] and "emitted" int64 [R]; "token", "confidence" or "nll", "logits" for R rows. `seconds`:
    what the call took that it was last part of, and `batch_size` how many sequences were.
    """

    __slots__ = (
        *("_age", "_call", "_cross", "_kept", "batch_size", "exits", "heads", "inputs"),
        *("outputs", "owner", "rows", "runner", "seconds"),
    )

    def __init__(
        self,
        owner: Owner,
        runner: Runner,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        rows: int,
        heads: int,
        exits: bool = False,
    ) -> None:
        self.owner = owner
        self.runner = runner
        self.inputs = inputs
        self.outputs = outputs
        self.rows = rows
        self.heads = heads
        self.exits = exits
        self.seconds = 0.0
        self.batch_size = 1
        self._call: Call | None = None
        self._kept: Call | None = (
            None  # bound, but to what an earlier sequence read, `_age` sequences ago
        )
        self._age = 0
        self._cross: Mapping[str, Any] = {}

    def submit(self) -> Event:
        """Run it by itself, where calls of its engine run."""
        return self.runner.submit(self._bound())

    def run(self) -> None:
        """Run it by itself, to its end."""
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
        """Read this instead of what the sequence before did, from the next run on. A call that KEPT sequences did not
        use is forgotten, and with it what it had read."""
        if self._call is not None:
            self._kept = self._call
            self._call = None
            self._age = 0
        elif self._age == KEPT:
            self._kept = None
        self._age += 1
        self._cross = cross

    def forget(self) -> None:
        """The slot has changed: bind again."""
        self._call = self._kept = None


# Nothing: what follows are engine calls that a sequence which is alone runs itself.
AT_ONCE = Event(0.0)

# SlotCall to be run, an event to happen, or None: others may have a turn.
Waiting = SlotCall | Event | None
Waits = Generator[Waiting, None, T]


def finish(coroutine: Waits[T]) -> T:
    """Run a coroutine to its end by itself: what it returns. It waits for its events itself."""
    try:
        while True:
            waits = next(coroutine)
            if isinstance(waits, SlotCall):
                waits.run()
    except StopIteration as end:
        result: T = end.value
        return result
