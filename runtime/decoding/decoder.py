"""Decoder of one sequence: its rows in the KV caches, its stack of pending rows, and its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from runtime.decoding.calls import NOTHING, Prediction, SlotCall, Waits, finish
from runtime.engines.kernels import reading_prompt
from runtime.engines.kv_cache import MAX_DOUBLED, CrossCache
from runtime.engines.onnx import Call
from runtime.engines.prefix_store import BLOCK, Prefix
from runtime.engines.runner import Runner
from runtime.result import Stats

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512
# While other sequences decode, one piece runs before each of the two engine calls of their next
# token. Its number of rows is chosen to take this many seconds, within limits. Small pieces reread
# all weights for few tokens.
SHARED_PREFILL_SECONDS = 0.05
MIN_SHARED_ROWS = BLOCK
SHARED_PREFILL_ROWS = 128


class Decoder:
    """One sequence at the two engines.

    Invariant, until `drop_stack`: shallow length = deep length + stacked.

    `prefilling`, `stepping` and `syncing` are coroutines that yield the engine calls they need, so
    that calls of several sequences can run as one. An `only_sequence` runs them itself. `prefill`,
    `step` and `sync` do the same for callers that are no coroutine. Calls are bound on first use
    and kept, with the arrays they read and write. The arrays of a step are also kept as
    memoryviews, because numpy scalar access is slow.

    Attributes:
        slot: Row in the caches.
        max_pending: Maximum number of rows on the stack.
        exit: Runs the exit if that is an engine of its own.
        overlaps: Deep passes run in parallel to shallow steps.
        in_background: A deep pass may be running in parallel now.
        stacked: Number of rows on the stack.
        batch_size: Number of sequences in the last shallow call.
        others: Other sequences wait while a piece of a prompt is read.
        only_sequence: No other sequence could share a deep pass, so it runs at once.
        cross: Arrays that cross-attention reads.
    """

    exit: Runner | None = None
    overlaps = False
    in_background = False

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
        self.only_sequence = False
        self._shared_rows = 2 * MIN_SHARED_ROWS  # rows of the next piece while others decode
        self._exits = False
        # `_stack` and `_later` float32 [max_pending, d] are read by deep passes, `_later` by passes
        # that skip the first rows. `_together` is written by several steps at once, `_hidden` [1,
        # 1, d] by one step.
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
        self._deep_tokens = np.zeros(max_pending, np.int64)
        self._nll = np.zeros(max_pending, np.float32)
        self._best_memory = _memory(self._best)
        self._confidence_memory = _memory(self._confidence)
        self._deep_token_memory = _memory(self._deep_tokens)
        self._drafted = np.zeros(max_pending, np.int64)
        self._logits: dict[Runner, np.ndarray] = {}
        # float32 [V] of the last step, if logits are wanted.
        self._step_logits: np.ndarray | None = None
        self.cross: dict[str, np.ndarray] = {}
        self._short = CrossCache(1)  # short prompts, in one slot
        self._attended: dict[str, np.ndarray] | None = None  # arrays that calls are bound to
        self._read: dict[Runner, dict[str, Any]] = {shallow: {}, deep: {}}
        self._past = {
            runner: {name: runner.value(view) for name, view in runner.cache.slot(slot)}
            for runner in (shallow, deep)
        }
        self.forget_calls()

    def forget_calls(self) -> None:
        """Drop all bound calls. They are bound again when needed."""
        # Shallow calls by rows, head, and the exit's own layers. Deep calls by rows and heads, both
        # padded, and whether they skip the first rows of the stack.
        self._steps: dict[tuple[int, bool, bool], SlotCall] = {}
        self._passes: dict[tuple[int, int, bool], SlotCall] = {}

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The shallow and the deep runner, and the exit's if it reads along."""
        return self._shallow, self._deep

    def lengths(self) -> tuple[int, int]:
        """Return the valid positions of the shallow and of the deep cache."""
        return self._shallow.cache.length(self.slot), self._deep.cache.length(self.slot)

    def reset(self) -> None:
        """Begin a new sequence."""
        self.stats = Stats()
        self.trim(0)

    def trim(self, length: int) -> None:
        """Drop all positions from `length` on, and the stack."""
        self.drop_stack()
        self._shallow.cache.trim(self.slot, length)
        self._deep.cache.trim(self.slot, length)

    def drop_stack(self) -> None:
        """Drop the stacked rows without a deep pass. The deep cache then stays shorter."""
        self.stacked = 0

    def attend(self, cross: dict[str, np.ndarray]) -> None:
        """Set the arrays that cross-attention reads.

        They are `cross.{layer}.key|value` [1, heads, E, head_dim] and `cross_lengths`. Short
        prompts are copied into fixed arrays, because keeping calls bound saves more time than the
        copy takes.
        """
        on_host = all(isinstance(array, np.ndarray) for array in cross.values())
        if cross and on_host and cross["cross_lengths"][0] <= MAX_DOUBLED:
            self._short.place(0, cross)
            self._short.forget(0)  # its values are never moved
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
        """Set whether predictions carry logits. If not, they are not copied out of the engines."""
        if wanted == bool(self._logits):
            return
        rows = {self._shallow: 1, self._deep: self.max_pending} if wanted else {}
        self._logits = {
            runner: np.zeros((count, self.vocab_size), np.float32) for runner, count in rows.items()
        }
        self._step_logits = self._logits[self._shallow][0] if wanted else None
        self.forget_calls()

    def move(self, other: Decoder) -> None:
        """Swap slots with `other`, which is free, and copy the sequence's rows there."""
        for runner in self.runners:
            runner.cache.copy_rows(self.slot, other.slot)
            runner.cache.trim(self.slot, 0)
        self.slot, other.slot = other.slot, self.slot
        self._past, other._past = other._past, self._past
        for decoder in (self, other):
            for call in decoder._bound():
                call.forget()

    # Run at once

    def prefill(self, tokens: np.ndarray, head: bool, exits: bool = False) -> Prediction:
        """Run both engines over the prompt, int64 [n], and return the deep prediction.

        With `head` it carries the shallow confidence. `exits` is that of `start`, and implied by
        `head`.
        """
        return finish(self.prefilling(tokens, head, exits))

    def step(self, token: int, head: bool) -> Prediction:
        """Run the shallow decoder on one token and push its row onto the stack.

        Without `head` there is no prediction: the token is -1.
        """
        return finish(self.stepping((token,), head))

    def sync(self, heads: int = 1, drafts: Sequence[int] = ()) -> list[Prediction]:
        """Run the deep decoder on all stacked rows and return its last `heads` predictions.

        Predictions of the tokens `drafts`, drafted after the first of these rows, carry `nll`.
        """
        return finish(self.syncing(heads, drafts))

    # As coroutines

    def start(self, exits: bool) -> None:
        """Start with the first token of an encoder-decoder, without a prompt to read.

        With `exits`, the exit's own layers run for all rows from here on, so that later steps may
        use the head.
        """
        self._exits = exits
        self.on_prefill_done()

    def on_prefill_done(self) -> None:
        """Called after a prompt was read. Subclasses may override it."""

    def prefilling(
        self,
        tokens: np.ndarray,
        head: bool,
        exits: bool = False,
        prefix: Prefix | None = None,
        score: Callable[[int, np.ndarray], None] | None = None,
    ) -> Waits[Prediction]:
        """Read the prompt like `prefill`, letting others have a turn between pieces.

        Args:
            tokens, head, exits: See `prefill`.
            prefix: Positions stored in it are copied instead of computed.
            score: Called with the first position of each piece and the deep logits at its rows,
                float32 [k, V]. Requires `want_logits(True)` and no `prefix`.
        """
        self._exits = exits or head
        start = heads = 0
        while start < len(tokens):
            if start:
                yield None
            began = perf_counter()
            if prefix is not None:
                held = prefix.restore(self.runners, self.slot, start)
                self.stats.cached_tokens += held - start
                start = held
            rows = min(self._shared_rows, SHARED_PREFILL_ROWS) if self.others else PREFILL_ROWS
            if score is not None:
                rows = self.max_pending  # there is room for the logits of this many rows
            piece = tokens[None, start : start + rows]
            place = start
            start += piece.shape[1]
            last = start == len(tokens)
            heads = int(last) if score is None else piece.shape[1]
            self._prefill_piece(np.ascontiguousarray(piece), head and last, heads)
            if score is not None:
                score(place, self._logits[self._deep][:heads])
            if prefix is not None:
                prefix.keep(self.runners, self.slot)
            self.stats.prefill_seconds += perf_counter() - began
        self.on_prefill_done()
        return self._predictions(heads, 0)[-1]._replace(
            confidence=self._confidence_memory[0] if head else None
        )

    def stepping(self, tokens: Sequence[int], head: bool) -> Waits[Prediction]:
        """Run the shallow decoder on tokens in one call and push their rows onto the stack.

        Returns the prediction after the last token, or NOTHING without `head`.
        """
        rows = len(tokens)
        if rows == 1:
            self._token[0] = tokens[0]
        else:
            self._tokens[0, :rows] = tokens
        call = self._step_call(rows, head)
        if self.only_sequence:
            call.run()
        else:
            yield call
        self.stats.shallow_seconds += call.seconds
        self.batch_size = call.batch_size
        self._shallow.cache.extend(self.slot, rows)
        if rows == 1:
            self._rows[self.stacked][:] = self._newest
        else:
            self._stack[self.stacked : self.stacked + rows] = self._together[:rows]
        self.stacked += rows
        return self.prediction() if head else NOTHING

    def syncing(self, heads: int, drafts: Sequence[int] = ()) -> Waits[list[Prediction]]:
        """Run the deep decoder on the stack, empty it, and return the last `heads` predictions.

        Predictions of the tokens `drafts`, drafted after the first of these rows, carry `nll`.
        """
        call = self._pass_call(0, self.stacked, heads, drafts)
        if self.only_sequence:
            call.run()
        else:
            yield call
        self.stats.count_pass(call.rows, call.seconds)
        self._deep.cache.extend(self.slot, call.rows)
        self.stacked = 0
        return self._predictions(heads, len(drafts))

    def start_sync(self, min_rows: int) -> None:
        """Start a background pass over the stacked rows that no pass has read.

        Does nothing unless there are `min_rows` such rows, deep passes overlap, and none is
        running. The pass returns no predictions, and its rows stay on the stack until `sync`.
        """

    # Results of calls

    def prediction(self) -> Prediction:
        """Read the prediction of the last step, which has already been counted."""
        fields = (self._best_memory[0], self._confidence_memory[0], None, self._step_logits)
        return tuple.__new__(Prediction, fields)

    def _predictions(self, heads: int, drafts: int) -> list[Prediction]:
        """Read the predictions of the last deep call. The first `drafts` carry `nll`."""
        logits = self._logits[self._deep] if self._logits else None
        found = []
        for row in range(heads):
            nll = self._nll.item(row) if row < drafts else None
            of_row = None if logits is None else logits[row]
            fields = (self._deep_token_memory[row], None, nll, of_row)
            found.append(tuple.__new__(Prediction, fields))
        return found

    # Calls

    def bind(self, call: SlotCall) -> Call:
        """Bind a call for this slot alone."""
        runner = call.runner
        past = self._past[runner]
        shared: dict[str, Any] = {
            # A view of the cache's own counter, so the engine reads what `extend` and `trim` write.
            "past_lengths": runner.cache.lengths[self.slot : self.slot + 1],
            "query_lengths": call.query_lengths,
        }
        if runner.heads:
            shared["head_rows"] = call.head_rows
        if runner.cache.own_exit:
            shared["exit_lengths"] = np.array([call.rows if call.exits else 0], np.int32)
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
        """Return all calls that are kept."""
        return [*self._steps.values(), *self._passes.values()]

    def _step_call(self, rows: int, head: bool) -> SlotCall:
        """Return the shallow call on the first `rows` of `_tokens`."""
        key = rows, head, self._exits or head
        call = self._steps.get(key)
        if call is None:
            hidden = self._hidden if rows == 1 else self._together[None, :rows]
            call = self._steps[key] = self._shallow_call(self._tokens[:, :rows], hidden, head)
        return call

    def _pass_call(self, first: int, end: int, heads: int, drafts: Sequence[int]) -> SlotCall:
        """Return the deep call on rows `first` to `end` of the stack, with `heads` predictions."""
        rows = end - first
        apart = first > 0
        sizes = self._deep.padded(self.slot, rows, heads, self.max_pending)
        call = self._passes.get((*sizes, apart))
        if call is None:
            hidden = (self._later if apart else self._stack)[None, : sizes[0]]
            call = self._passes[*sizes, apart] = self._deep_call(hidden, sizes[1])
        call.shrink(rows, heads)
        if apart:
            self._later[:rows] = self._stack[first:end]
        if drafts:
            self._drafted[: len(drafts)] = drafts
        return call

    def _shallow_call(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> SlotCall:
        """Create the shallow call on tokens int64 [1, q]. `head` runs the head on the last row."""
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
            self, self._shallow, {"input_ids": tokens}, outputs=outputs, heads=count, exits=exits
        )

    def _deep_call(self, hidden: np.ndarray, heads: int) -> SlotCall:
        """Create the deep call on float32 [1, k, d]. The head runs on the last `heads` rows."""
        inputs = {"hidden": hidden, "emitted": self._drafted[:heads]}
        outputs = {"token": self._deep_tokens[:heads], "nll": self._nll[:heads]}
        if self._logits:
            outputs["logits"] = self._logits[self._deep][:heads]
        return SlotCall(self, self._deep, inputs, outputs=outputs, heads=heads)

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_heads: int) -> None:
        rows = piece.shape[1]
        began = perf_counter()
        # The first tokens of an encoder-decoder are few, like the rows of its steps.
        with reading_prompt(not self.cross):
            self._read_piece(piece, shallow_head, deep_heads)
        if rows >= MIN_SHARED_ROWS:
            fit = rows * SHARED_PREFILL_SECONDS / max(perf_counter() - began, 1e-9)
            # Round to the nearest block, not down: more rows take less time each, so rounding down
            # could keep the same size forever.
            self._shared_rows = max(round(fit / BLOCK) * BLOCK, MIN_SHARED_ROWS)

    def _read_piece(
        self, piece: np.ndarray, shallow_head: bool, deep_heads: int
    ) -> tuple[SlotCall, SlotCall]:
        """Run the shallow and the deep call on a piece of a prompt, and return them."""
        rows = piece.shape[1]
        hidden = self._shallow.scratch("piece", (1, rows, self.hidden_size), np.float32)
        calls = (
            self._shallow_call(piece, hidden, shallow_head),
            self._deep_call(hidden, deep_heads),
        )
        for call in calls:
            call.runner.run(self.bind(call))
            call.runner.cache.extend(self.slot, rows)
        return calls


def _memory(array: Any) -> Any:
    """Return the memoryview of a host array, or the array itself if it is on a device."""
    return array.data if isinstance(array, np.ndarray) else array
