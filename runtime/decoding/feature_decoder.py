"""A decoder whose exit is an engine of its own, which reads a feature of the deep decoder (docs/decoding.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.decoding.calls import NOTHING, Prediction, RunAhead, SlotCall, Waiting
from runtime.decoding.decoder import PREFILL_ROWS, Decoder
from runtime.engines.kv_cache import FeatureCache
from runtime.engines.runner import Runner


class FeatureDecoder(Decoder):
    """At a position the `exit` reads the state after the exit layer, and the feature that the position before left: the
    deep decoder's final normed state, or until a sync pass gives that, the exit's own.

    Its cache may be behind the shallow one. It is caught up, with one call, where a prediction is wanted. A sync pass
    trims it to the rows that had the deep decoder's features: what was drafted is then read again with the right ones.

    Where no layer stands before the exit it embeds tokens itself. The shallow engine then has nothing to do in a step,
    and embeds what is stacked, with one call, before a sync pass.
    """

    def __init__(self, *arguments: Any, exit: Runner, **others: Any) -> None:
        super().__init__(*arguments, **others)
        assert isinstance(exit.cache, FeatureCache)
        self.exit = self._exit = exit
        self._exit_cache = exit.cache
        size = (self.max_pending, self.hidden_size)
        self._embeds = exit.cache.states.ndim == 2
        self._length = 0
        self._unread = np.zeros(
            (1, self.max_pending), np.int64
        )  # tokens that are stacked, and not embedded
        self._exit_inputs = self._states(self.max_pending), exit.zeros(size, np.float32)
        self._feature = np.zeros((1, self.hidden_size), np.float32)
        self._passed = exit.zeros(size, np.float32)
        self._newest_feature = self._feature[0]
        self._read[exit] = {}
        self._past[exit] = {name: exit.value(view) for name, view in exit.cache.slot(self.slot)}

    def forget_calls(self) -> None:
        super().forget_calls()
        self._exit_calls: dict[int, SlotCall] = {}  # by rows
        self._embeddings: dict[int, SlotCall] = {}  # by rows

    @property
    def runners(self) -> tuple[Runner, ...]:
        """The shallow and the deep one, and the exit's where later steps may ask it."""
        return (*super().runners, self._exit) if self._exits else super().runners

    def lengths(self) -> tuple[int, int]:
        shallow, deep = super().lengths()
        return self._length if self._embeds else shallow, deep

    def trim(self, length: int) -> None:
        super().trim(length)
        self._exit_cache.trim(self.slot, length)
        self._length = min(self._length, length)

    # At once

    def step(self, token: int, head: bool) -> Prediction:
        if self._embeds and head:  # the same in fewer functions
            self._keep((token,), head)
            self._head = head
            call = self._ask()
            call.run()
            self._asked(call)
            self.batch_size = 1
            return self.prediction()
        for call in self.stepping(token, head):
            call.run()
        return self.guess()

    def full_step(self, token: int) -> int:
        deep = super().full_step(token)
        self._length += 1
        if self._exits:
            place = self.lengths()[1] - 1
            self._exit_cache.put(self.slot, place, [token] if self._embeds else self._hidden[0])
            self._keep_features(place, self._passed[:1])
        return deep

    # As the engine calls that are needed

    def stepping(self, token: int, head: bool) -> Iterator[SlotCall]:  # type: ignore[override]
        if self._embeds:
            return self._keeping((token,), head)
        return self._stepping(super().stepping(token, False), head)

    def stepping_together(  # type: ignore[override]
        self, tokens: Sequence[int], head: bool = False
    ) -> Iterator[SlotCall]:
        if self._embeds:
            return self._keeping(tokens, head)
        if len(tokens) == 1:
            return self.stepping(tokens[0], head)
        return self._stepping(super().stepping_together(tokens), head)

    def syncing(
        self, heads: int, drafts: Sequence[int] = (), ahead: RunAhead | None = None
    ) -> Iterator[Waiting]:
        if self._embeds:
            call = self._embedding(self.stacked)
            if self.alone:
                call.run()
            else:
                yield call
            self.stats.shallow_seconds += call.seconds
            self._shallow.cache.extend(self.slot, call.rows)
        yield from super().syncing(heads, drafts, ahead)

    def _keep(self, tokens: Sequence[int], head: bool) -> None:
        """Stack tokens as they are."""
        count = len(tokens)
        if count == 1:
            self._unread[0, self.stacked] = tokens[0]
        else:
            self._unread[0, self.stacked : self.stacked + count] = tokens
        if self._exits or head:
            self._exit_cache.put(self.slot, self._length, tokens)
        self._length += count
        self.stacked += count

    def _keeping(self, tokens: Sequence[int], head: bool) -> Iterator[SlotCall]:
        """Stack tokens, and with `head` one call of the exit."""
        self._keep(tokens, head)
        return self._asking(head)

    def _stepping(self, calls: Iterable[SlotCall], head: bool) -> Iterator[SlotCall]:
        """The shallow call, and with `head` one of the exit. Each is counted once it ran."""
        for call in calls:
            yield call
            super().guess()
            if self._exits or head:
                place = self.lengths()[0] - call.rows
                rows = self._stack[self.stacked - call.rows : self.stacked]
                self._exit_cache.put(self.slot, place, rows)
        yield from self._asking(head)

    def _asking(self, head: bool) -> Iterator[SlotCall]:
        """The call of the exit, with `head`; counted once it ran."""
        self._head = head
        if head:
            call = self._ask()
            yield call
            self._asked(call)
            self.batch_size = call.batch_size

    def _ask(self) -> SlotCall:
        """The call of the exit on all that it has not read, with a prediction after the last."""
        cache = self._exit_cache
        slot = self.slot
        end = self.lengths()[0]
        first = cache.length(slot)
        if end - first > self.max_pending:
            self._catch_up(self.max_pending)
            first = end - self.max_pending
        states, features = self._exit_inputs
        states[: end - first] = cache.states[slot, first:end]
        features[: end - first] = cache.features[slot, first:end]
        self._step = call = self._exit_calls.get(end - first) or self._exit_call(end - first)
        return call

    def _asked(self, call: SlotCall) -> None:
        """Count the call of the exit that ran. Where no sync pass was, its feature is the newest there is."""
        cache = self._exit_cache
        slot = self.slot
        self.stats.shallow_seconds += call.seconds
        cache.extend(slot, call.rows)
        end = cache.length(slot)
        if call.heads and end > self._deep.cache.length(slot):
            cache.features[slot, end] = self._newest_feature

    def guess(self) -> Prediction:
        """The prediction of the steps that ran, and were counted."""
        return self.prediction() if self._head else NOTHING

    def answers(self) -> list[Prediction]:
        call = self._pass
        place = self.lengths()[1]
        found = super().answers()
        if self._exits and call is not None:
            self._keep_features(place, self._passed[: call.rows])
            # The first row of the stack had the deep decoder's feature already.
            self._exit_cache.trim(self.slot, place + 1)
        return found

    # Calls

    def _states(self, rows: int) -> np.ndarray:
        """Room for what the exit reads at so many positions beside features."""
        states: np.ndarray = np.zeros(
            (rows, *self._exit_cache.states.shape[2:]), self._exit_cache.states.dtype
        )
        return states

    def _keep_features(self, place: int, features: np.ndarray) -> None:
        """Keep what the positions from `place` on left."""
        self._exit_cache.features[self.slot, place + 1 : place + 1 + len(features)] = features

    def _catch_up(self, most: int, head: bool = False) -> None:
        """Let the exit read until at most so many rows are left, at once; and with `head` give a prediction at the
        last."""
        cache = self._exit_cache
        slot = self.slot
        end = self.lengths()[0]
        while (behind := end - (first := cache.length(slot))) > most:
            rows = min(PREFILL_ROWS, behind - most)
            inputs = self._states(rows), np.array(cache.features[slot, first : first + rows])
            inputs[0][:] = cache.states[slot, first : first + rows]
            call = self._exit_call_of(inputs, int(head and rows == behind))
            call.seconds = self._exit.run(self.bind(call))
            self._asked(call)

    def _bound(self) -> list[SlotCall]:
        return [*super()._bound(), *self._exit_calls.values(), *self._embeddings.values()]

    def _exit_call(self, rows: int) -> SlotCall:
        """The exit on the first rows of `_exit_inputs`, to be kept."""
        inputs = tuple(array[:rows] for array in self._exit_inputs)
        call = self._exit_calls[rows] = self._exit_call_of(inputs, 1)
        return call

    def _exit_call_of(self, inputs: Sequence[np.ndarray], heads: int) -> SlotCall:
        """The exit on states or tokens, and features float32 [k, d]; the head for its last row, or for none."""
        states, features = inputs
        outputs = {"token": self._best[:heads], "confidence": self._confidence[:heads]}
        outputs["feature"] = self._feature[:heads]
        if self._logits:
            outputs["logits"] = self._logits[self._shallow][:heads]
        given = {
            "input_ids" if self._embeds else "hidden": states[None],
            "features": features[None],
        }
        return SlotCall(self, self._exit, given, outputs, len(states), heads)

    def _embedding(self, rows: int) -> SlotCall:
        """The shallow engine on the stacked tokens."""
        call = self._embeddings.get(rows)
        if call is None:
            call = self._shallow_call(self._unread[:, :rows], self._stack[None, :rows], False)
            self._embeddings[rows] = call
        return call

    def _shallow_call(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> SlotCall:
        return SlotCall(
            self, self._shallow, {"input_ids": tokens}, {"hidden": hidden}, tokens.shape[1], 0
        )

    def _deep_call(self, hidden: np.ndarray, heads: int) -> SlotCall:
        call = super()._deep_call(hidden, heads)
        rows = hidden.shape[1]
        passed = (
            self._passed
            if rows <= self.max_pending
            else self._deep.scratch("passed", hidden.shape[1:], np.float32)
        )
        call.outputs = {**call.outputs, "features": passed[None, :rows]}
        return call

    def _read_piece(
        self, piece: np.ndarray, shallow_head: bool, deep_head: bool
    ) -> tuple[SlotCall, SlotCall]:
        shallow, deep = super()._read_piece(piece, False, deep_head)
        self._length = self.lengths()[1]
        if self._exits:
            place = self._length - piece.shape[1]
            self._exit_cache.put(
                self.slot, place, piece[0] if self._embeds else shallow.outputs["hidden"][0]
            )
            self._keep_features(place, deep.outputs["features"][0])
            self._catch_up(0, shallow_head)
        return shallow, deep
