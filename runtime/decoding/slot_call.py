"""What a sequence waits for: mostly its part of an engine call, which may be run together with those of others.

Decoding is written as coroutines: generators that yield what they wait for, and go on when it is there.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.engines.onnx import Call
from runtime.engines.runner import Event, Runner

if TYPE_CHECKING:
    from runtime.decoding.slot import Slot

T = TypeVar("T")
Yielded = TypeVar("Yielded")


class SlotCall:
    """`rows` rows of a sequence for the engine of `runner`, which is to run the head for the last `heads` of them.
    `exits`: and the exit's own layers, where it has any, for all.

    `inputs` and `outputs` are arrays of this sequence alone, named as the engine's: "input_ids" int64 [1, k], or
    "hidden" float32 [1, k, d] and "emitted" int64 [R]; "token", "confidence" or "nll", "logits" for R rows. `seconds`:
    what the call took that it was last part of, and `batch_size` how many sequences were.
    """

    __slots__ = (
        *("_call", "_used", "batch_size", "exits", "heads", "inputs"),
        *("outputs", "owner", "rows", "runner", "seconds"),
    )

    def __init__(
        self,
        owner: Slot,
        runner: Runner,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        rows: int,
        heads: int,
        exits: bool = False,
    ) -> None:
        self.exits = exits
        self.owner, self.runner, self.inputs, self.outputs = owner, runner, inputs, outputs
        self.rows, self.heads, self.seconds, self.batch_size = rows, heads, 0.0, 1
        self._call: Call | None = None
        self._used = False

    def submit(self) -> Event:
        """Run it by itself, where calls of its engine run."""
        return self.runner.submit(self._bound())

    def run(self) -> None:
        """Run it by itself, to its end."""
        call = self._call or self._bound()
        self._used = True
        self.seconds, self.batch_size = self.runner.run(call), 1

    def _bound(self) -> Call:
        if self._call is None:
            self._call = self.owner.bind(self)
        self._used = True
        return self._call

    def attend(self, cross: Mapping[str, Any]) -> None:
        """Read this instead of what the sequence before did. A call that it did not use is forgotten."""
        if self._call is not None and self._used:
            self._call.rebind(cross, {})
        else:
            self._call = None
        self._used = False

    def forget(self) -> None:
        """The slot has changed: bind again."""
        self._call = None


# Nothing: what follows are engine calls that a sequence which is alone runs itself.
AT_ONCE = Event(0.0)

# SlotCall to be run, an event to happen, or None: others may have a turn.
Waiting = SlotCall | Event | None
Waits = Generator[Waiting, None, T]


def alone(coroutine: Generator[Waiting | Yielded, None, T]) -> Generator[Yielded, None, T]:
    """Run what a coroutine waits for, at once, and pass on the other things that it yields."""
    try:
        item = next(coroutine)
        while True:
            if isinstance(item, SlotCall):
                item.run()
            elif item is not None and not isinstance(item, Event):
                yield item
            item = next(coroutine)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        coroutine.close()


def finish(coroutine: Waits[T]) -> T:
    """Run a coroutine to its end by itself: what it returns."""
    rest: Generator[Any, None, T] = alone(coroutine)
    try:
        while True:
            next(rest)
    except StopIteration as end:
        result: T = end.value
        return result
