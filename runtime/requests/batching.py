"""Batching of engine calls: which calls of several sequences run next, and which run as one.

In a batched call, sequences are rows side by side, each with its own length and number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from runtime.adaptation.call_costs import CallCosts
from runtime.decoding.calls import SlotCall, Waiting
from runtime.engines.kv_cache import CrossCache
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner

# Maximum number of bound calls that are kept.
MAX_CALLS = 256
# Inputs and outputs with one state per row.
_STATES = ("hidden", "features")
# Number of deep passes after which the rules are updated from measured costs.
LEARNED = 64


class BatchedCall:
    """Batched calls of one engine.

    A call covers all slots from the first to the last that take part. Other slots in between are
    idle rows.

    Args:
        runner: Runs the engine.
        cross: Cross-attention of all slots.
        hidden_size: Size of hidden states, d.
        vocab_size: Size of the vocabulary, V.
        feature_size: Size of the features that the exit reads. 0 if it reads none.
    """

    def __init__(
        self,
        runner: Runner,
        cross: CrossCache,
        hidden_size: int,
        vocab_size: int,
        feature_size: int = 0,
    ) -> None:
        self._runner = runner
        self._cross = cross
        # Values of a row or head, where it has more than one.
        self._sizes = {
            "hidden": hidden_size,
            "features": feature_size,
            "feature": feature_size,
            "logits": vocab_size,
        }
        self._calls: dict[tuple[int, int, bool], Call] = {}
        self._version = cross.version

    def run(self, calls: Sequence[SlotCall]) -> None:
        """Run calls of several sequences as one, and copy the outputs to each sequence."""
        first, count, width = _area(calls)
        places = [call.owner.slot - first for call in calls]
        runner = self._runner
        given = [name for name in ("input_ids", *_STATES) if name in calls[0].inputs]
        tokens = (count, width)
        inputs: dict[str, Any] = {
            name: np.zeros(tokens, np.int64)
            if name == "input_ids"
            else runner.scratch(f"read.{name}", (*tokens, self._sizes[name]), np.float32)
            for name in given
        }
        lengths, exits = np.zeros((2, count), np.int32)
        heads = list[int]()
        for call, place in zip(calls, places, strict=True):
            for name in given:
                inputs[name][place, : call.rows] = call.inputs[name][0, : call.rows]
            lengths[place] = call.rows
            exits[place] = call.rows if call.exits else 0
            heads.extend(place * width + row for row in range(call.rows - call.heads, call.rows))
        inputs["query_lengths"] = lengths
        if runner.heads:
            inputs["head_rows"] = np.array(heads, np.int64)
        if runner.cache.own_exit:
            inputs["exit_lengths"] = exits
        if "emitted" in calls[0].inputs:
            inputs["emitted"] = np.concatenate(
                [call.inputs["emitted"][: call.heads] for call in calls]
            )
        outputs: dict[str, Any] = {}
        for output in {name: None for call in calls for name in call.outputs}:
            if output in _STATES:
                shape = (*tokens, self._sizes[output])
                outputs[output] = runner.scratch(output, shape, np.float32)
            elif output == "feature":
                states = (len(heads), self._sizes[output])
                outputs[output] = runner.scratch(output, states, np.float32)
            else:
                kind = np.int64 if output == "token" else np.float32
                size = [self._sizes[output]] if output in self._sizes else []
                outputs[output] = np.empty((len(heads), *size), kind)
        bound = self._bound(calls, first, count, "logits" in outputs)
        bound.rebind(inputs, outputs)
        seconds = runner.run(bound)
        head = 0
        for call, place in zip(calls, places, strict=True):
            for output, target in call.outputs.items():
                if output in _STATES:
                    target[:, : call.rows] = outputs[output][place : place + 1, : call.rows]
                else:
                    target[: call.heads] = outputs[output][head : head + call.heads]
            head += call.heads
            call.seconds = seconds
            call.batch_size = len(calls)

    def _bound(self, calls: Sequence[SlotCall], first: int, count: int, with_logits: bool) -> Call:
        for call in calls:
            self._cross.place(call.owner.slot, call.owner.cross)
        if self._version != self._cross.version or len(self._calls) >= MAX_CALLS:
            self._calls.clear()
            self._version = self._cross.version
        key = first, count, with_logits
        if key not in self._calls:
            cache = self._runner.cache
            slots = {name: array[first : first + count] for name, array in cache.arrays.items()}
            self._calls[key] = self._runner.engine.bind(
                {
                    **{f"past.{name}": array for name, array in slots.items()},
                    **cache.attended(self._cross.rows(first, count)),
                    "past_lengths": cache.lengths[first : first + count],
                },
                {f"present.{name}": array for name, array in slots.items()},
            )
        return self._calls[key]


def grouped(calls: Sequence[SlotCall], row_cost: float) -> list[list[SlotCall]]:
    """Split calls into groups, each to be run as one call.

    Calls with far more rows than the others run alone, if padding all others to that size, and idle
    rows between, would cost more than another call.
    """

    def cost(calls: Sequence[SlotCall]) -> float:
        _, count, width = _area(calls)
        return 1 + row_cost * (count * width - 1)

    groups: list[list[SlotCall]] = []
    rest = sorted(calls, key=lambda call: call.rows)
    while len(rest) > 1 and cost(rest) > cost(rest[:-1]) + cost(rest[-1:]):
        groups.append([rest.pop()])
    return [*groups, rest]


def _area(calls: Sequence[SlotCall]) -> tuple[int, int, int]:
    """Return the first slot, the number of slots, and the maximum number of rows."""
    slots = [call.owner.slot for call in calls]
    return min(slots), max(slots) + 1 - min(slots), max(call.rows for call in calls)


class Waiter(Protocol):
    """A sequence in the scheduler: it `waits` since the turn `since`."""

    waits: Waiting
    since: int


Waits = TypeVar("Waits", bound=Waiter)


class BatchRules(NamedTuple):
    """When a deep pass runs.

    Attributes:
        ready: Share of the sequences that must wait for one.
        patience: Number of turns after which one that waits is not delayed further.
        row_cost: Cost of one more row in a call, relative to the first.
    """

    ready: float
    patience: int
    row_cost: float


def rules_of(row_cost: float) -> BatchRules:
    """Return the best rules by simulation (docs/serving.md).

    The cheaper one more row is, the longer it pays to wait for it.
    """
    if row_cost < 0.08:
        return BatchRules(1.0, 8, row_cost)
    return BatchRules(0.5, 4, row_cost) if row_cost < 0.2 else BatchRules(0.25, 2, row_cost)


class BatchPolicy:
    """Chooses and runs engine calls.

    Args:
        batches: Batched calls of the engines that support them.
        shallow: The shallow engine.
        costs: Collects the costs of calls.
        packed: Padding and idle rows of deep passes cost nothing.
        exit: The exit's engine, if it has its own.
    """

    def __init__(
        self,
        batches: Mapping[Runner, BatchedCall],
        shallow: Runner,
        costs: CallCosts,
        packed: bool = False,
        exit: Runner | None = None,
    ) -> None:
        self._batches = batches
        self._shallow = shallow
        self._costs = costs
        self._packed = packed
        self._exit = exit
        self._timed = 0
        self.rules = rules_of(costs.further_row())

    def choose(self, sequences: Sequence[Waits], turn: int) -> list[Waits]:
        """Return sequences that wait for the same engine.

        Shallow steps run first, so that deep passes accumulate. Deep passes run once enough
        sequences wait for one, or one has waited too long. A waiting sequence makes no progress, so
        waiting for all may lose more than it saves.
        """
        shallow = list[Waits]()
        exits = list[Waits]()
        deep = list[Waits]()
        others = {self._shallow: shallow, self._exit: exits}
        for each in sequences:
            if isinstance(each.waits, SlotCall):
                others.get(each.waits.runner, deep).append(each)
        waited = max((turn - each.since for each in deep), default=0)
        enough = len(deep) >= self.rules.ready * (len(deep) + len(shallow) + len(exits))
        return deep if deep and (enough or waited >= self.rules.patience) else shallow or exits

    def run(
        self, calls: Sequence[SlotCall], together: bool
    ) -> Iterator[tuple[SlotCall, Exception | None]]:
        """Run calls of one engine, as few as possible if `together`, and yield each with its error.

        The caller must count what a call wrote before the next one runs. Slots of the former may be
        idle in the latter, and an engine may pad idle rows after the counted ones.
        """
        for group in self._grouped(calls) if together else [[call] for call in calls]:
            failed = self._call(group)
            for call in group:
                yield call, failed.get(id(call))

    def _grouped(self, calls: Sequence[SlotCall]) -> Sequence[Sequence[SlotCall]]:
        runner = calls[0].runner
        if runner not in self._batches:
            return [[call] for call in calls]
        if self._packed and runner is not self._shallow:
            return [calls]
        return grouped(calls, self.rules.row_cost)

    def _call(self, calls: Sequence[SlotCall]) -> dict[int, Exception]:
        try:
            if len(calls) == 1:
                calls[0].run()
            else:
                self._batches[calls[0].runner].run(calls)
        except Exception as error:
            if len(calls) == 1:
                return {id(calls[0]): error}
            # Retry one by one to find the failing request. Nothing has been counted as written.
            return {key: failure for call in calls for key, failure in self._call([call]).items()}
        self._learn(calls)
        return {}

    def _learn(self, calls: Sequence[SlotCall]) -> None:
        """Record the cost of calls. A row costs about the same in any sequence."""
        rows = sum(call.rows for call in calls)
        heads = sum(call.heads for call in calls)
        if calls[0].runner is self._exit:
            # A step with the head includes the shallow step of one row per head. The exit's engine
            # reads at least that many rows.
            self._costs.observe(
                "head", heads, self._costs.seconds("step", heads) + calls[0].seconds
            )
        elif calls[0].runner is not self._shallow:
            self._costs.observe("pass", rows, calls[0].seconds)
            self._timed += 1
            if self._timed % LEARNED == 0:
                self.rules = rules_of(self._costs.further_row())
        elif heads in (0, rows):
            self._costs.observe("head" if heads else "step", rows, calls[0].seconds)
