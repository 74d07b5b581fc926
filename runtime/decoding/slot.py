"""The engine calls of one slot of the KV cache, each bound on first use and kept, and the arrays that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from runtime.decoding.prediction import Prediction
from runtime.decoding.slot_call import SlotCall
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner


class Slot:
    """`hidden_size` is d, `vocab_size` V, `max_pending` the most rows of a deep pass.

    `stack` float32 [max_pending, d] is what deep passes read. `token` int64 [1] is what a step reads, `hidden` float32
    [d], `best` int64 [1] and `confidence` float32 [1] what it gave. Those, and `newest` and `rows`, which are `hidden`
    and the rows of `stack`, are plain memory: numpy takes long for little. `cross` is what cross-attention reads.
    """

    def __init__(
        self, shallow: Runner, deep: Runner, slot: int, hidden_size: int, vocab_size: int, max_pending: int
    ) -> None:
        self.slot = slot
        self._shallow, self._deep = shallow, deep
        self._vocab_size, self._max_pending = vocab_size, max_pending
        self.cross: dict[str, np.ndarray] = {}
        self._read: dict[Runner, dict[str, Any]] = {shallow: {}, deep: {}}
        self.stack = shallow.zeros((max_pending, hidden_size), np.float32)
        self.rows = [_memory(self.stack[row]) for row in range(max_pending)]
        self._rows = shallow.zeros((max_pending, hidden_size), np.float32)
        self._hidden = shallow.zeros((1, 1, hidden_size), np.float32)
        self.hidden = self._hidden[0, 0]
        self.newest = _memory(self.hidden)
        self._tokens = np.zeros((1, max_pending), np.int64)
        self._token = self._tokens[:, :1]
        self._best, self._confidence = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self.token, self.best, self.confidence = map(_memory, (self._token[0], self._best, self._confidence))
        self._answers, self._nll = np.zeros(max_pending, np.int64), np.zeros(max_pending, np.float32)
        self.answers: Any = _memory(self._answers)
        self._drafted = np.zeros(max_pending, np.int64)
        self._logits: dict[Runner, np.ndarray] = {}
        self.logits: np.ndarray | None = None  # float32 [V] of the last step, where they are wanted
        self._past = {
            runner: {name: runner.value(view) for name, view in runner.cache.slot(slot)} for runner in (shallow, deep)
        }
        # By whether they ask the head, and run the exit's own layers; `_together` by rows, and by that.
        self._steps: dict[tuple[bool, bool], SlotCall] = {}
        self._together: dict[tuple[int, bool], SlotCall] = {}
        self._passes: dict[tuple[int, int, bool], SlotCall] = {}
        # Of these the step that asks the head, and what `bind_both` gives, once they are there.
        self.asking: SlotCall | None = None
        self.both: tuple[SlotCall, SlotCall] | None = None
        self.shared_calls = False  # whether any since the sequence began was shared with others

    def attend(self, cross: dict[str, np.ndarray]) -> None:
        """Set what cross-attention reads: `cross.{layer}.key|value` [1, heads, E, head_dim] and `cross_lengths`."""
        self.cross = cross
        for runner in (self._shallow, self._deep):
            self._read[runner] = self._cross_of(runner)
        for call in self._every_call():
            call.attend(self._read[call.runner])

    def want_logits(self, wanted: bool) -> None:
        """Whether predictions carry logits: they are copied out of the engines only then."""
        if wanted == bool(self._logits):
            return
        rows = {self._shallow: 1, self._deep: self._max_pending} if wanted else {}
        self._logits = {runner: np.zeros((count, self._vocab_size), np.float32) for runner, count in rows.items()}
        self.logits = self._logits[self._shallow][0] if wanted else None
        for calls in (self._steps, self._together, self._passes):
            calls.clear()
        self.asking = self.both = None

    def exchange(self, other: Slot) -> None:
        """Change places."""
        self.slot, other.slot = other.slot, self.slot
        self._past, other._past = other._past, self._past
        for call in chain(self._every_call(), other._every_call()):
            call.forget()

    def step(self, head: bool, exits: bool) -> SlotCall:
        """The shallow decoder on `token`."""
        call = self._steps.get((head, exits))
        if call is None:
            call = self._steps[head, exits] = self.piece(self._token, self._hidden, head, exits)
        if head:
            self.asking = call
        return call

    def steps_together(self, tokens: Sequence[int], exits: bool) -> SlotCall:
        """The shallow decoder on tokens, into the first rows of the stack, without the head."""
        rows = len(tokens)
        self._tokens[0, :rows] = tokens
        call = self._together.get((rows, exits))
        if call is None:
            call = self.piece(self._tokens[:, :rows], self.stack[None, :rows], False, exits)
            self._together[rows, exits] = call
        return call

    def sync(self, first: int, end: int, heads: int, drafts: Sequence[int]) -> SlotCall:
        """The deep decoder on rows `first` to `end` of the stack; the head for the last `heads` of them."""
        rows, apart = end - first, first > 0
        call = self._passes.get((rows, heads, apart))
        if call is None:
            hidden = (self._rows if apart else self.stack)[None, :rows]
            call = self._passes[rows, heads, apart] = self.deep_piece(hidden, heads)
        if apart:
            self._rows[:rows] = self.stack[first:end]
        if drafts:
            self._drafted[: len(drafts)] = drafts
        return call

    def bind_both(self, exits: bool) -> tuple[SlotCall, SlotCall]:
        """The shallow decoder on `token` without the head, and the deep one on what that gives, with it."""
        deep = self._passes[0, 1, False] = self.deep_piece(self._hidden, 1)
        self.both = self.step(False, exits), deep
        return self.both

    def answer(self, row: int, drafted: bool = False) -> Prediction:
        """What the last deep call predicted at the `row`-th of its heads."""
        logits = self._logits[self._deep][row] if self._logits else None
        nll = self._nll.item(row) if drafted else None
        return tuple.__new__(Prediction, (self.answers[row], None, nll, logits))

    def piece(self, tokens: np.ndarray, hidden: np.ndarray, head: bool, exits: bool) -> SlotCall:
        """The shallow decoder on tokens int64 [1, q]; `head` for its last row, or for none; the exit's own layers for
        all, where it `exits`."""
        count = int(head)
        outputs = {"hidden": hidden, "token": self._best[:count], "confidence": self._confidence[:count]}
        return self._new_call(self._shallow, {"input_ids": tokens}, outputs, tokens.shape[1], count, exits)

    def deep_piece(self, hidden: np.ndarray, heads: int) -> SlotCall:
        """The deep decoder on hidden states float32 [1, k, d]; the head for its last `heads` rows."""
        inputs = {"hidden": hidden, "emitted": self._drafted[:heads]}
        outputs = {"token": self._answers[:heads], "nll": self._nll[:heads]}
        return self._new_call(self._deep, inputs, outputs, hidden.shape[1], heads)

    def bind(self, call: SlotCall) -> Call:
        """A call of this slot alone."""
        runner, rows, past = call.runner, call.rows, self._past[call.runner]
        shared = {
            # The cache's own counter: the engine reads it where `extend` and `trim` write it.
            "past_lengths": runner.cache.lengths[self.slot : self.slot + 1],
            "query_lengths": np.array([rows], np.int32),
            "head_rows": np.arange(rows - call.heads, rows, dtype=np.int64),
        }
        if runner.cache.own_exit:
            shared["exit_lengths"] = np.array([rows if call.exits else 0], np.int32)
        return runner.engine.bind(
            {**call.inputs, **shared, **self._read[runner], **{f"past.{name}": item for name, item in past.items()}},
            {**call.outputs, **{f"present.{name}": item for name, item in past.items()}},
        )

    def _every_call(self) -> Iterator[SlotCall]:
        return chain(self._steps.values(), self._together.values(), self._passes.values())

    def _new_call(
        self,
        runner: Runner,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        rows: int,
        heads: int,
        exits: bool = False,
    ) -> SlotCall:
        logits = {"logits": self._logits[runner][:heads]} if self._logits else {}
        return SlotCall(self, runner, inputs, {**outputs, **logits}, rows, heads, exits)

    def _cross_of(self, runner: Runner) -> dict[str, Any]:
        """What a runner's engine reads of `cross`."""
        layers = {name.split(".")[0] for name in runner.cache.arrays}
        read = {n: v for n, v in self.cross.items() if n == "cross_lengths" or n.split(".")[1] in layers}
        return {name: runner.value(array) for name, array in read.items()}


def _memory(array: Any) -> Any:
    """The memory of an array of the host."""
    return array.data if isinstance(array, np.ndarray) else array
