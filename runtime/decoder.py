"""One sequence at the two engines: its rows of the KV caches, its stack of pending tokens, its bound calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from runtime.engines.onnx import Call, value
from runtime.lane import Event, Lane
from runtime.result import Stats
from runtime.work import Waits, Work, finish

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512


class Prediction(NamedTuple):
    """What a decoder says comes after a row: its arg max; `confidence` of the shallow decoder in [0, 1], None where its
    head did not run; `nll` in nats of the token that was drafted there, of the deep decoder; `logits` float32 [V] where
    they were asked for: a view, valid until the same engine's next call."""

    token: int
    confidence: float | None = None
    nll: float | None = None
    logits: np.ndarray | None = None


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
    `want_logits` makes predictions carry logits.

    `prefilling`, `stepping` and `syncing` are coroutines that yield the engine calls they need, so that those of
    several sequences can be run as one; `prefill`, `step` and `sync` run them at once."""

    def __init__(
        self, shallow: Lane, deep: Lane, slot: int, hidden_size: int, vocab_size: int, max_pending: int
    ) -> None:
        self.stats = Stats()
        self.stacked = 0
        self.slot = slot
        self._shallow, self._deep = shallow, deep
        self.hidden_size, self.vocab_size, self._max_pending = hidden_size, vocab_size, max_pending
        self._stack = np.zeros((max_pending, hidden_size), np.float32)
        self._rows = np.zeros((max_pending, hidden_size), np.float32)
        self._ahead: deque[_Ahead] = deque()
        self._started = 0
        self._background: _Pass | None = None
        self._hidden = np.zeros((1, 1, hidden_size), np.float32)
        self._token = np.zeros((1, 1), np.int64)
        self._guess, self._confidence = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._answers, self._nll = np.zeros(max_pending, np.int64), np.zeros(max_pending, np.float32)
        self._drafted = np.zeros(max_pending, np.int64)
        self._logits: dict[Lane, np.ndarray] = {}
        self._past = {lane: {name: value(view) for name, view in lane.cache.slot(slot)} for lane in (shallow, deep)}
        self.cross: dict[str, np.ndarray] = {}
        self._steps: dict[bool, Work] = {}
        self._syncs: dict[tuple[int, int], Work] = {}

    def reset(self) -> None:
        """Begin a new sequence."""
        self.stats = Stats()
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
        self.cross = cross
        self._forget_work()

    def want_logits(self, wanted: bool) -> None:
        """Whether predictions carry logits: they are copied out of the engines only then."""
        if wanted == bool(self._logits):
            return
        rows = {self._shallow: 1, self._deep: self._max_pending} if wanted else {}
        self._logits = {lane: np.zeros((count, self.vocab_size), np.float32) for lane, count in rows.items()}
        self._forget_work()

    def move(self, other: Decoder) -> None:
        """Take the place of `other`, which is free, and leave it this one's."""
        for lane in self.lanes:
            lane.cache.copy_rows(self.slot, other.slot)
            lane.cache.trim(self.slot, 0)
        self.slot, other.slot = other.slot, self.slot
        self._past, other._past = other._past, self._past
        for decoder in (self, other):
            for work in (*decoder._steps.values(), *decoder._syncs.values()):
                work.forget()

    @property
    def in_background(self) -> bool:
        """Whether a deep pass may be running beside."""
        return self._background is not None

    def prefill(self, tokens: np.ndarray, head: bool) -> Prediction:
        """Both engines over the prompt, int64 [n]. The deep prediction, with the shallow confidence if `head`."""
        return finish(self.prefilling(tokens, head))

    def step(self, token: int, head: bool) -> Prediction:
        """Shallow decoder on one token, onto the stack. Without `head` there is no prediction: token -1."""
        return finish(self.stepping(token, head))

    def sync(self, heads: int = 1, drafts: Sequence[int] = (), ahead: RunAhead | None = None) -> list[Prediction]:
        """Deep decoder on all stacked tokens: its predictions after the newest `heads` of them, in order.

        `drafts` are the tokens taken after the first of these rows: their predictions carry `nll`. Where the deep lane
        runs beside, the shallow one runs `ahead` meanwhile; `step` takes from that what fits.
        """
        return finish(self.syncing(heads, drafts, ahead))

    def prefilling(self, tokens: np.ndarray, head: bool) -> Waits[Prediction]:
        """See `prefill`. Between pieces others have a turn."""
        for start in range(0, len(tokens), PREFILL_ROWS):
            if start:
                yield None
            began = perf_counter()
            piece = tokens[None, start : start + PREFILL_ROWS]
            last = start + piece.shape[1] == len(tokens)
            self._prefill_piece(piece, head and last, last)
            self.stats.prefill_seconds += perf_counter() - began
        return self._answer(0)._replace(confidence=self._sureness(head))

    def stepping(self, token: int, head: bool) -> Waits[Prediction]:
        """See `step`."""
        if self._ahead and self._ahead[0].token == token:
            _, said, hidden = self._ahead.popleft()
            said = said if head else Prediction(-1)
        else:
            self._drop_ahead()
            said = yield from self._shallow_step(token, head)
            hidden = self._hidden[0, 0]
        self._stack[self.stacked] = hidden
        self.stacked += 1
        return said

    def syncing(self, heads: int, drafts: Sequence[int], ahead: RunAhead | None) -> Waits[list[Prediction]]:
        """See `sync`."""
        yield from self._finish_background()
        work = self._deep_work(heads, drafts)
        if self._deep.beside:
            self._background = _Pass(work.submit(), work.rows)
            if ahead is not None:
                self._run_ahead(self._background.event, ahead)
            yield from self._finish_background()
        else:
            yield work
            self._deep_done(work.rows, work.seconds)
        self.stacked = self._started = 0
        return [self._answer(row, row < len(drafts)) for row in range(heads)]

    def start_sync(self, least: int) -> None:
        """Begin a pass in the background over the stacked rows that no pass has seen, where they are at least `least`,
        the deep lane runs beside, and none is under way. It answers nothing; its rows stay stacked until `sync`."""
        under_way = self._background is not None and not self._background.event.done()
        if self._deep.beside and not under_way and self.stacked - self._started >= least:
            finish(self._finish_background())
            work = self._deep_work(heads=0, drafts=())
            self._background = _Pass(work.submit(), work.rows)

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """The shallow and the deep one."""
        return self._shallow, self._deep

    def lengths(self) -> tuple[int, int]:
        """Valid positions of the shallow and of the deep cache."""
        return int(self._shallow.cache.lengths[self.slot]), int(self._deep.cache.lengths[self.slot])

    def _shallow_step(self, token: int, head: bool) -> Waits[Prediction]:
        if head not in self._steps:
            self._steps[head] = self._shallow_work(self._token, self._hidden, head)
        self._token[0, 0] = token
        work = self._steps[head]
        yield work
        self.stats.shallow_seconds += work.seconds
        self._shallow.cache.extend(self.slot, 1)
        logits = self._logits.get(self._shallow) if head else None
        guess = int(self._guess[0]) if head else -1
        return Prediction(guess, self._sureness(head), logits=None if logits is None else logits[0])

    def _deep_work(self, heads: int, drafts: Sequence[int]) -> Work:
        """The deep decoder on the stacked rows that it has not seen."""
        rows = self.stacked - self._started
        if (rows, heads) not in self._syncs:
            self._syncs[rows, heads] = self._deep_rows(self._rows[None, :rows], heads)
        self._rows[:rows] = self._stack[self._started : self.stacked]
        self._drafted[: len(drafts)] = drafts
        self._started = self.stacked
        self.stats.sync_sizes[rows] += 1
        return self._syncs[rows, heads]

    def _deep_done(self, rows: int, seconds: float) -> None:
        self.stats.deep_seconds += seconds
        self._deep.cache.extend(self.slot, rows)

    def _finish_background(self) -> Waits[None]:
        if self._background is None:
            return
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
            said = finish(self._shallow_step(token, head=True))
            # The buffers are overwritten by the next step.
            logits = None if said.logits is None else said.logits.copy()
            self._ahead.append(_Ahead(token, said._replace(logits=logits), self._hidden[0, 0].copy()))
            tokens.append(token)

    def _drop_ahead(self) -> None:
        if self._ahead:
            shallow, _ = self.lengths()
            self._shallow.cache.trim(self.slot, shallow - len(self._ahead))
            self._ahead.clear()

    def _sureness(self, head: bool) -> float | None:
        return float(self._confidence[0]) if head else None

    def _answer(self, row: int, drafted: bool = False) -> Prediction:
        logits = self._logits.get(self._deep)
        return Prediction(
            int(self._answers[row]),
            nll=float(self._nll[row]) if drafted else None,
            logits=None if logits is None else logits[row],
        )

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_head: bool) -> None:
        rows = piece.shape[1]
        hidden = np.empty((1, rows, self.hidden_size), np.float32)
        self.bind(self._shallow_work(np.ascontiguousarray(piece), hidden, shallow_head)).run()
        self._shallow.cache.extend(self.slot, rows)
        self.bind(self._deep_rows(hidden, int(deep_head))).run()
        self._deep.cache.extend(self.slot, rows)

    def _forget_work(self) -> None:
        self._steps.clear()
        self._syncs.clear()

    def _shallow_work(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> Work:
        """The shallow decoder on tokens [1, q]; `head` for its last row, or for none."""
        count = int(head)
        outputs = {"hidden": hidden, "token": self._guess[:count], "confidence": self._confidence[:count]}
        return self._work(self._shallow, {"input_ids": tokens}, outputs, tokens.shape[1], count)

    def _deep_rows(self, hidden: np.ndarray, heads: int) -> Work:
        """The deep decoder on hidden states [1, k, d]; the head for its last `heads` rows."""
        inputs = {"hidden": hidden, "emitted": self._drafted[:heads]}
        outputs = {"token": self._answers[:heads], "nll": self._nll[:heads]}
        return self._work(self._deep, inputs, outputs, hidden.shape[1], heads)

    def _work(self, lane: Lane, inputs: Mapping[str, Any], outputs: Mapping[str, Any], rows: int, heads: int) -> Work:
        logits = {"logits": self._logits[lane][:heads]} if self._logits else {}
        return Work(self, lane, inputs, {**outputs, **logits}, rows, heads)

    def bind(self, work: Work) -> Call:
        """A call of this sequence alone."""
        lane, rows, past = work.lane, work.rows, self._past[work.lane]
        shared = {
            # The cache's own counter: the engine reads it where `extend` and `trim` write it.
            "past_lengths": lane.cache.lengths[self.slot : self.slot + 1],
            "query_lengths": np.array([rows], np.int32),
            "head_rows": np.arange(rows - work.heads, rows, dtype=np.int64),
        }
        layers = {name.split(".")[0] for name in past}
        cross = {n: v for n, v in self.cross.items() if n == "cross_lengths" or n.split(".")[1] in layers}
        return lane.engine.bind(
            {**work.inputs, **shared, **cross, **{f"past.{name}": item for name, item in past.items()}},
            {**work.outputs, **{f"present.{name}": item for name, item in past.items()}},
        )
