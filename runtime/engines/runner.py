"""An engine with its KV cache, and how its calls are run: at once. On a GPU in a stream: runtime/cuda/runner.py."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine, value
from runtime.kernels import reading_prompt
from runtime.machine.machine import lazy_zeros

# Tokens of a text, up to which its encoder does without tiles: to unpack weights for them takes as long as to multiply
# so many rows. A prompt is encoded alone, so its bits still depend on nothing else.
SHORT_PROMPT = 40


class Event:
    """A submitted call. Neither protocol nor abstract: to ask whether something is one, at every token, must cost
    nothing. This one is done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def done(self) -> bool:
        return True

    def wait(self) -> float:
        """Until it is done: the seconds it took. Raises what it raised."""
        return self._seconds


class Runner:
    """`beside`: the caller goes on while a submitted call runs. Not on a CPU, where both engines would share the cores
    and the memory bandwidth: it measured slower (docs/decoding.md). `heads`: whether the engine has a head."""

    def __init__(self, engine: OnnxEngine, cache: KVCache, heads: bool = True) -> None:
        self.engine, self.cache, self.heads = engine, cache, heads
        self.beside = False

    def submit(self, call: Call) -> Event:
        """Run a call, or let it run beside."""
        return Event(self.run(call))

    def run(self, call: Call) -> float:
        """Run a call to its end: the seconds it took."""
        began = perf_counter()
        call.run()
        return perf_counter() - began

    def value(self, array: Any) -> Any:
        """An array in the form that the engine binds at once: for those that are bound again and again."""
        return value(array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array where the engine's calls want theirs."""
        return lazy_zeros(shape, dtype)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array of finite numbers, until the next call for this name."""
        return np.zeros(shape, dtype)


class Encoder:
    """The prompt side of an encoder-decoder, once per request: encoder, then the prologue that gives cross-attention
    keys and values."""

    def __init__(self, encoder: OnnxEngine, prologue: OnnxEngine) -> None:
        self._encoder, self._prologue = encoder, prologue
        self._cross = list(prologue.output_shapes)

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, np.ndarray]:
        """Prompt int64 [n] -> `cross.{layer}.key|value` [1, heads, n, head_dim] and `cross_lengths` int32 [1]. Of
        speech the prompt is a window float32 [1, bins, 2 n]. What a `reader` had before, it does not need any more."""
        if tokens.ndim == 3:
            return self.run_padded(tokens, np.array([tokens.shape[2] // 2], np.int32))[0]
        return self.run_padded(tokens[None], np.array([len(tokens)], np.int32))[0]

    def run_padded(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Right-padded prompts int64 [B, E] of `lengths` int32 [B], or windows of speech float32 [B, bins, 2 E], which
        are whole -> the same for B rows, and hidden [B, E, d]."""
        inputs = {"features": tokens} if tokens.ndim == 3 else {"input_ids": tokens, "lengths": lengths}
        with reading_prompt(tokens.ndim == 3 or tokens.shape[1] > SHORT_PROMPT):
            (hidden,) = self._encoder.run(["hidden"], inputs)
            cross = self._prologue.run(self._cross, {"hidden": hidden})
        return {**dict(zip(self._cross, cross, strict=True)), "cross_lengths": lengths}, hidden
