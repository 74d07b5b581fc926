"""One sequence at the two engines: its rows of the KV caches, its stack of pending tokens, its bound calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

import numpy as np

from runtime.decoding.decisions import Decisions
from runtime.decoding.prediction import NOTHING, Prediction
from runtime.decoding.prefix import BLOCK, Prefix
from runtime.decoding.slot import Slot
from runtime.decoding.slot_call import SlotCall, Waiting, Waits, finish
from runtime.engines.runner import Runner
from runtime.result import Stats

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512
# While other sequences decode, a piece comes before each of the two engine calls that their next token takes: about as
# many rows as are read in so many seconds, within limits. Few rows read all weights for little.
SHARED_PREFILL_SECONDS = 0.05
FEWEST_SHARED_ROWS, SHARED_PREFILL_ROWS = BLOCK, 128

# What to run the shallow decoder on next while a sync pass runs, given its prediction after the token before (None at
# first) and the tokens that it has run ahead on. None: nothing more.
RunAhead = Callable[[Prediction | None, Sequence[int]], int | None]


class Decoder:
    """Invariant, until `drop_stack`: shallow length = deep length + stacked. `hidden_size` is d, `vocab_size` V,
    `max_pending` the rows of the stack. `batch_size`: sequences in the last shallow call, this one included. `others`:
    whether other sequences wait while a piece of a prompt is read. `alone`: none could share a deep pass, which is then
    run at once. `want_logits` makes predictions carry logits.

    `prefilling`, `stepping` and `syncing` give the engine calls that they need, so that those of several sequences can
    be run as one; `guess` and `answers` are the predictions then. `prefill`, `step` and `sync` run them at once.
    `decisions`: see there.
    """

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
        decisions: Decisions | None = None,
    ) -> None:
        self.stats = Stats()
        self.stacked = 0
        self.batch_size, self.others, self.alone = 1, False, False
        self._shared_rows = 2 * FEWEST_SHARED_ROWS  # of the next piece while others decode
        self.hidden_size, self.vocab_size, self._max_pending = hidden_size, vocab_size, max_pending
        self._shallow, self._deep = shallow, deep
        self._calls = Slot(shallow, deep, slot, hidden_size, vocab_size, max_pending)
        self._decisions = decisions
        self._step: SlotCall | None = None  # the last one
        self._head = self._exits = False
        self._heads = self._drafts = 0  # of the last sync pass
        self._pass: SlotCall | None = None  # the last one, until its answers are read

    @property
    def slot(self) -> int:
        return self._calls.slot

    @property
    def shared_calls(self) -> bool:
        """Whether any engine call of the sequence was shared with others."""
        return self._calls.shared_calls

    def reset(self) -> None:
        """Begin a new sequence."""
        self.stats, self._calls.shared_calls = Stats(), False
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
        """Set what cross-attention reads: `cross.{layer}.key|value` [1, heads, E, head_dim] and `cross_lengths`."""
        self._calls.attend(cross)

    def want_logits(self, wanted: bool) -> None:
        """Whether predictions carry logits: they are copied out of the engines only then."""
        self._calls.want_logits(wanted)

    def move(self, other: Decoder) -> None:
        """Take the place of `other`, which is free, and leave it this one's."""
        for runner in self.runners:
            runner.cache.copy_rows(self.slot, other.slot)
            runner.cache.trim(self.slot, 0)
        self._calls.exchange(other._calls)

    def begin(self, exits: bool) -> None:
        """Begin with the first token of an encoder-decoder, without a prompt to read. `exits`: later steps may ask the
        head, so an exit's own layers are run for all rows from here on."""
        self._allow(exits)
        if self._decisions is not None:
            self._decisions.begin(self, 1)

    def prefill(self, tokens: np.ndarray, head: bool, exits: bool = False) -> Prediction:
        """Both engines over the prompt, int64 [n]. The deep prediction, with the shallow confidence if `head`.

        `exits`: see `begin`; with `head` they are run anyway.
        """
        return finish(self.prefilling(tokens, head, exits))

    def step(self, token: int, head: bool) -> Prediction:
        """Shallow decoder on one token, onto the stack. Without `head` there is no prediction: token -1."""
        calls = self.stepping(token, head)
        if calls:
            calls[0].run()
        return self.guess()

    def sync(self, heads: int = 1, drafts: Sequence[int] = (), ahead: RunAhead | None = None) -> list[Prediction]:
        """Deep decoder on all stacked tokens: its predictions after the newest `heads` of them, in order.

        `drafts` are the tokens taken after the first of these rows: their predictions carry `nll`. Where the deep
        engine runs beside, the shallow one runs `ahead` meanwhile; `step` takes from that what fits.
        """
        for waits in self.syncing(heads, drafts, ahead):
            if isinstance(waits, SlotCall):
                waits.run()
        return self.answers()

    def full_step(self, token: int) -> int:
        """Both decoders on one token, without the shallow head, at once: the token that the deep one predicts. Nothing
        may be stacked. The same as `step` and `sync`, in fewer functions."""
        calls = self._calls
        calls.token[0] = token
        step, deep_pass = calls.both or calls.bind_both(self._exits)
        step.run()
        deep_pass.run()
        self.batch_size = 1
        stats = self.stats
        stats.shallow_seconds += step.seconds
        stats.deep_seconds += deep_pass.seconds
        stats.single_passes += 1
        self._shallow.cache.extend(calls.slot, 1)
        self._deep.cache.extend(calls.slot, 1)
        deep = calls.answers[0]
        return deep if self._decisions is None else self._decided([Prediction(deep)])[0].token

    def prefilling(
        self, tokens: np.ndarray, head: bool, exits: bool = False, prefix: Prefix | None = None
    ) -> Waits[Prediction]:
        """See `prefill`. Between pieces others have a turn. What `prefix` has of the tokens is copied, not read."""
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
            self._prefill_piece(piece, head and last, last)
            if prefix is not None:
                prefix.keep(self.runners, self.slot)
            self.stats.prefill_seconds += perf_counter() - began
        if self._decisions is not None:
            self._decisions.begin(self, len(tokens))
        return self._calls.answer(0)._replace(confidence=self._calls.confidence[0] if head else None)

    def stepping(self, token: int, head: bool) -> tuple[SlotCall, ...]:
        """What the step of `step` needs: nothing where it was run ahead. `guess` then gives the prediction."""
        self._head = head
        calls = self._calls
        calls.token[0] = token
        self._step = call = (calls.asking if head else None) or calls.step(head, self._exits or head)
        return (call,)

    def guess(self) -> Prediction:
        """Count the step that ran, onto the stack: its prediction."""
        calls, call = self._calls, self._step
        assert call is not None
        self.stats.shallow_seconds += call.seconds
        self.batch_size = call.batch_size
        self._shallow.cache.extend(calls.slot, 1)
        calls.rows[self.stacked][:] = calls.newest
        self.stacked += 1
        return self._prediction() if self._head else NOTHING

    def stepping_together(self, tokens: Sequence[int]) -> tuple[SlotCall, ...]:
        """Shallow steps on several tokens as one call, onto the empty stack, without the head. `guesses` counts them
        then."""
        self._step = call = self._calls.steps_together(tokens, self._exits)
        return (call,)

    def guesses(self) -> list[Prediction]:
        """Count the steps that ran as one call: no prediction for each."""
        call = self._step
        assert call is not None
        self.stats.shallow_seconds += call.seconds
        self.batch_size = call.batch_size
        self._shallow.cache.extend(self._calls.slot, call.rows)
        self.stacked = call.rows
        return [NOTHING] * call.rows

    def syncing(self, heads: int, drafts: Sequence[int] = (), ahead: RunAhead | None = None) -> Iterable[Waiting]:
        """What the pass of `sync` needs. `answers` then gives the predictions."""
        self._heads, self._drafts = heads, len(drafts)
        self._pass = call = self._calls.sync(0, self.stacked, heads, drafts)
        if self.alone:
            call.run()
            return ()
        return (call,)

    def answers(self) -> list[Prediction]:
        """Count the sync pass that ran, and empty the stack: its predictions."""
        calls, call = self._calls, self._pass
        if call is not None:
            self._pass = None
            self.stats.count_pass(call.rows, call.seconds)
            self._deep.cache.extend(calls.slot, call.rows)
        self.stacked = 0
        deep = [calls.answer(row, row < self._drafts) for row in range(self._heads)]
        return deep if self._decisions is None else self._decided(deep)

    def _allow(self, exits: bool) -> None:
        if self._exits != exits:
            self._exits, self._calls.both = exits, None

    def _decided(self, deep: list[Prediction]) -> list[Prediction]:
        """In place of the predictions after the last rows of the deep cache."""
        assert self._decisions is not None
        return self._decisions.answers(self, self._deep.cache.lengths.item(self.slot) - len(deep), deep)

    def start_sync(self, least: int) -> None:
        """Begin a pass in the background over the stacked rows that no pass has seen, where they are at least `least`,
        the deep engine runs beside, and no pass is under way. It answers nothing; its rows stay stacked until `sync`.
        """

    @property
    def runners(self) -> tuple[Runner, Runner]:
        """The shallow and the deep one."""
        return self._shallow, self._deep

    def lengths(self) -> tuple[int, int]:
        """Valid positions of the shallow and of the deep cache."""
        return int(self._shallow.cache.lengths[self.slot]), int(self._deep.cache.lengths[self.slot])

    def _prediction(self) -> Prediction:
        """By the step that ran, which is counted."""
        calls = self._calls
        shallow: Prediction = tuple.__new__(Prediction, (calls.best[0], calls.confidence[0], None, calls.logits))
        if self._decisions is not None:
            shallow = self._decisions.guess(self, self._shallow.cache.lengths.item(calls.slot) - 1, shallow)
        return shallow

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_head: bool) -> None:
        calls, rows = self._calls, piece.shape[1]
        began = perf_counter()
        hidden = self._shallow.scratch("piece", (1, rows, self.hidden_size), np.float32)
        self._shallow.run(calls.bind(calls.piece(np.ascontiguousarray(piece), hidden, shallow_head, self._exits)))
        self._shallow.cache.extend(self.slot, rows)
        self._deep.run(calls.bind(calls.deep_piece(hidden, int(deep_head))))
        self._deep.cache.extend(self.slot, rows)
        if rows >= FEWEST_SHARED_ROWS:
            fit = rows * SHARED_PREFILL_SECONDS / max(perf_counter() - began, 1e-9)
            # The nearest whole blocks: the next below could be the same for ever, as more rows take less time each.
            self._shared_rows = max(round(fit / BLOCK) * BLOCK, FEWEST_SHARED_ROWS)
