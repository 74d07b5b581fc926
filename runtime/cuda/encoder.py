"""The prompt side of an encoder-decoder on a GPU: what it gives stays there."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from runtime.cuda.runner import CudaRunner
from runtime.engines.encoder import Encoder

# Prompts are padded to powers of 2 from here on, so that calls for their width, and CUDA graphs, are there already.
LEAST_WIDTH = 32


class CudaEncoder(Encoder):
    """`runner`: in whose stream and thread the engines run. `longest` prompt, in tokens; `hidden_size` is d."""

    def __init__(self, encoder: Any, prologue: Any, runner: CudaRunner, longest: int, hidden_size: int) -> None:
        super().__init__(encoder, prologue)
        self._runner, self._longest, self._hidden_size = runner, longest, hidden_size
        self._places: WeakKeyDictionary[Any, dict[int, _Place]] = WeakKeyDictionary()

    def run(self, tokens: np.ndarray, reader: object = None) -> dict[str, Any]:
        """Prompt int64 [n] -> DeviceArrays `cross.{layer}.key|value` [1, heads, E, head_dim], E at least n, and
        `cross_lengths` int32 [1] of the host. The same arrays for a `reader` and a width each time."""
        width = width_of(len(tokens), self._longest)
        places = self._places.setdefault(reader, {}) if reader is not None else {}
        place = places.get(width)
        if place is None:
            place = places[width] = _Place(self._encoder, self._prologue, self._runner, width, self._hidden_size)
        place.tokens[0, : len(tokens)], place.tokens[0, len(tokens) :] = tokens, 0
        place.cross["cross_lengths"][0] = len(tokens)
        for call in place.calls:
            self._runner.run(call)
        return place.cross


class _Place:
    """What a prompt of one width is read from and leads to, and the bound calls between."""

    def __init__(self, encoder: Any, prologue: Any, runner: CudaRunner, width: int, hidden_size: int) -> None:
        self.tokens = np.zeros((1, width), np.int64)
        lengths = np.zeros(1, np.int32)
        shapes = {name: (1, heads, width, size) for name, (_, heads, _, size) in prologue.output_shapes.items()}
        cross = {name: runner.zeros(shape, prologue.dtype(name)) for name, shape in shapes.items()}
        # Kept by this place: a scratch that grows is another one.
        hidden = runner.zeros((1, width, hidden_size), encoder.dtype("hidden"))
        self.calls = (
            encoder.bind({"input_ids": self.tokens, "lengths": lengths}, {"hidden": hidden}),
            prologue.bind({"hidden": hidden}, cross),
        )
        self.cross: dict[str, Any] = {**cross, "cross_lengths": lengths}


def width_of(length: int, longest: int) -> int:
    """To how many positions a prompt is padded."""
    return min(longest, max(LEAST_WIDTH, 1 << (length - 1).bit_length()))
