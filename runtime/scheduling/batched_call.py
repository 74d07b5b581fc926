"""One engine call for several sequences: their rows side by side, each with its own length and number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.decoding.slot_call import SlotCall
from runtime.engines.cross_cache import CrossCache
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner

# What a further row of a call costs, as a share of the first, where a bundle does not say: in a padded place it costs
# as much as anywhere.
ROW_COST = 0.1
# Calls that are kept bound.
MOST_CALLS = 256


class BatchedCall:
    """The calls of one lane over the slots between the first and the last that take part; those in between that do not
    are idle rows. `hidden_size` is d, `vocab_size` V."""

    def __init__(self, lane: Runner, cross: CrossCache, hidden_size: int, vocab_size: int) -> None:
        self._lane, self._cross = lane, cross
        self._hidden_size, self._vocab_size = hidden_size, vocab_size
        self._layers = {name.split(".")[0] for name in lane.cache.arrays}
        self._calls: dict[tuple[int, int, bool], Call] = {}
        self._version = cross.version

    def run(self, works: Sequence[SlotCall]) -> None:
        """Run what sequences wait for as one call, and hand each its part."""
        first, count, width = _area(works)
        places = [work.calls.slot - first for work in works]
        heads = [
            place * width + row
            for work, place in zip(works, places, strict=True)
            for row in range(work.rows - work.heads, work.rows)
        ]
        with_logits = any("logits" in work.outputs for work in works)
        inputs = self._inputs(works, places, count, width)
        inputs["head_rows"] = np.array(heads, np.int64)
        outputs = self._outputs(works, count, width, len(heads), with_logits)
        call = self._call(works, first, count, with_logits)
        call.rebind(inputs, outputs)
        seconds, head = self._lane.run(call), 0
        for work, place in zip(works, places, strict=True):
            for name, target in work.outputs.items():
                source = outputs[name]
                if name == "hidden":
                    target[:] = source[place : place + 1, : work.rows]
                else:
                    target[:] = source[head : head + work.heads]
            head += work.heads
            work.seconds, work.company, work.calls.shared_calls = seconds, len(works), True

    def _inputs(self, works: Sequence[SlotCall], places: list[int], count: int, width: int) -> dict[str, Any]:
        name = "input_ids" if "input_ids" in works[0].inputs else "hidden"
        shape = (count, width) if name == "input_ids" else (count, width, self._hidden_size)
        rows = np.zeros(shape, np.int64) if name == "input_ids" else self._lane.scratch("rows", shape, np.float32)
        lengths, exits = np.zeros((2, count), np.int32)
        for work, place in zip(works, places, strict=True):
            rows[place, : work.rows] = work.inputs[name][0]
            lengths[place] = work.rows
            exits[place] = work.rows if work.exits else 0
        inputs: dict[str, Any] = {name: rows, "query_lengths": lengths}
        if self._lane.cache.own_exit:
            inputs["exit_lengths"] = exits
        if "emitted" in works[0].inputs:
            inputs["emitted"] = np.concatenate([work.inputs["emitted"] for work in works])
        return inputs

    def _outputs(
        self, works: Sequence[SlotCall], count: int, width: int, heads: int, with_logits: bool
    ) -> dict[str, Any]:
        outputs: dict[str, Any] = {"token": np.empty(heads, np.int64)}
        if "hidden" in works[0].outputs:
            outputs["hidden"] = self._lane.scratch("hidden", (count, width, self._hidden_size), np.float32)
            outputs["confidence"] = np.empty(heads, np.float32)
        else:
            outputs["nll"] = np.empty(heads, np.float32)
        if with_logits:
            outputs["logits"] = np.empty((heads, self._vocab_size), np.float32)
        return outputs

    def _call(self, works: Sequence[SlotCall], first: int, count: int, with_logits: bool) -> Call:
        for work in works:
            self._cross.place(work.calls.slot, work.calls.cross)
        if self._version != self._cross.version:
            self._calls.clear()
            self._version = self._cross.version
        key = first, count, with_logits
        if key not in self._calls:
            if len(self._calls) >= MOST_CALLS:
                self._calls.clear()
            cache = self._lane.cache
            slots = {name: array[first : first + count] for name, array in cache.arrays.items()}
            self._calls[key] = self._lane.engine.bind(
                {
                    **{f"past.{name}": array for name, array in slots.items()},
                    **self._cross.rows(self._layers, first, count),
                    "past_lengths": cache.lengths[first : first + count],
                },
                {f"present.{name}": array for name, array in slots.items()},
            )
        return self._calls[key]


def grouped(works: Sequence[SlotCall], row_cost: float = ROW_COST) -> list[list[SlotCall]]:
    """Which works to run as one call each: those with far more rows than the others go alone, where padding all of
    them to that size, and idle rows between, would cost more than another call."""
    groups: list[list[SlotCall]] = []
    rest = sorted(works, key=lambda work: work.rows)
    while len(rest) > 1 and _cost(rest, row_cost) > _cost(rest[:-1], row_cost) + _cost(rest[-1:], row_cost):
        groups.append([rest.pop()])
    return [*groups, rest]


def _cost(works: Sequence[SlotCall], row_cost: float) -> float:
    _, count, width = _area(works)
    return 1 + row_cost * (count * width - 1)


def _area(works: Sequence[SlotCall]) -> tuple[int, int, int]:
    """The first slot, how many from there on, and the most rows of one."""
    slots = [work.calls.slot for work in works]
    return min(slots), max(slots) + 1 - min(slots), max(work.rows for work in works)
