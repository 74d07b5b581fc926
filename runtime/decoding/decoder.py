"""One sequence at the two engines: its rows of the KV caches, its stack of pending tokens, its bound calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from runtime.decoding.calls import NOTHING, Prediction, RunAhead, SlotCall, Waiting, Waits, finish
from runtime.engines.kv_cache import MOST_DOUBLED, CrossCache
from runtime.engines.onnx import Call
from runtime.engines.prefix_store import BLOCK, Prefix
from runtime.engines.runner import Runner
from runtime.kernels import reading_prompt
from runtime.result import Stats

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512
# While other sequences decode, a piece comes before each of the two engine calls that their next token takes: about as
# many rows as are read in so many seconds, within limits. Small pieces reread all weights for few tokens.
SHARED_PREFILL_SECONDS = 0.05
FEWEST_SHARED_ROWS = BLOCK
SHARED_PREFILL_ROWS = 128


class Decoder:
    """Invariant, until `drop_stack`: shallow length = deep length + stacked. `hidden_size` is d, `vocab_size` V,
    `max_pending` the rows of the stack. `batch_size`: sequences in the last shallow call, this one included. `others`:
    whether other sequences wait while a piece of a prompt is read. `alone`: none could share a deep pass, which is then
    run at once. `cross` is what cross-attention reads.

    `prefilling`, `stepping` and `syncing` give the engine calls that they need, so that those of several sequences can
    be run as one; `guess` and `answers` are the predictions then. `prefill`, `step` and `sync` run them at once. Calls
    are bound on first use and kept, with the arrays that they read and write. Those of a step are seen as plain memory,
    too: numpy scalar access is slow.
    """

    exit: Runner | None = None  # where the exit is an engine of its own
    overlaps = False  # whether deep passes run beside shallow steps
    in_background = False  # whether a deep pass may be running beside

    def __init__(
        self,
        shallow: Runner,
        deep: Runner,
        slot: int,
        hidden_size: int,
        vocab_size: int,
        max_pending: int,
    ) -> None:
        self.slot = slot
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.max_pending = max_pending
        self._shallow = shallow
        self._deep = deep
        self.stats = Stats()
        self.stacked = 0
        self.batch_size = 1
        self.others = False
        self.alone = False
        self._shared_rows = 2 * FEWEST_SHARED_ROWS  # of the next piece while others decode
        self._head = self._exits = False
        self._heads = self._drafts = 0  # of the last sync pass
        # What passes read, float32 [max_pending, d], the second where they leave out the first rows; and what several
        # steps at once gave, and a step, [1, 1, d].
        self._stack = shallow.zeros((max_pending, hidden_size), np.float32)
        self._later = shallow.zeros((max_pending, hidden_size), np.float32)
        self._together = shallow.zeros((max_pending, hidden_size), np.float32)
        self._hidden = shallow.zeros((1, 1, hidden_size), np.float32)
        self._rows = [_memory(self._stack[row]) for row in range(max_pending)]
        self._newest = _memory(self._hidden[0, 0])
        self._tokens = np.zeros((1, max_pending), np.int64)
        self._token = _memory(self._tokens[0, :1])
        self._best = np.zeros(1, np.int64)
        self._confidence = np.zeros(1, np.float32)
        self._answers = np.zeros(max_pending, np.int64)
        self._nll = np.zeros(max_pending, np.float32)
        self._best_memory = _memory(self._best)
        self._confidence_memory = _memory(self._confidence)
        self._answer_memory = _memory(self._answers)
        self._drafted = np.zeros(max_pending, np.int64)
        self._logits: dict[Runner, np.ndarray] = {}
        self._step_logits: np.ndarray | None = (
            None  # float32 [V] of the last step, where they are wanted
        )
        self.cross: dict[str, np.ndarray] = {}
        self._short = CrossCache(1)  # of one slot
        self._attended: dict[str, np.ndarray] | None = None  # what calls are bound to
        self._read: dict[Runner, dict[str, Any]] = {shallow: {}, deep: {}}
        self._past = {
            runner: {name: runner.value(view) for name, view in runner.cache.slot(slot)}
            for runner in (shallow, deep)
        }
        self.forget_calls()

    def forget_calls(self) -> None:
        """Bind all calls again when they are needed next."""
        # Steps by rows, whether they run the head, and an exit's own layers; passes
        # by rows (0: the one of `full_step`), heads, and whether they leave out the first rows of the stack.
        self._steps: dict[tuple[int, bool, bool], SlotCall] = {}
        self._passes: dict[tuple[int, int, bool], SlotCall] = {}
        # The last step, and the last pass until its answers are read; the step with the head, and those of `full_step`.
        self._step: SlotCall | None = None
        self._pass: SlotCall | None = None
        self._step_with_head: SlotCall | None = None
        self._both: tuple[SlotCall, SlotCall] | None = None

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The shallow and the deep one, and one of the exit that is read in step with them."""
        return self._shallow, self._deep

    def lengths(self) -> tuple[int, int]:
        """Valid positions of the shallow and of the deep cache."""
        return self._shallow.cache.length(self.slot), self._deep.cache.length(self.slot)

    def reset(self) -> None:
        """Begin a new sequence."""
        self.stats = Stats()
        self.trim(0)

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on, and what is stacked."""
        self.drop_stack()
        self._shallow.cache.trim(self.slot, length)
        self._deep.cache.trim(self.slot, length)

    def drop_stack(self) -> None:
        """Never show the deep decoder what is stacked: its cache stays behind for the rest of the sequence."""
        self.stacked = 0

    def attend(self, cross: dict[str, np.ndarray]) -> None:
        """Set what cross-attention reads: `cross.{layer}.key|value` [1, heads, E, head_dim] and `cross_lengths`. Of a
        short prompt it is copied: calls that stay bound save more."""
        on_host = all(isinstance(array, np.ndarray) for array in cross.values())
        if cross and on_host and cross["cross_lengths"][0] <= MOST_DOUBLED:
            self._short.place(0, cross)
            self._short.forget(0)  # nothing is ever moved from there
            cross = self._short.arrays
        self.cross = cross
        if cross is self._attended:
            return
        self._attended = cross
        for runner in self._read:
            self._read[runner] = {
                name: runner.value(array) for name, array in runner.cache.attended(cross).items()
            }
        for call in self._bound():
            call.attend(self._read[call.runner])

    def want_logits(self, wanted: bool) -> None:
        """Let predictions carry logits, or not: they are copied out of the engines only where they are `wanted`."""
        if wanted == bool(self._logits):
            return
        rows = {self._shallow: 1, self._deep: self.max_pending} if wanted else {}
        self._logits = {
            runner: np.zeros((count, self.vocab_size), np.float32) for runner, count in rows.items()
        }
        self._step_logits = self._logits[self._shallow][0] if wanted else None
        self.forget_calls()

    def move(self, other: Decoder) -> None:
        """Take the place of `other`, which is free, and leave it this one's."""
        for runner in self.runners:
            runner.cache.copy_rows(self.slot, other.slot)
            runner.cache.trim(self.slot, 0)
        self.slot, other.slot = other.slot, self.slot
        self._past, other._past = other._past, self._past
        for decoder in (self, other):
            for call in decoder._bound():
                call.forget()

    # At once

    def prefill(self, tokens: np.ndarray, head: bool, exits: bool = False) -> Prediction:
        """Run both engines over the prompt, int64 [n]: the deep prediction, with the shallow confidence if `head`.
        `exits`: see `begin`; with `head` they are run anyway."""
        return finish(self.prefilling(tokens, head, exits))

    def step(self, token: int, head: bool) -> Prediction:
        """Run the shallow decoder on one token, onto the stack. Without `head` there is no prediction: token -1."""
        calls = self.stepping(token, head)
        if calls:
            calls[0].run()
        return self.guess()

    def sync(
        self, heads: int = 1, drafts: Sequence[int] = (), ahead: RunAhead | None = None
    ) -> list[Prediction]:
        """Run the deep decoder on all stacked tokens: its predictions after the newest `heads` of them, in order.

        `drafts` are the tokens taken after the first of these rows: their predictions carry `nll`. Where the deep
        engine runs beside, the shallow one runs `ahead` meanwhile; `step` takes from that what fits.
        """
        for waits in self.syncing(heads, drafts, ahead):
            if isinstance(waits, SlotCall):
                waits.run()
        return self.answers()

    def full_step(self, token: int) -> int:
        """Run both decoders on one token, without the shallow head: the token that the deep one predicts. Nothing may
        be stacked. The same as `step` and `sync`, in fewer functions."""
        self._token[0] = token
        step, deep_pass = self._both or self._bind_both()
        step.run()
        deep_pass.run()
        self.batch_size = 1
        stats = self.stats
        stats.shallow_seconds += step.seconds
        stats.deep_seconds += deep_pass.seconds
        stats.single_passes += 1
        self._shallow.cache.extend(self.slot, 1)
        self._deep.cache.extend(self.slot, 1)
        deep: int = self._answer_memory[0]
        return deep

    # As coroutines, or as the engine calls that are needed

    def begin(self, exits: bool) -> None:
        """Begin with the first token of an encoder-decoder, without a prompt to read. `exits`: later steps may ask the
        head, so an exit's own layers are run for all rows from here on."""
        self._allow(exits)
        self.begun(1)

    def begun(self, prompt: int) -> None:
        """Called once a prompt of so many tokens was read, an encoder-decoder's start token among them."""

    def prefilling(
        self, tokens: np.ndarray, head: bool, exits: bool = False, prefix: Prefix | None = None
    ) -> Waits[Prediction]:
        """Read the prompt as `prefill`. Others have a turn between pieces. What `prefix` has is copied, not read."""
        self._allow(exits or head)
        start = 0
        while start < len(tokens):
            if start:
                yield None
            began = perf_counter()
            if prefix is not None:
                held = prefix.restore(self.runners, self.slot, start)
                self.stats.cached_tokens += held - start
                start = held
            rows = min(self._shared_rows, SHARED_PREFILL_ROWS) if self.others else PREFILL_ROWS
            piece = tokens[None, start : start + rows]
            start += piece.shape[1]
            last = start == len(tokens)
            self._prefill_piece(np.ascontiguousarray(piece), head and last, last)
            if prefix is not None:
                prefix.keep(self.runners, self.slot)
            self.stats.prefill_seconds += perf_counter() - began
        self.begun(len(tokens))
        return self._answer(0)._replace(confidence=self._confidence_memory[0] if head else None)

    def stepping(self, token: int, head: bool) -> tuple[SlotCall, ...]:
        """The calls that `step` needs: none where it was run ahead. `guess` then gives the prediction."""
        self._head = head
        self._token[0] = token
        self._step = call = (self._step_with_head if head else None) or self._step_call(head)
        return (call,)

    def guess(self) -> Prediction:
        """Count the step that ran, onto the stack: its prediction."""
        call = self._step
        assert call is not None
        self.stats.shallow_seconds += call.seconds
        self.batch_size = call.batch_size
        self._shallow.cache.extend(self.slot, call.rows)
        if call.rows == 1:
            self._rows[self.stacked][:] = self._newest
        else:
            self._stack[self.stacked : self.stacked + call.rows] = self._together[: call.rows]
        self.stacked += call.rows
        return self.prediction() if self._head else NOTHING

    def stepping_together(self, tokens: Sequence[int], head: bool = False) -> tuple[SlotCall, ...]:
        """The calls for shallow steps on several tokens at once, with the `head` after the last. `guess` counts them
        then, and gives its prediction."""
        rows = len(tokens)
        if rows == 1:
            return self.stepping(tokens[0], head)
        self._tokens[0, :rows] = tokens
        key = rows, head, self._exits or head
        call = self._steps.get(key)
        if call is None:
            hidden = self._together[None, :rows]
            call = self._steps[key] = self._shallow_call(self._tokens[:, :rows], hidden, head)
        self._step = call
        self._head = head
        return (call,)

    def syncing(
        self, heads: int, drafts: Sequence[int] = (), ahead: RunAhead | None = None
    ) -> Iterable[Waiting]:
        """The calls that `sync` needs. `answers` then gives the predictions."""
        self._heads = heads
        self._drafts = len(drafts)
        self._pass = call = self._pass_call(0, self.stacked, heads, drafts)
        if self.alone:
            call.run()
            return ()
        return (call,)

    def answers(self) -> list[Prediction]:
        """Count the sync pass that ran, and empty the stack: its predictions."""
        call = self._pass
        if call is not None:
            self._pass = None
            self.stats.count_pass(call.rows, call.seconds)
            self._deep.cache.extend(self.slot, call.rows)
        self.stacked = 0
        return [self._answer(row, row < self._drafts) for row in range(self._heads)]

    def start_sync(self, least: int) -> None:
        """Begin a pass in the background over the stacked rows that no pass has seen, where they are at least `least`,
        the deep engine runs beside, and no pass is under way. It answers nothing; its rows stay stacked until `sync`.
        """

    # What calls gave

    def prediction(self) -> Prediction:
        """Read the prediction of the step that ran, which is counted."""
        fields = (self._best_memory[0], self._confidence_memory[0], None, self._step_logits)
        shallow: Prediction = tuple.__new__(Prediction, fields)
        return shallow

    def _answer(self, row: int, drafted: bool = False) -> Prediction:
        """Read what the last deep call predicted at the `row`-th of its heads."""
        logits = self._logits[self._deep][row] if self._logits else None
        nll = self._nll.item(row) if drafted else None
        return tuple.__new__(Prediction, (self._answer_memory[row], None, nll, logits))

    # Calls

    def bind(self, call: SlotCall) -> Call:
        """Bind a call of this slot alone."""
        runner, rows, past = call.runner, call.rows, self._past[call.runner]
        shared: dict[str, Any] = {
            # The cache's own counter: the engine reads it where `extend` and `trim` write it.
            "past_lengths": runner.cache.lengths[self.slot : self.slot + 1],
            "query_lengths": np.array([rows], np.int32),
        }
        if runner.heads:
            shared["head_rows"] = np.arange(rows - call.heads, rows, dtype=np.int64)
        if runner.cache.own_exit:
            shared["exit_lengths"] = np.array([rows if call.exits else 0], np.int32)
        return runner.engine.bind(
            {
                **call.inputs,
                **shared,
                **self._read[runner],
                **{f"past.{name}": item for name, item in past.items()},
            },
            {**call.outputs, **{f"present.{name}": item for name, item in past.items()}},
        )

    def _bound(self) -> list[SlotCall]:
        """The calls that are kept."""
        return [*self._steps.values(), *self._passes.values()]

    def _allow(self, exits: bool) -> None:
        if self._exits != exits:
            self._exits = exits
            self._both = None

    def _step_call(self, head: bool) -> SlotCall:
        """The shallow decoder on `_token`."""
        key = 1, head, self._exits or head
        call = self._steps.get(key)
        if call is None:
            call = self._steps[key] = self._shallow_call(self._tokens[:, :1], self._hidden, head)
        if head:
            self._step_with_head = call
        return call

    def _pass_call(self, first: int, end: int, heads: int, drafts: Sequence[int]) -> SlotCall:
        """The deep decoder on rows `first` to `end` of the stack; the head for the last `heads` of them."""
        rows = end - first
        apart = first > 0
        call = self._passes.get((rows, heads, apart))
        if call is None:
            hidden = (self._later if apart else self._stack)[None, :rows]
            call = self._passes[rows, heads, apart] = self._deep_call(hidden, heads)
        if apart:
            self._later[:rows] = self._stack[first:end]
        if drafts:
            self._drafted[: len(drafts)] = drafts
        return call

    def _bind_both(self) -> tuple[SlotCall, SlotCall]:
        """The shallow decoder on `_token` without the head, and the deep one on what that gives, with it."""
        deep = self._passes.get((0, 1, False)) or self._deep_call(self._hidden, 1)
        self._passes[0, 1, False] = deep
        self._both = self._step_call(False), deep
        return self._both

    def _shallow_call(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> SlotCall:
        """The shallow decoder on tokens int64 [1, q]; `head` for its last row, or for none."""
        count = int(head)
        exits = self._exits or head
        outputs = {
            "hidden": hidden,
            "token": self._best[:count],
            "confidence": self._confidence[:count],
        }
        if self._logits:
            outputs["logits"] = self._logits[self._shallow][:count]
        return SlotCall(
            self, self._shallow, {"input_ids": tokens}, outputs, tokens.shape[1], count, exits
        )

    def _deep_call(self, hidden: np.ndarray, heads: int) -> SlotCall:
        """The deep decoder on hidden states float32 [1, k, d]; the head for its last `heads` rows."""
        inputs = {"hidden": hidden, "emitted": self._drafted[:heads]}
        outputs = {"token": self._answers[:heads], "nll": self._nll[:heads]}
        if self._logits:
            outputs["logits"] = self._logits[self._deep][:heads]
        return SlotCall(self, self._deep, inputs, outputs, hidden.shape[1], heads)

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_head: bool) -> None:
        rows = piece.shape[1]
        began = perf_counter()
        # The few tokens that an encoder-decoder begins with are rows like those of its steps.
        with reading_prompt(not self.cross):
            self._read_piece(piece, shallow_head, deep_head)
        if rows >= FEWEST_SHARED_ROWS:
            fit = rows * SHARED_PREFILL_SECONDS / max(perf_counter() - began, 1e-9)
            # The nearest whole blocks: the next below could be the same for ever, as more rows take less time each.
            self._shared_rows = max(round(fit / BLOCK) * BLOCK, FEWEST_SHARED_ROWS)

    def _read_piece(
        self, piece: np.ndarray, shallow_head: bool, deep_head: bool
    ) -> tuple[SlotCall, SlotCall]:
        """The shallow and the deep call on a piece of a prompt, which ran."""
        rows = piece.shape[1]
        hidden = self._shallow.scratch("piece", (1, rows, self.hidden_size), np.float32)
        calls = (
            self._shallow_call(piece, hidden, shallow_head),
            self._deep_call(hidden, int(deep_head)),
        )
        for call in calls:
            call.runner.run(self.bind(call))
            call.runner.cache.extend(self.slot, rows)
        return calls


def _memory(array: Any) -> Any:
    """The memory of an array of the host."""
    return array.data if isinstance(array, np.ndarray) else array
