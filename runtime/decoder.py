"""One sequence at the two engines: its rows of the KV caches, its stack of pending tokens, its bound calls."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from runtime.engines.onnx import Call, OnnxEngine, value
from runtime.kv_cache import KVCache
from runtime.result import Stats

# Prompts are read in pieces: attention over a piece needs memory for rows x positions scores.
PREFILL_ROWS = 512


@dataclass(frozen=True, eq=False)
class Lane:
    """An engine and its KV cache."""

    engine: OnnxEngine
    cache: KVCache


class Decoder:
    """Invariant, until `drop_stack`: shallow length = deep length + stacked. `hidden_size` is d, `max_pending` the
    rows of the stack."""

    def __init__(self, shallow: Lane, deep: Lane, slot: int, hidden_size: int, max_pending: int) -> None:
        self.stats = Stats()
        self.stacked = 0
        self._shallow, self._deep, self._slot = shallow, deep, slot
        self._stack = np.zeros((max_pending, hidden_size), np.float32)
        self._hidden = np.zeros((1, 1, hidden_size), np.float32)
        self._token = np.zeros((1, 1), np.int64)
        self._guess, self._confidence = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._answer = np.zeros(1, np.int64)
        self._past = {lane: {name: value(view) for name, view in lane.cache.slot(slot)} for lane in (shallow, deep)}
        self._cross: dict[str, np.ndarray] = {}
        self._steps: dict[bool, Call] = {}
        self._syncs: dict[int, Call] = {}

    def reset(self) -> None:
        """Begin a new sequence."""
        self.stats = Stats()
        self.trim(0)

    def trim(self, length: int) -> None:
        """Forget all positions from `length` on, and what is stacked."""
        self.stacked = 0
        self._shallow.cache.trim(self._slot, length)
        self._deep.cache.trim(self._slot, length)

    def drop_stack(self) -> None:
        """Never show the deep decoder what is stacked: its cache stays behind for the rest of the sequence."""
        self.stacked = 0

    def attend(self, cross: dict[str, np.ndarray]) -> None:
        """Set what cross-attention reads: `cross.{layer}.key|value` [1, heads, E, head_dim] and `cross_lengths`."""
        self._cross = cross
        self._steps.clear()
        self._syncs.clear()

    def prefill(self, tokens: np.ndarray, head: bool) -> tuple[int, float | None]:
        """Both engines over the prompt, int64 [n]. The deep token after it, and the shallow confidence if `head`."""
        began = perf_counter()
        for start in range(0, len(tokens), PREFILL_ROWS):
            piece = tokens[None, start : start + PREFILL_ROWS]
            last = start + piece.shape[1] == len(tokens)
            self._prefill_piece(piece, head and last, last)
        self.stats.prefill_seconds += perf_counter() - began
        return int(self._answer[0]), float(self._confidence[0]) if head else None

    def step(self, token: int, head: bool) -> tuple[int, float | None]:
        """Shallow decoder on one token, onto the stack. Its prediction and confidence, if `head`."""
        if head not in self._steps:
            self._steps[head] = self._bind_shallow(self._token, self._hidden, head)
        self._token[0, 0] = token
        began = perf_counter()
        self._steps[head].run()
        self.stats.shallow_seconds += perf_counter() - began
        self._shallow.cache.extend(self._slot, 1)
        self._stack[self.stacked] = self._hidden[0, 0]
        self.stacked += 1
        return int(self._guess[0]), float(self._confidence[0]) if head else None

    def sync(self) -> int:
        """Deep decoder on all stacked tokens; the token it says comes after the newest."""
        rows = self.stacked
        if rows not in self._syncs:
            self._syncs[rows] = self._bind_deep(self._stack[None, :rows], True)
        began = perf_counter()
        self._syncs[rows].run()
        self.stats.deep_seconds += perf_counter() - began
        self.stats.sync_sizes[rows] += 1
        self._deep.cache.extend(self._slot, rows)
        self.stacked = 0
        return int(self._answer[0])

    def lengths(self) -> tuple[int, int]:
        """Valid positions of the shallow and of the deep cache."""
        return int(self._shallow.cache.lengths[self._slot]), int(self._deep.cache.lengths[self._slot])

    def _prefill_piece(self, piece: np.ndarray, shallow_head: bool, deep_head: bool) -> None:
        rows = piece.shape[1]
        hidden = np.empty((1, rows, self._stack.shape[1]), np.float32)
        self._bind_shallow(np.ascontiguousarray(piece), hidden, shallow_head).run()
        self._shallow.cache.extend(self._slot, rows)
        self._bind_deep(hidden, deep_head).run()
        self._deep.cache.extend(self._slot, rows)

    def _bind_shallow(self, tokens: np.ndarray, hidden: np.ndarray, head: bool) -> Call:
        """A shallow call on tokens [1, q]; `head` for its last row, or for none."""
        count = int(head)
        outputs = {"hidden": hidden, "token": self._guess[:count], "confidence": self._confidence[:count]}
        return self._bind(self._shallow, {"input_ids": tokens}, outputs, tokens.shape[1], count)

    def _bind_deep(self, hidden: np.ndarray, head: bool) -> Call:
        """A deep call on hidden states [1, k, d]; `head` for its last row, or for none."""
        count = int(head)
        inputs = {"hidden": hidden, "emitted": np.zeros(count, np.int64)}
        return self._bind(self._deep, inputs, {"token": self._answer[:count]}, hidden.shape[1], count)

    def _bind(
        self, lane: Lane, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray], rows: int, heads: int
    ) -> Call:
        past = self._past[lane]
        shared = {
            # The cache's own counter: the engine reads it where `extend` and `trim` write it.
            "past_lengths": lane.cache.lengths[self._slot : self._slot + 1],
            "query_lengths": np.array([rows], np.int32),
            "head_rows": np.arange(rows - heads, rows, dtype=np.int64),
        }
        layers = {name.split(".")[0] for name in past}
        cross = {n: v for n, v in self._cross.items() if n == "cross_lengths" or n.split(".")[1] in layers}
        return lane.engine.bind(
            {**inputs, **shared, **cross, **{f"past.{name}": item for name, item in past.items()}},
            {**outputs, **{f"present.{name}": item for name, item in past.items()}},
        )
