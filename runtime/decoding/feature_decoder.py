"""Decoder whose exit is an engine of its own that reads features (docs/decoding.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.decoding.calls import NOTHING, Prediction, SlotCall, Waits
from runtime.decoding.decoder import PREFILL_ROWS, Decoder
from runtime.engines.kv_cache import FeatureCache
from runtime.engines.runner import Runner


class FeatureDecoder(Decoder):
    """Decoder whose exit is an engine of its own and reads a feature of the deep decoder.

    At each position the exit reads the state after the exit layer, and the feature of the previous
    position. That is the deep decoder's final normalized state or, until a deep pass computes it,
    the exit's own. The feature of a fused exit also has two earlier states of the deep decoder.

    The exit's cache may be shorter than the shallow one. It catches up, in one call, when a
    prediction is needed. A deep pass trims it to the rows that used the deep decoder's features,
    so drafted rows are computed again with the correct ones.

    An EAGLE-3 head does not read the first position, which has no feature before it. The cache
    counts that position without a call.

    If no layer precedes the exit, it embeds tokens itself. The shallow engine then has nothing to
    compute in a step, and embeds all stacked tokens in one call before a deep pass.
    """

    def __init__(self, *arguments: Any, exit: Runner, **others: Any) -> None:
        super().__init__(*arguments, **others)
        assert isinstance(exit.cache, FeatureCache)
        self.exit = self._exit = exit
        self._exit_cache = exit.cache
        feature_size = exit.cache.features.shape[2]
        size = (self.max_pending, feature_size)
        self._embeds = exit.cache.embeds
        self._length = 0
        # Stacked tokens that have not been embedded.
        self._unread = np.zeros((1, self.max_pending), np.int64)
        states: Any = np.zeros(self.max_pending, np.int64)
        if not self._embeds:
            states = exit.zeros((self.max_pending, self.hidden_size), np.float32)
        self._exit_inputs = states, exit.zeros(size, np.float32)
        self._feature = exit.zeros((1, feature_size), np.float32)
        self._passed = exit.zeros(size, np.float32)
        self._newest_feature = self._feature[0]
        self._read[exit] = {}
        self._past[exit] = {name: exit.value(view) for name, view in exit.cache.slot(self.slot)}

    def forget_calls(self) -> None:
        super().forget_calls()
        self._exit_calls: dict[int, SlotCall] = {}  # by rows, padded
        self._embeddings: dict[int, SlotCall] = {}  # by rows

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The shallow and the deep runner, and the exit's if later steps may use it."""
        return (*super().runners, self._exit) if self._exits else super().runners

    def lengths(self) -> tuple[int, int]:
        shallow, deep = super().lengths()
        return self._length if self._embeds else shallow, deep

    def trim(self, length: int) -> None:
        super().trim(length)
        self._exit_cache.trim(self.slot, length)
        self._length = min(self._length, length)

    # As coroutines

    def stepping(self, tokens: Sequence[int], head: bool) -> Waits[Prediction]:
        count = len(tokens)
        if self._embeds:
            # Stack tokens without embedding them.
            self._unread[0, self.stacked : self.stacked + count] = tokens
            states: Any = tokens
            place = self._length
            self._length += count
            self.stacked += count
        else:
            yield from super().stepping(tokens, False)
            states = self._stack[self.stacked - count : self.stacked]
            place = self.lengths()[0] - count
        if self._exits or head:
            self._exit_cache.put(self.slot, place, states)
        if not head:
            return NOTHING
        call = self._ask()
        if self.only_sequence:
            call.run()
        else:
            yield call
        self._count_exit(call)
        self.batch_size = call.batch_size
        return self.prediction()

    def syncing(self, heads: int, drafts: Sequence[int] = ()) -> Waits[list[Prediction]]:
        rows = self.stacked
        if self._embeds:
            call = self._embedding(rows)
            if self.only_sequence:
                call.run()
            else:
                yield call
            self.stats.shallow_seconds += call.seconds
            self._shallow.cache.extend(self.slot, rows)
        place = self.lengths()[1]
        found = yield from super().syncing(heads, drafts)
        if self._exits:
            self._keep_features(place, self._passed[:rows])
            # The row at `place` already used the deep decoder's feature.
            self._exit_cache.trim(self.slot, place + 1)
        return found

    def _ask(self) -> SlotCall:
        """Return the call of the exit on all unread rows, with a prediction after the last."""
        cache = self._exit_cache
        slot = self.slot
        end = self._length if self._embeds else self._shallow.cache.length(slot)
        first = cache.length(slot)
        if end - first > self.max_pending:
            self._catch_up(self.max_pending)
            first = end - self.max_pending
        states, features = self._exit_inputs
        rows = end - first
        states[:rows] = cache.states[slot, first:end]
        features[:rows] = cache.features[slot, first:end]
        width, _ = self._exit.padded(slot, rows, 1, self.max_pending)
        call = self._exit_calls.get(width)
        if call is None:
            call = self._exit_call_of((states[:width], features[:width]), 1)
            self._exit_calls[width] = call
        call.shrink(rows, 1)
        return call

    def _count_exit(self, call: SlotCall) -> None:
        """Count a call of the exit. Keep its feature if no deep pass has computed a newer one."""
        cache = self._exit_cache
        slot = self.slot
        self.stats.shallow_seconds += call.seconds
        cache.extend(slot, call.rows)
        end = cache.length(slot)
        if call.heads and end > self._deep.cache.length(slot):
            cache.features[slot, end] = self._newest_feature

    # Calls

    def _keep_features(self, place: int, features: np.ndarray) -> None:
        """Store the features of positions from `place` on."""
        self._exit_cache.features[self.slot, place + 1 : place + 1 + len(features)] = features

    def _catch_up(self, max_unread: int, head: bool = False) -> None:
        """Run the exit until at most `max_unread` unread rows are left.

        With `head`, compute the prediction at the last row.
        """
        cache = self._exit_cache
        slot = self.slot
        end = self.lengths()[0]
        while (missing := end - (first := cache.length(slot))) > max_unread:
            rows = min(PREFILL_ROWS, missing - max_unread)
            states: Any = np.zeros(rows, np.int64)
            if not self._embeds:
                states = self._exit.scratch("states", (rows, self.hidden_size), np.float32)
            size = rows, cache.features.shape[2]
            features = self._exit.scratch("features", size, np.float32)
            states[:] = cache.states[slot, first : first + rows]
            features[:] = cache.features[slot, first : first + rows]
            call = self._exit_call_of((states, features), int(head and rows == missing))
            call.seconds = self._exit.run(self.bind(call))
            self._count_exit(call)

    def _bound(self) -> list[SlotCall]:
        return [*super()._bound(), *self._exit_calls.values(), *self._embeddings.values()]

    def _exit_call_of(self, inputs: Sequence[np.ndarray], heads: int) -> SlotCall:
        """Create a call of the exit on states or tokens, and features float32 [k, f].

        The head runs on the last row if `heads` is 1, and on none if 0.
        """
        states, features = inputs
        outputs = {"token": self._best[:heads], "confidence": self._confidence[:heads]}
        outputs["feature"] = self._feature[:heads]
        if self._logits:
            outputs["logits"] = self._logits[self._shallow][:heads]
        given = {
            "input_ids" if self._embeds else "hidden": states[None],
            "features": features[None],
        }
        return SlotCall(self, self._exit, given, outputs=outputs, heads=heads)

    def _embedding(self, rows: int) -> SlotCall:
        """Return the shallow call on the stacked tokens."""
        call = self._embeddings.get(rows)
        if call is None:
            call = self._shallow_call(self._unread[:, :rows], self._stack[None, :rows], False)
            self._embeddings[rows] = call
        return call

    def _shallow_call(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> SlotCall:
        return SlotCall(
            self, self._shallow, {"input_ids": tokens}, outputs={"hidden": hidden}, heads=0
        )

    def _deep_call(self, hidden: np.ndarray, heads: int) -> SlotCall:
        call = super()._deep_call(hidden, heads)
        rows = hidden.shape[1]
        passed = (
            self._passed
            if rows <= self.max_pending
            else self._deep.scratch("passed", (rows, self._passed.shape[1]), np.float32)
        )
        call.outputs = {**call.outputs, "features": passed[None, :rows]}
        return call

    def _read_piece(
        self, piece: np.ndarray, shallow_head: bool, deep_heads: int
    ) -> tuple[SlotCall, SlotCall]:
        shallow, deep = super()._read_piece(piece, False, deep_heads)
        self._length = self.lengths()[1]
        if self._exits:
            place = self._length - piece.shape[1]
            self._exit_cache.put(
                self.slot, place, piece[0] if self._embeds else shallow.outputs["hidden"][0]
            )
            self._keep_features(place, deep.outputs["features"][0])
            if self._exit_cache.skips:
                self._confidence[:] = 0.0  # there is no prediction at a position that is skipped
            self._catch_up(0, shallow_head)
        return shallow, deep
