"""Engine that records its calls, for tests of decoding loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.adaptation.learner import RequestLabels
from runtime.decoding.calls import SlotCall
from runtime.decoding.decoder import Decoder
from runtime.decoding.drafts import Plain
from runtime.decoding.loops import Loop, Policy, decode
from runtime.decoding.response import Response
from runtime.engines.kv_cache import KVCache
from runtime.result import Token

WIDTH = 4


def alone(coroutine: Loop) -> Iterator[Token]:
    """Run a loop without other sequences, and yield its tokens."""
    try:
        for item in coroutine:
            if isinstance(item, SlotCall):
                item.run()
            elif isinstance(item, Token):
                yield item
    finally:
        coroutine.close()


# The position that predicts a token is added.
SHALLOW_TOKEN = 1000
DEEP_TOKEN = 2000


@dataclass
class Recorder:
    """Engine that writes the token read at each position into its cache, and checks the positions of calls.

    A hidden state is [position, token, ...].

    Attributes:
        cache: KV cache.
        name: "shallow" or "deep".
        trace: Shallow confidence at each position.
        nll: Deep cross-entropy of the drafted token at each position. Default: 0.
        agrees: Flag for each position: the deep decoder agrees with the shallow one. Default: it never agrees.
        calls: Number of rows of each call.
        heads: Number of rows of each call that have a prediction.
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
        engine = self.engine
        inputs = self.inputs
        outputs = self.outputs
        (past,), (rows,) = inputs["past_lengths"], inputs["query_lengths"]
        positions = np.arange(past, past + rows)
        if engine.name == "shallow":
            tokens = inputs["input_ids"][0]
            outputs["hidden"][0, :, 0] = positions
            outputs["hidden"][0, :, 1] = tokens
        else:
            hidden = inputs["hidden"][0]
            # A sync pass must receive all positions in order.
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
    """Return the distinct valid rows of a cache's arrays. One element means that all layers agree."""
    return {tuple(array[0, 0, :length, 0].tolist()) for array in engine.cache.arrays.values()}


def decoded(
    decoder: Decoder,
    prompt: np.ndarray,
    limit: int,
    drafts: Plain | None = None,
    policy: Policy | None = None,
    labels: RequestLabels | None = None,
) -> Loop:
    """Decode a request of `limit` tokens. Default: in mode full.

    A prompt first yields its own prediction, except START, which stands for the start token of an encoder-decoder.
    """
    response = Response(prompt, limit)
    if prompt.tolist() == START:
        decoder.start(exits=True)
    else:
        first = yield from decoder.prefilling(prompt, head=drafts is not None)
        yield response.add(response.choose(first), False, first.confidence, first)
    yield from decode(decoder, response, drafts or Plain(), policy or Policy(), labels)


LENGTH = 60
START = [0]
