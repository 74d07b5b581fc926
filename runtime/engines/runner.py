"""Runs an engine with its KV cache. On the CPU, calls run at once.

See runtime/engines/cuda/runner.py for runners on a GPU.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from runtime.engines.kernels import reading_prompt
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine, value
from runtime.machine.machine import lazy_zeros

# Longest prompt, in tokens, that the encoder computes without tiles. Unpacking weights for tiles
# takes as long as multiplying this many rows. Prompts are encoded one at a time, so results depend
# on nothing else.
SHORT_PROMPT = 40


class Event:
    """A submitted call. This class is for calls that have finished.

    It is neither a protocol nor abstract, because instance checks at every token must be cheap.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def done(self) -> bool:
        """Return True if `wait` would return or raise at once."""
        return True

    def wait(self) -> float:
        """Wait for the call and return its duration in seconds. Raises the error of the call."""
        return self._seconds


class Runner:
    """Runs calls of an engine.

    `beside` is True if the caller continues while a submitted call runs. It is False on a CPU,
    where concurrent engines share cores and memory bandwidth and are slower (docs/decoding.md).

    Args:
        engine: The engine.
        cache: Its KV cache.
        heads: The engine has a head.
    """

    def __init__(self, engine: OnnxEngine, cache: KVCache, heads: bool = True) -> None:
        self.engine = engine
        self.cache = cache
        self.heads = heads
        self.beside = False

    def padded(self, slot: int, rows: int, heads: int, max_rows: int) -> tuple[int, int]:
        """Return the rows and predictions, with padding, of a call that is kept and used again.

        A runner may pad calls of a slot to few different sizes, of at most `most` rows. On a CPU,
        padding costs time and saves nothing.
        """
        return rows, heads

    def submit(self, call: Call) -> Event:
        """Start a call. On a CPU, run it to its end."""
        return Event(self.run(call))

    def run(self, call: Call) -> float:
        """Run a call to its end and return its duration in seconds."""
        began = perf_counter()
        call.run()
        return perf_counter() - began

    def value(self, array: Any) -> Any:
        """Convert an array that is bound repeatedly to the form that the engine binds fastest."""
        return value(array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array of zeros in the memory that the engine uses."""
        return lazy_zeros(shape, dtype)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array of finite numbers, valid until the next request for `name`."""
        return np.zeros(shape, dtype)


class Encoder:
    """Encoder and prologue of an encoder-decoder, which run once per request.

    The prologue computes keys and values for cross-attention.
    """

    def __init__(self, encoder: OnnxEngine, prologue: OnnxEngine) -> None:
        self._encoder = encoder
        self._prologue = prologue
        self._cross = list(prologue.output_shapes)

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, np.ndarray]:
        """Encode a prompt int64 [n], or a window of speech float32 [1, bins, 2 n].

        Returns `cross.{layer}.key|value` [1, heads, n, head_dim] and `cross_lengths` int32 [1]. The
        previous result for the same `reader` may be overwritten.
        """
        if tokens.ndim == 3:
            return self.run_padded(tokens, np.array([tokens.shape[2] // 2], np.int32))[0]
        return self.run_padded(tokens[None], np.array([len(tokens)], np.int32))[0]

    def run_padded(
        self, tokens: np.ndarray, lengths: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Encode right-padded prompts int64 [B, E] of `lengths` int32 [B], or windows of speech.

        Windows are float32 [B, bins, 2 E], without padding. Returns `cross.{layer}.key|value` and
        `cross_lengths` of B rows, and the hidden states [B, E, d].
        """
        speech = tokens.ndim == 3
        inputs = {"features": tokens} if speech else {"input_ids": tokens, "lengths": lengths}
        with reading_prompt(speech or tokens.shape[1] > SHORT_PROMPT):
            (hidden,) = self._encoder.run(["hidden"], inputs)
            cross = self._prologue.run(self._cross, {"hidden": hidden})
        return {**dict(zip(self._cross, cross, strict=True)), "cross_lengths": lengths}, hidden

    def states(self, tokens: np.ndarray) -> np.ndarray:
        """Return the hidden states of a prompt int64 [n], [n, d], without the prologue."""
        inputs = {"input_ids": tokens[None], "lengths": np.array([len(tokens)], np.int32)}
        with reading_prompt(len(tokens) > SHORT_PROMPT):
            (hidden,) = self._encoder.run(["hidden"], inputs)
        states: np.ndarray = hidden[0]
        return states
