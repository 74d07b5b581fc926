"""Decoder that continues shallow steps while a deep pass runs, on two CUDA streams.

See docs/decoding.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

from runtime.decoding.calls import Prediction, Waits, finish
from runtime.decoding.decoder import Decoder
from runtime.engines.runner import Event


class OverlappingDecoder(Decoder):
    """Decoder whose deep passes run in parallel to shallow steps.

    Rows of a background pass count as stacked.
    """

    overlaps = True

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._started = 0  # stacked rows that a pass has read
        self._background: tuple[Event, int] | None = None  # background pass and its rows

    @property
    def in_background(self) -> bool:  # type: ignore[override]
        return self._background is not None

    def trim(self, length: int) -> None:
        if self._background is not None:
            with suppress(Exception):  # the error of a request that nobody waits for
                self._background[0].wait()
        self._started = 0
        self._background = None
        super().trim(length)

    def syncing(self, heads: int, drafts: Sequence[int] = ()) -> Waits[list[Prediction]]:
        if self._background is not None:
            yield from self._finish_background()
        self._background = self._begin(heads, drafts)
        yield from self._finish_background()
        self._started = 0
        self.stacked = 0
        return self._predictions(heads, len(drafts))

    def start_sync(self, min_rows: int) -> None:
        under_way = self._background is not None and not self._background[0].done()
        if not under_way and self.stacked - self._started >= min_rows:
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
