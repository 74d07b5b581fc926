"""An engine that records its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.decoding.calls import SlotCall
from runtime.decoding.decoder import Decoder
from runtime.decoding.loops import Loop
from runtime.decoding.response import Response
from runtime.engines.kv_cache import KVCache
from runtime.result import Token

WIDTH = 4


def alone(coroutine: Loop) -> Iterator[Token]:
    """Run what a coroutine waits for, at once: its tokens."""
    try:
        for item in coroutine:
            if isinstance(item, SlotCall):
                item.run()
            elif isinstance(item, Token):
                yield item
    finally:
        coroutine.close()


SHALLOW_TOKEN, DEEP_TOKEN = 1000, 2000  # plus the position that predicts the token


@dataclass
class Recorder:
    """An engine that writes the token it read at each position into its cache, and checks where it is called.

    A hidden state is [position, token, ...]. The shallow confidence at position p is `trace[p]`, the deep cross-entropy
    of whatever was drafted there `nll[p]`. The deep decoder agrees with the shallow one where `agrees[p]`.
    """

    cache: KVCache
    name: str
    trace: Sequence[float] = ()
    nll: Sequence[float] = ()
    agrees: Sequence[bool] = ()
    calls: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    def token(self, position: int) -> int:
        agreed = self.name == "shallow" or (position < len(self.agrees) and self.agrees[position])
        return int(position) + (SHALLOW_TOKEN if agreed else DEEP_TOKEN)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> RecordedCall:
        return RecordedCall(self, inputs, outputs)


@dataclass
class RecordedCall:
    engine: Recorder
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]

    def run(self) -> None:
        engine, inputs, outputs = self.engine, self.inputs, self.outputs
        (past,), (rows,) = inputs["past_lengths"], inputs["query_lengths"]
        positions = np.arange(past, past + rows)
        if engine.name == "shallow":
            tokens = inputs["input_ids"][0]
            outputs["hidden"][0, :, 0], outputs["hidden"][0, :, 1] = positions, tokens
        else:
            hidden = inputs["hidden"][0]
            # Absolute positions, in order, none left out: what a sync pass must get.
            assert hidden[:, 0].tolist() == positions.tolist()
            tokens = hidden[:, 1]
        assert len(tokens) == rows
        for array in engine.cache.arrays.values():
            array[0, 0, past : past + rows, 0] = tokens
        heads = positions[inputs["head_rows"]]
        outputs["token"][:] = [engine.token(position) for position in heads]
        if engine.name == "shallow":
            outputs["confidence"][:] = [engine.trace[position] for position in heads]
        else:
            outputs["nll"][:] = [engine.nll[position] if engine.nll else 0 for position in heads]
        engine.calls.append(int(rows))
        engine.heads.append(len(heads))


def prompt_of(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int64) + 10


def cached(engine: Recorder, length: int) -> set[tuple[float, ...]]:
    """The valid rows of every array of a cache; one element where all layers agree."""
    return {tuple(array[0, 0, :length, 0].tolist()) for array in engine.cache.arrays.values()}


def decoded(
    loop: Callable[..., Loop], decoder: Decoder, prompt: np.ndarray, limit: int, *settings: Any, **options: Any
) -> Loop:
    """Decode a request by `loop`: a prompt's own prediction first, but for an encoder-decoder, whose prompt is
    none: [0] stands for its start token. `head`: whether the prompt's last row has the shallow head."""
    head, response = options.pop("head", True), Response(prompt, limit)
    if prompt.tolist() == START:
        decoder.begin(exits=True)
    else:
        first = yield from decoder.prefilling(prompt, head)
        yield response.add(response.choose(first), False, first.confidence, first)
    yield from loop(decoder, response, *settings, **options)


LENGTH = 60
START = [0]
