"""The rows of one beam search at the two engines: a row a beam, in caches of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.decoding.decoder import Decoder
from runtime.decoding.slot_call import Waits
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call
from runtime.engines.runner import Runner

# Positions that the caches begin with, and grow from: an engine call takes as long as all their positions do.
FIRST_ROWS = 32


class BeamRows:
    """Borrows the engines of a `decoder`, and what its cross-attention reads. At most `rows` positions a beam."""

    def __init__(self, decoder: Decoder, cross: dict[str, np.ndarray], beams: int, rows: int) -> None:
        self.stats = decoder.stats
        self._rows, self._runners = rows, decoder.runners
        self._tokens = np.zeros((beams, 1), np.int64)
        self._emitted, self._every = np.zeros(beams, np.int64), np.arange(beams)
        self._hidden = decoder.runners[0].zeros((beams, 1, decoder.hidden_size), np.float32)
        self._logits = np.zeros((beams, decoder.vocab_size), np.float32)
        self._cross = {name: _repeated(array, beams, decoder.runners[0]) for name, array in cross.items()}
        self._caches = [runner.cache.resized(beams, min(rows, FIRST_ROWS)) for runner in decoder.runners]
        self._bind()

    def stepping(self, tokens: np.ndarray, sources: np.ndarray) -> Waits[np.ndarray]:
        """Row i goes on from former row `sources[i]` with `tokens[i]`: logits float32 [B, V], valid until the next."""
        if self._caches[0].lengths[0] >= self._caches[0].rows:
            self._grow()
        for cache in self._caches:
            cache.gather(sources)
        self._tokens[:, 0] = tokens
        self.stats.shallow_seconds += self._runners[0].submit(self._shallow).wait()
        yield None
        self.stats.count_pass(1, self._runners[1].submit(self._deep).wait())
        for cache in self._caches:
            for row in range(len(tokens)):
                cache.extend(row, 1)
        return self._logits

    def _grow(self) -> None:
        rows = min(self._rows, 2 * self._caches[0].rows)
        self._caches = [cache.grown(rows) for cache in self._caches]
        self._bind()

    def _bind(self) -> None:
        shallow, deep = self._runners
        tokens = {"input_ids": self._tokens, "head_rows": np.zeros(0, np.int64)}
        self._shallow = _bind(shallow, self._caches[0], self._cross, tokens, {"hidden": self._hidden})
        hidden = {"hidden": self._hidden, "head_rows": self._every, "emitted": self._emitted}
        self._deep = _bind(deep, self._caches[1], self._cross, hidden, {"logits": self._logits})


def _repeated(array: Any, beams: int, runner: Runner) -> Any:
    """[1, ...] -> [beams, ...]."""
    if isinstance(array, np.ndarray):
        return np.repeat(array, beams, axis=0)
    rows = runner.zeros((beams, *array.shape[1:]), array.dtype)
    for beam in range(beams):
        rows[beam : beam + 1] = array
    return rows


def _bind(
    runner: Runner,
    cache: KVCache,
    cross: dict[str, np.ndarray],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
) -> Call:
    layers = {name.split(".")[0] for name in cache.arrays}
    past = {f"past.{name}": array for name, array in cache.arrays.items()}
    read = {n: v for n, v in cross.items() if n == "cross_lengths" or n.split(".")[1] in layers}
    lengths = {"past_lengths": cache.lengths, "query_lengths": np.ones(len(cache.lengths), np.int32)}
    present = {f"present.{name}": array for name, array in cache.arrays.items()}
    return runner.engine.bind({**inputs, **lengths, **read, **past}, {**outputs, **present})
