"""One sequence at the two engines: its rows of the KV caches, its stack of pending tokens, its bound calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

import numpy as np

from runtime.decoding.decisions import Decisions
from runtime.decoding.prediction import NOTHING, Prediction
from runtime.decoding.prefix import Prefix
from runtime.decoding.slot import Slot
from runtime.decoding.slot_call import SlotCall, Waiting, Waits, finish
from runtime.engines.runner import Event, Runner
from runtime.result import Stats

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512
# While other sequences decode: each piece keeps their next tokens waiting.
SHARED_PREFILL_ROWS = 128

# What to run the shallow decoder on next while a sync pass runs, given what it said on the token before (None at first)
# and the tokens that it has run ahead on. None: nothing more.
RunAhead = Callable[[Prediction | None, Sequence[int]], int | None]


class _Ahead(NamedTuple):
    """A shallow step taken before its turn, on a token that may turn out to be another."""

    token: int
    said: Prediction
    hidden: np.ndarray


class _Pass(NamedTuple):
    """A sync pass that runs beside."""

    event: Event
    rows: int


class Decoder:
    """Invariant, until `drop_stack`: shallow length = deep length + stacked + steps run ahead; the rows of a pass in
    the background count as stacked. `hidden_size` is d, `vocab_size` V, `max_pending` the rows of the stack.
    `company`: sequences in the last shallow call, this one included. `others`: whether other sequences wait while a
    piece of a prompt is read. `want_logits` makes predictions carry logits.

    `prefilling`, `stepping` and `syncing` give the engine calls that they need, so that those of several sequences can
    be run as one; `guess` and `answers` are what these said. `prefill`, `step` and `sync` run them at once.
    `decisions`: see there.
    """

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
        self.company, self.others = 1, False
        self.hidden_size, self.vocab_size, self._max_pending = hidden_size, vocab_size, max_pending
        self._shallow, self._deep = shallow, deep
        self._calls = Slot(shallow, deep, slot, hidden_size, vocab_size, max_pending)
        self._decisions = decisions
        self._step: SlotCall | None = None  # that was asked for last; None where it was run ahead
        self._head = self._exits = False
        self._asked = 0, 0  # heads and drafts of the last sync pass
        self._ahead: deque[_Ahead] = deque()
        self._started = 0
        self._pass: SlotCall | None = None  # that was asked for last, where it does not run beside
        self._background: _Pass | None = None

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
        """Forget all positions from `length` on, what is stacked and what was run ahead."""
        if self._background is not None:
            with suppress(Exception):  # a request that nobody waits for any more
                self._background.event.wait()
        self._started, self._background = 0, None
        self._ahead.clear()
        self.stacked = 0
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
        for lane in self.lanes:
            lane.cache.copy_rows(self.slot, other.slot)
            lane.cache.trim(self.slot, 0)
        self._calls.exchange(other._calls)

    @property
    def overlaps(self) -> bool:
        """Whether deep passes run beside shallow steps."""
        return self._deep.beside

    @property
    def in_background(self) -> bool:
        """Whether a deep pass may be running beside."""
        return self._background is not None

    def prefill(self, tokens: np.ndarray, head: bool, exits: bool = False) -> Prediction:
        """Both engines over the prompt, int64 [n]. The deep prediction, with the shallow confidence if `head`.

        `exits`: later steps may ask the head, so an exit's own layers are run for all rows from here on; with `head`
        they are anyway.
        """
        return finish(self.prefilling(tokens, head, exits))

    def step(self, token: int, head: bool) -> Prediction:
        """Shallow decoder on one token, onto the stack. Without `head` there is no prediction: token -1."""
        for call in self.stepping(token, head):
            call.run()
        return self.guess()

    def sync(self, heads: int = 1, drafts: Sequence[int] = (), ahead: RunAhead | None = None) -> list[Prediction]:
        """Deep decoder on all stacked tokens: its predictions after the newest `heads` of them, in order.

        `drafts` are the tokens taken after the first of these rows: their predictions carry `nll`. Where the deep lane
        runs beside, the shallow one runs `ahead` meanwhile; `step` takes from that what fits.
        """
        for waits in self.syncing(heads, drafts, ahead):
            if isinstance(waits, SlotCall):
                waits.run()
        return self.answers()

    def prefilling(
        self, tokens: np.ndarray, head: bool, exits: bool = False, prefix: Prefix | None = None
    ) -> Waits[Prediction]:
        """See `prefill`. Between pieces others have a turn. What `prefix` has of the tokens is copied, not read."""
        self._exits = exits or head
        start = 0
        while start < len(tokens):
            if start:
                yield None
            began = perf_counter()
            if prefix is not None:
                held = prefix.restore(self.lanes, self.slot, start)
                self.stats.cached_tokens += held - start
                start = held
            piece = tokens[None, start : start + (SHARED_PREFILL_ROWS if self.others else PREFILL_ROWS)]
            start += piece.shape[1]
            last = start == len(tokens)
            self._prefill_piece(piece, head and last, last)
            if prefix is not None:
                prefix.keep(self.lanes, self.slot)
            self.stats.prefill_seconds += perf_counter() - began
        if self._decisions is not None:
            self._decisions.begin(self, len(tokens))
        return self._calls.answer(0)._replace(confidence=self._calls.confidence[0] if head else None)

    def stepping(self, token: int, head: bool) -> tuple[SlotCall, ...]:
        """What the step of `step` needs: nothing where it was run ahead. `guess` then gives the prediction."""
        self._head = head
        if self._ahead:
            if self._ahead[0].token == token:
                self._step = None
                return ()
            self._drop_ahead()
        calls = self._calls
        calls.token[0] = token
        self._step = call = calls.steps.get((head, self._exits or head)) or calls.step(head, self._exits or head)
        return (call,)

    def guess(self) -> Prediction:
        """Count the step that ran, onto the stack: its prediction."""
        calls, call = self._calls, self._step
        if call is None:
            _, said, hidden = self._ahead.popleft()
            if not self._head:
                said = NOTHING
        else:
            self.stats.shallow_seconds += call.seconds
            self.company = call.company
            self._shallow.cache.extend(calls.slot, 1)
            said, hidden = self._said() if self._head else NOTHING, calls.newest
        calls.rows[self.stacked][:] = hidden
        self.stacked += 1
        return said

    def stepping_together(self, tokens: Sequence[int], head: bool) -> tuple[SlotCall, ...]:
        """Shallow steps on several tokens as one call, onto the empty stack; the head for the last. `guesses` says what
        came of them."""
        self._drop_ahead()
        self._head = head
        self._step = call = self._calls.steps_together(tokens, head, self._exits or head)
        return (call,)

    def guesses(self) -> list[Prediction]:
        """Count the steps that ran as one call: a prediction for each, of the last alone where the head ran."""
        call = self._step
        assert call is not None
        self.stats.shallow_seconds += call.seconds
        self.company = call.company
        self._shallow.cache.extend(self._calls.slot, call.rows)
        self.stacked = call.rows
        return [NOTHING] * (call.rows - 1) + [self._said() if self._head else NOTHING]

    def syncing(self, heads: int, drafts: Sequence[int] = (), ahead: RunAhead | None = None) -> Iterable[Waiting]:
        """What the pass of `sync` needs. `answers` then gives the predictions."""
        self._asked = heads, len(drafts)
        if self._deep.beside:
            return self._syncing_beside(heads, drafts, ahead)
        self._pass = call = self._deep_work(heads, drafts)
        return (call,)

    def answers(self) -> list[Prediction]:
        """Count the sync pass that ran, and empty the stack: its predictions."""
        call = self._pass
        if call is not None:
            self._pass = None
            self._deep_done(call.rows, call.seconds)
        self.stacked = self._started = 0
        heads, drafted = self._asked
        said = [self._calls.answer(row, row < drafted) for row in range(heads)]
        if self._decisions is not None:
            first = self._deep.cache.lengths.item(self.slot) - heads
            said = self._decisions.answers(self, first, said)
        return said

    @property
    def direct(self) -> bool:
        """Whether a token of mode full may be `direct_step`, `direct_pass` and `direct_answer`, each with the call that
        the one before gave run: the same as `stepping` and `syncing`, in fewer functions."""
        return not (self._deep.beside or self._decisions)

    def direct_step(self, token: int) -> SlotCall:
        """The step on a token, without the head. Nothing may be stacked."""
        calls = self._calls
        calls.token[0] = token
        self._step = call = calls.steps.get((False, self._exits)) or calls.step(False, self._exits)
        return call

    def direct_pass(self) -> SlotCall:
        """Count the step that ran: the pass over it."""
        calls, call = self._calls, self._step
        assert call is not None
        self.stats.shallow_seconds += call.seconds
        self.company = call.company
        self._shallow.cache.extend(calls.slot, 1)
        self._pass = call = calls.direct or calls.direct_pass()
        return call

    def direct_answer(self) -> Prediction:
        """Count the pass that ran: the deep prediction."""
        call, stats = self._pass, self.stats
        assert call is not None
        seconds = call.seconds
        self._pass = None
        stats.deep_seconds += seconds
        stats.sync_sizes[1] += 1
        stats.sync_seconds[1] = stats.sync_seconds.get(1, 0.0) + seconds
        self._deep.cache.extend(self._calls.slot, 1)
        return self._calls.answer(0)

    def _syncing_beside(self, heads: int, drafts: Sequence[int], ahead: RunAhead | None) -> Waits[None]:
        if self._background is not None:
            yield from self._finish_background()
        work = self._deep_work(heads, drafts)
        self._background = _Pass(work.submit(), work.rows)
        if ahead is not None:
            self._run_ahead(self._background.event, ahead)
        yield from self._finish_background()

    def start_sync(self, least: int) -> None:
        """Begin a pass in the background over the stacked rows that no pass has seen, where they are at least `least`,
        the deep lane runs beside, and none is under way. It answers nothing; its rows stay stacked until `sync`."""
        under_way = self._background is not None and not self._background.event.done()
        if self._deep.beside and not under_way and self.stacked - self._started >= least:
            if self._background is not None:
                finish(self._finish_background())
            work = self._deep_work(heads=0, drafts=())
            self._background = _Pass(work.submit(), work.rows)

    @property
    def lanes(self) -> tuple[Runner, Runner]:
        """The shallow and the deep one."""
        return self._shallow, self._deep

    def lengths(self) -> tuple[int, int]:
        """Valid positions of the shallow and of the deep cache."""
        return int(self._shallow.cache.lengths[self.slot]), int(self._deep.cache.lengths[self.slot])

    def _said(self) -> Prediction:
        """By the step that ran, which is counted."""
        calls = self._calls
        said: Prediction = tuple.__new__(Prediction, (calls.said[0], calls.confidence[0], None, calls.logits))
        if self._decisions is not None:
            said = self._decisions.guess(self, self._shallow.cache.lengths.item(calls.slot) - 1, said)
        return said

    def _deep_work(self, heads: int, drafts: Sequence[int]) -> SlotCall:
        """The deep decoder on the stacked rows that it has not seen."""
        work = self._calls.sync(self._started, self.stacked, heads, drafts)
        self._started = self.stacked
        self.stats.sync_sizes[work.rows] += 1
        return work

    def _deep_done(self, rows: int, seconds: float) -> None:
        self.stats.deep_seconds += seconds
        self.stats.sync_seconds[rows] = self.stats.sync_seconds.get(rows, 0.0) + seconds
        self._deep.cache.extend(self._calls.slot, rows)

    def _finish_background(self) -> Waits[None]:
        assert self._background is not None
        event, rows = self._background
        began = perf_counter()
        if not event.done():
            yield event
        self._background = None
        seconds = event.wait()
        self.stats.overlapped_seconds += max(0.0, seconds - (perf_counter() - began))
        self._deep_done(rows, seconds)

    def _run_ahead(self, running: Event, ahead: RunAhead) -> None:
        tokens: list[int] = []
        said: Prediction | None = None
        while not running.done() and len(tokens) < self._max_pending:
            token = ahead(said, tokens)
            if token is None:
                return
            self._calls.token[0] = token
            work = self._calls.step(head=True, exits=True)
            work.run()
            self.stats.shallow_seconds += work.seconds
            self._shallow.cache.extend(self.slot, 1)
            said = self._said()
            # The buffers are overwritten by the next step.
            logits = None if said.logits is None else said.logits.copy()
            self._ahead.append(_Ahead(token, said._replace(logits=logits), self._calls.hidden.copy()))
            tokens.append(token)

    def _drop_ahead(self) -> None:
        if not self._ahead:
            return
        shallow, _ = self.lengths()
        self._shallow.cache.trim(self.slot, shallow - len(self._ahead))
        self._ahead.clear()

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_head: bool) -> None:
        calls, rows = self._calls, piece.shape[1]
        hidden = self._shallow.scratch("piece", (1, rows, self.hidden_size), np.float32)
        self._shallow.run(calls.bind(calls.piece(np.ascontiguousarray(piece), hidden, shallow_head, self._exits)))
        self._shallow.cache.extend(self.slot, rows)
        self._deep.run(calls.bind(calls.deep_piece(hidden, int(deep_head))))
        self._deep.cache.extend(self.slot, rows)
