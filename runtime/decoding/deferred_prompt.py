"""A prompt that the shallow engine alone has read: its states, kept until the deep engine needs them."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from runtime.decoding.slot import Slot
from runtime.decoding.slot_call import SlotCall, Waits
from runtime.engines.runner import Runner
from runtime.result import Stats


class DeferredPrompt:
    """Of the slot of `calls`. `pieces` float32 [1, k, d]: the states after layer S that the deep engine has yet to
    read, in order; that of the prompt's last token is not among them, but the first on the decoder's stack. `step` is
    what read that token, where it was not read by a step of its own: it ran, and is to be counted as one."""

    def __init__(self, shallow: Runner, deep: Runner, calls: Slot, hidden_size: int) -> None:
        self.pieces: list[np.ndarray] = []
        self.step: SlotCall | None = None
        self._shallow, self._deep, self._calls, self._hidden_size = shallow, deep, calls, hidden_size

    @property
    def rows(self) -> int:
        return sum(piece.shape[1] for piece in self.pieces)

    def clear(self) -> None:
        self.pieces, self.step = [], None

    def read(self, piece: np.ndarray, exits: bool, last: bool) -> None:
        """The shallow engine on tokens int64 [1, k], with the head where they are the `last` ones."""
        calls, rows = self._calls, piece.shape[1]
        hidden = np.zeros((1, rows, self._hidden_size), np.float32)
        call = calls.piece(np.ascontiguousarray(piece), hidden, last, exits)
        self._shallow.run(calls.bind(call))
        if last:
            calls.hidden[:] = hidden[0, -1]
            self.step, hidden = call, hidden[:, :-1]
        self._shallow.cache.extend(calls.slot, hidden.shape[1])
        self.pieces.append(hidden)

    def catching_up(self, stacked: int, heads: int, drafts: Sequence[int], stats: Stats) -> Waits[None]:
        """The deep engine on the pieces, the last together with the `stacked` rows. Others have a turn before each,
        but for the first of a prompt that was just read."""
        waits = stacked > 1
        while self.pieces:
            if waits:
                yield None
            waits, began = True, perf_counter()
            hidden = self.pieces.pop(0)
            whole = not self.pieces
            call = self._calls.joined(hidden, stacked, heads, drafts) if whole else self._calls.deep_piece(hidden, 0)
            self._deep.run(self._calls.bind(call))
            self._deep.cache.extend(self._calls.slot, call.rows)
            stats.prefill_seconds += perf_counter() - began
