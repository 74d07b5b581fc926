"""CALM (Schuster et al. 2022, arXiv 2207.07061), to compare with: a token may exit after any layer, and its state is
copied to the layers that it skips, whose keys and values are computed from that.

Its engines are the first layers with a head, each further layer with a head, what fills skipped caches, and the
further layers in one, which read prompts. They are written by the builder of bundles: the same operators, kernels and
precision, and one weight file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.system.output import output_directory
from freeexport.system.progress import progress
from graphs.description import Attention
from graphs.dialects.base import stacked_linear
from graphs.dialects.ort import OrtDialect
from graphs.engine_options import EngineOptions
from graphs.engines import FLOAT, EngineBuilder
from graphs.families import describe
from graphs.graph import Graph
from graphs.weights import WeightFile
from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.engines.backend import cache_sizes
from runtime.engines.encoder import Encoder
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine
from runtime.errors import OptionError

WEIGHTS, FACTS = "weights.data", "calm.json"
# The paper's decaying threshold: how much of the given one decays, and the temperature of it.
DECAYING, TEMPERATURE = 0.1, 4.0


def write_calm(checkpoint: str, manifest: Manifest, least: int, directory: Path) -> str:
    """Write the engines of `checkpoint`, of which `manifest` is a bundle, that may exit after layer `least` and every
    one behind it; kept where they are there already. Returns the loss that it was trained with, "" where that is not
    known. Raises OptionError where the checkpoint or the layer does not fit, CheckpointError."""
    opened = open_checkpoint(checkpoint)
    if opened.sha256 != manifest.source_sha256:
        raise OptionError(
            f"--calm-model {checkpoint} is not what the bundle came from ({manifest.source}); name that checkpoint"
        )
    if not 1 <= least < manifest.layers:
        raise OptionError(f"--calm-from {least} is out of range; choose 1 to {manifest.layers - 1}")
    if manifest.dialect != "ort" or manifest.target != "cpu":
        raise OptionError("method calm is for bundles of --target cpu in the dialect ort")
    options = EngineOptions(
        exit_layer=least,
        capacity=manifest.capacity,
        max_pending=manifest.max_pending,
        precision=manifest.precision,
        confidence=manifest.confidence,
        kernels="freeexport" if manifest.kernels else "onnxruntime",
    )
    loss = opened.exit.loss if opened.exit is not None else ""
    facts: dict[str, Any] = json.loads(json.dumps({"version": 2, "source": opened.sha256, **asdict(options)}))
    try:
        known = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known == facts:
        return loss
    with output_directory(directory, FACTS, overwrite=True) as partial:
        layers = range(least, manifest.layers)
        with WeightFile(partial / WEIGHTS) as weights, progress("building calm", 2 + 2 * len(layers)) as advance:
            builder = CalmBuilder(describe(opened.config, opened), options, opened, weights, partial)
            builder.shallow()
            builder.deep()
            advance(2)
            for layer in layers:
                builder.layer(layer)
                builder.fill(layer)
                advance(2)
        (partial / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return loss


class CalmBuilder(EngineBuilder):
    """Builds the engines of one layer each; layers count from 0."""

    def layer(self, number: int) -> None:
        """Write layer.{number}.onnx: one layer and the head, from `state` to `hidden`."""
        graph = self._graph(f"layer.{number}")
        width = self.description.hidden_size
        before = graph.input("state", FLOAT, ["B", "k", width])
        call = self._decoder_call(graph, before)
        dialect = self._dialect(graph, call)
        x = graph.op("Reshape", [before, graph.constant([-1, width])])
        layers = self.description.decoder.layers[number : number + 1]
        hidden = self._layers(graph, dialect, x, layers, number)
        self._head(graph, dialect, hidden, None)
        self._output_hidden(graph, hidden, call, FLOAT, "k")
        self._save(graph)

    def fill(self, first: int) -> None:
        """Write fill.{first}.onnx: keys and values of layers `first` and on, of a state that is copied to them."""
        graph = self._graph(f"fill.{first}")
        width = self.description.hidden_size
        state = graph.input("state", FLOAT, ["B", "k", width])
        call = self._decoder_call(graph, state)
        dialect = self._dialect(graph, call)
        assert isinstance(dialect, OrtDialect)
        dialect.project = keys_as_queries
        x = graph.op("Reshape", [state, graph.constant([-1, width])])
        for number, layer in enumerate(self.description.decoder.layers[first:], first):
            attention = replace(layer.attention, heads=layer.attention.kv_heads, relative_bias=None)
            attention = replace(attention, query_norm=attention.key_norm)
            dialect.self_attention(graph.to_compute(dialect.norm(x, layer.attention_norm)), attention, number)
        self._save(graph)

    def _passes(self, engine: str) -> list[ir.passes.InPlacePass]:
        return super()._passes(engine if engine == "shallow" else "deep")


def keys_as_queries(graph: Graph, x: ir.Value, attention: Attention) -> ir.Value:
    """Attention that runs for the cache it writes needs no product for queries, as nobody reads what it gives: keys
    stand in their place."""
    both = stacked_linear(graph, x, [attention.key, attention.value])
    key, value = graph.ops("Split", [both], 2, axis=-1, num_outputs=2)
    return graph.op("Concat", [key, key, value], axis=-1)


@dataclass(frozen=True)
class CalmResult:
    """`layers`: that each token took; all for the first token of a decoder-only model, as in the other modes."""

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    seconds: float
    first_seconds: float

    @property
    def decode_seconds(self) -> float:
        """Seconds after the first token."""
        return self.seconds - self.first_seconds


class Calm:
    """Decodes one sequence at a time. `directory`: what `write_calm` wrote for the bundle, whose exits begin after
    layer `least`. Engines are loaded with `threads`."""

    def __init__(self, bundle: Bundle, directory: Path, least: int, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest, self._least = manifest, least
        self._layers = range(least, manifest.layers)

        def engine(path: Path) -> OnnxEngine:
            return OnnxEngine(path, threads, kernels=manifest.kernels)

        self._first = engine(directory / "shallow.onnx")
        self._rest = engine(directory / "deep.onnx")
        self._steps = {layer: engine(directory / f"layer.{layer}.onnx") for layer in self._layers}
        self._fills = {layer: engine(directory / f"fill.{layer}.onnx") for layer in self._layers}
        self._encoder = (
            Encoder(engine(bundle.path / "encoder.onnx"), engine(bundle.path / "prologue.onnx"))
            if manifest.encoder_decoder
            else None
        )
        self._cache = KVCache(*cache_sizes(manifest, range(manifest.layers), 1, manifest.capacity))
        self._token, self._confidence = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self._input = np.zeros((1, 1), np.int64)
        self._bound: dict[str, Call] | None = None

    def generate(
        self, prompt: np.ndarray, max_new_tokens: int, threshold: float, decays: bool = False, single: bool = False
    ) -> CalmResult:
        """Decode greedily. A token exits after the first layer whose confidence is above the threshold: the given one,
        or with `decays` one that falls as the sequence grows, clip(0.9 t + 0.1 exp(-4 n / N)) at token n of N. With
        `single` it may exit after the first of the layers only, and the further ones are one call."""
        began = perf_counter()
        manifest = self._manifest
        self._cache.trim(0, 0)
        ids: list[int] = []
        layers: list[int] = []
        if self._encoder is None:
            self._attend({})
            ids, layers, read = [self._prefill(prompt)], [manifest.layers], len(prompt)
        else:
            self._attend(self._encoder.run(prompt))
            read = 1
        first = perf_counter()
        limit = min(max_new_tokens, manifest.capacity - read + 1)
        while not ids or (len(ids) < limit and ids[-1] not in manifest.eos_token_ids):
            bar = threshold_at(threshold, len(ids), limit) if decays else threshold
            token, taken = self._step(ids[-1] if ids else manifest.decoder_start_token_id or 0, bar, single)
            ids.append(token)
            layers.append(taken)
            if len(ids) == 1:
                first = perf_counter()
        return CalmResult(tuple(ids), tuple(layers), perf_counter() - began, first - began)

    def _prefill(self, tokens: np.ndarray) -> int:
        """All layers over the prompt in two calls, as in the other modes; the head for its last row."""
        rows, none = len(tokens), np.zeros(0, np.int64)
        state = np.zeros((1, rows, self._manifest.hidden_size), np.float32)
        shared = self._lengths(rows)
        first = self._first.bind(
            {"input_ids": tokens[None], **shared, "head_rows": none, **self._arrays("past", range(self._least))},
            {"hidden": state, "token": self._token[:0], "confidence": self._confidence[:0],
             **self._arrays("present", range(self._least))},
        )  # fmt: skip
        last = {**shared, "head_rows": np.array([rows - 1], np.int64), "emitted": np.zeros(1, np.int64)}
        rest = self._rest.bind(
            {"hidden": state, **last, **self._arrays("past", self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )
        for call in (first, rest):
            call.run()
        self._cache.extend(0, rows)
        return int(self._token[0])

    def _step(self, token: int, bar: float, single: bool) -> tuple[int, int]:
        """The next token, and the layers that it took."""
        assert self._bound is not None
        self._input[0, 0] = token
        self._bound["first"].run()
        taken = self._least
        if single and not float(self._confidence[0]) > bar:
            self._bound["rest"].run()
            taken = self._manifest.layers
        while taken < self._manifest.layers and not float(self._confidence[0]) > bar:
            self._bound[f"layer.{taken}"].run()
            taken += 1
        if taken < self._manifest.layers:
            self._bound[f"fill.{taken}"].run()
        self._cache.extend(0, 1)
        return int(self._token[0]), taken

    def _attend(self, cross: Mapping[str, Any]) -> None:
        """Bind the calls of one row, once; later requests change only what they read of the prompt."""
        if self._bound is None:
            self._bound = self._one_row(cross)
        elif cross:
            for name, call in self._bound.items():
                if not name.startswith("fill"):
                    parts = {"first": range(self._least), "rest": self._layers}
                    layers = parts.get(name) or [int(name.partition(".")[2])]
                    call.rebind(_cross(cross, layers), {})

    def _one_row(self, cross: Mapping[str, Any]) -> dict[str, Call]:
        shape, most = (1, 1, self._manifest.hidden_size), self._manifest.layers
        states = {layer: np.zeros(shape, np.float32) for layer in range(self._least, most + 1)}
        inputs, state = {"input_ids": self._input}, states[self._least]
        made = {"first": self._bind(self._first, range(self._least), inputs, state, cross)}
        one = {**self._lengths(1), "head_rows": np.zeros(1, np.int64), "emitted": np.zeros(1, np.int64)}
        made["rest"] = self._rest.bind(
            {"hidden": state, **one, **self._arrays("past", self._layers), **_cross(cross, self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )
        for layer in self._layers:
            before, after, skipped = states[layer], states[layer + 1], range(layer, most)
            only = range(layer, layer + 1)
            made[f"layer.{layer}"] = self._bind(self._steps[layer], only, {"state": before}, after, cross)
            made[f"fill.{layer}"] = self._fills[layer].bind(
                {"state": before, **self._lengths(1), **self._arrays("past", skipped)}, self._arrays("present", skipped)
            )
        return made

    def _bind(
        self, engine: OnnxEngine, layers: range, inputs: Mapping[str, Any], state: np.ndarray, cross: Mapping[str, Any]
    ) -> Call:
        """Bind a call over one row, for which the head runs."""
        rows = {**self._lengths(1), "head_rows": np.zeros(1, np.int64)}
        outputs = {"hidden": state, "token": self._token, "confidence": self._confidence}
        return engine.bind(
            {**inputs, **rows, **self._arrays("past", layers), **_cross(cross, layers)},
            {**outputs, **self._arrays("present", layers)},
        )

    def _lengths(self, rows: int) -> dict[str, np.ndarray]:
        return {"past_lengths": self._cache.lengths, "query_lengths": np.array([rows], np.int32)}

    def _arrays(self, prefix: str, layers: range) -> dict[str, np.ndarray]:
        return {
            f"{prefix}.{layer}.{part}": self._cache.arrays[f"{layer}.{part}"]
            for layer in layers
            for part in ("key", "value")
        }


def _cross(cross: Mapping[str, Any], layers: Any) -> dict[str, Any]:
    if not cross:
        return {}
    return {
        "cross_lengths": cross["cross_lengths"],
        **{f"cross.{layer}.{part}": cross[f"cross.{layer}.{part}"] for layer in layers for part in ("key", "value")},
    }


def threshold_at(threshold: float, token: int, limit: int) -> float:
    """Compute the decaying threshold at one of `limit` tokens (section 3.2 of the paper)."""
    decayed = (1 - DECAYING) * threshold + DECAYING * math.exp(-TEMPERATURE * token / limit)
    return min(1.0, max(0.0, decayed))
