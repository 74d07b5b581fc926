"""The prompt side of an encoder-decoder: encoder, then the prologue that gives cross-attention keys and values."""

from __future__ import annotations

import numpy as np

from runtime.engines.onnx import OnnxEngine


class Encoder:
    """Runs once per request; what it returns stays for the whole sequence."""

    def __init__(self, encoder: OnnxEngine, prologue: OnnxEngine) -> None:
        self._encoder, self._prologue = encoder, prologue
        self._cross = list(prologue.output_shapes)

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, np.ndarray]:
        """Prompt int64 [n] -> `cross.{layer}.key|value` [1, heads, n, head_dim] and `cross_lengths` int32 [1]. What a
        `reader` had before, it does not need any more."""
        return self.run_padded(tokens[None], np.array([len(tokens)], np.int32))[0]

    def run_padded(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Right-padded prompts int64 [B, E] of `lengths` int32 [B] -> the same for B rows, and hidden [B, E, d]."""
        (hidden,) = self._encoder.run(["hidden"], {"input_ids": tokens, "lengths": lengths})
        cross = self._prologue.run(self._cross, {"hidden": hidden})
        return {**dict(zip(self._cross, cross, strict=True)), "cross_lengths": lengths}, hidden
