"""Decoder that continues shallow steps while a deep pass runs, on two CUDA streams.

See docs/decoding.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from runtime.decoding.calls import NOTHING, Prediction, RunAhead, SlotCall, Waiting, Waits, finish
from runtime.decoding.decoder import Decoder
from runtime.engines.runner import Event


class _Ahead(NamedTuple):
    """A shallow step run ahead of its turn, on a token that may turn out to be wrong."""

    token: int
    prediction: Prediction
    hidden: np.ndarray


class OverlappingDecoder(Decoder):
    """Decoder whose deep passes run in parallel to shallow steps.

    Invariant, until `drop_stack`: shallow length = deep length + stacked + steps run ahead. Rows of
    a background pass count as stacked. With `run_ahead`, shallow steps continue while they wait for
    a deep pass, on predicted tokens.
    """

    overlaps = True

    def __init__(self, *arguments: Any, run_ahead: bool = False, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._runs_ahead = run_ahead
        self._ahead: deque[_Ahead] = deque()
        # Hidden states of `_ahead`, in order. They are preallocated because allocating and freeing
        # device memory synchronizes with the device.
        rows = self.max_pending if run_ahead else 0
        self._ahead_hidden = self._shallow.zeros((rows, self.hidden_size), np.float32)
        self._started = 0  # stacked rows that a pass has read
        self._background: tuple[Event, int] | None = None  # background pass and its rows

    @property
    def in_background(self) -> bool:  # type: ignore[override]
        return self._background is not None

    def trim(self, length: int) -> None:
        """Drop all positions from `length` on, the stack, and the steps run ahead."""
        if self._background is not None:
            with suppress(Exception):  # the error of a request that nobody waits for
                self._background[0].wait()
        self._started = 0
        self._background = None
        self._ahead.clear()
        super().trim(length)

    def stepping(self, token: int, head: bool) -> tuple[SlotCall, ...]:
        if self._ahead and self._ahead[0].token == token:
            self._step = None
            self._head = head
            return ()
        self._drop_ahead()
        return super().stepping(token, head)

    def full_step(self, token: int) -> int:
        self.step(token, head=False)
        return self.sync()[0].token

    def shallow_prediction(self) -> Prediction:
        if self._step is not None:
            return super().shallow_prediction()
        _, prediction, hidden = self._ahead.popleft()
        self._rows[self.stacked][:] = hidden
        self.stacked += 1
        return prediction if self._head else NOTHING

    def stepping_together(self, tokens: Sequence[int], head: bool = False) -> tuple[SlotCall, ...]:
        if len(tokens) > 1:
            self._drop_ahead()
        return super().stepping_together(tokens, head)

    def syncing(
        self, heads: int, drafts: Sequence[int] = (), ahead: RunAhead | None = None
    ) -> Iterable[Waiting]:
        self._heads = heads
        self._drafts = len(drafts)
        if self._background is not None:
            yield from self._finish_background()
        self._background = self._begin(heads, drafts)
        if self._runs_ahead and ahead is not None and not self._ahead:
            self._run_ahead(self._background[0], ahead)
        yield from self._finish_background()

    def deep_predictions(self) -> list[Prediction]:
        self._started = 0
        return super().deep_predictions()

    def start_sync(self, least: int) -> None:
        under_way = self._background is not None and not self._background[0].done()
        if not under_way and self.stacked - self._started >= least:
            if self._background is not None:
                finish(self._finish_background())
            self._background = self._begin(heads=0, drafts=())

    def _begin(self, heads: int, drafts: Sequence[int]) -> tuple[Event, int]:
        call = self._pass_call(self._started, self.stacked, heads, drafts)
        self._started = self.stacked
        return call.submit(), call.rows

    def _finish_background(self) -> Waits[None]:
        assert self._background is not None
        event, rows = self._background
        began = perf_counter()
        if not event.done():
            yield event
        self._background = None
        seconds = event.wait()
        self.stats.overlapped_seconds += max(0.0, seconds - (perf_counter() - began))
        self.stats.count_pass(rows, seconds)
        self._deep.cache.extend(self.slot, rows)

    def _run_ahead(self, running: Event, ahead: RunAhead) -> None:
        tokens: list[int] = []
        prediction: Prediction | None = None
        while not running.done() and len(tokens) < self.max_pending:
            token = ahead(prediction, tokens)
            if token is None:
                return
            self._token[0] = token
            call = self._step_call(head=True)
            call.run()
            self.stats.shallow_seconds += call.seconds
            self._shallow.cache.extend(self.slot, 1)
            prediction = self.prediction()
            # The buffers are overwritten by the next step.
            logits = None if prediction.logits is None else prediction.logits.copy()
            hidden = self._ahead_hidden[len(tokens)]
            hidden[:] = self._hidden[0, 0]
            self._ahead.append(_Ahead(token, prediction._replace(logits=logits), hidden))
            tokens.append(token)

    def _drop_ahead(self) -> None:
        if self._ahead:
            self._shallow.cache.trim(self.slot, self.lengths()[0] - len(self._ahead))
            self._ahead.clear()
