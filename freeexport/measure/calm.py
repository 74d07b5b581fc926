"""CALM (Schuster et al. 2022, arXiv 2207.07061) as a baseline.

A token may exit after any layer. Its state is copied to the skipped layers, which compute their
keys and values from it.

The engines are: the first layers with a head, each further layer with a head, engines that fill the
caches of skipped layers, and one engine of all further layers, which reads prompts. The builder of
bundles writes them, with the same operators, kernels and precision, and one weight file.
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
from runtime.engines.kv_cache import KVCache
from runtime.engines.onnx import Call, OnnxEngine
from runtime.engines.runner import Encoder
from runtime.errors import OptionError
from runtime.kernels import reading_prompt

WEIGHTS = "weights.data"
FACTS = "calm.json"
# Weight and temperature of the decaying part of the paper's threshold.
DECAYING = 0.1
TEMPERATURE = 4.0


def write_calm(checkpoint: str, manifest: Manifest, least: int, directory: Path) -> str:
    """Write the engines of CALM, unless the directory already has them.

    Args:
        checkpoint: Checkpoint of the bundle.
        manifest: Manifest of the bundle.
        least: First layer after which a token may exit.
        directory: Directory of the engines.

    Returns:
        The training loss of the checkpoint, "" if unknown.

    Raises:
        OptionError: If the checkpoint, the layer or the bundle does not fit.
        CheckpointError: If the checkpoint cannot be read.
    """
    opened = open_checkpoint(checkpoint)
    if opened.sha256 != manifest.source_sha256:
        raise OptionError(
            f"--calm-model {checkpoint} is not what the bundle came from ({manifest.source}); "
            "name that checkpoint"
        )
    if not 1 <= least < manifest.layers:
        raise OptionError(f"--calm-from {least} is out of range; choose 1 to {manifest.layers - 1}")
    if manifest.dialect != "ort" or manifest.target != "cpu":
        raise OptionError("method calm is for bundles of --target cpu in the dialect ort")
    description = describe(opened.config, opened)
    if description.decoder.layers[0].order != "pre":
        raise OptionError(
            f"method calm is for layers with their norms first, not for {description.family}"
        )
    options = EngineOptions(
        exit_layer=least,
        capacity=manifest.capacity,
        max_pending=manifest.max_pending,
        precision=manifest.precision,
        confidence=manifest.confidence,
        kernels="freeexport" if manifest.kernels else "onnxruntime",
    )
    loss = opened.exit.loss if opened.exit is not None else ""
    facts: dict[str, Any] = json.loads(
        json.dumps({"version": 2, "source": opened.sha256, **asdict(options)})
    )
    try:
        known = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known == facts:
        return loss
    with output_directory(directory, FACTS, overwrite=True) as partial:
        layers = range(least, manifest.layers)
        with (
            WeightFile(partial / WEIGHTS) as weights,
            progress("building calm", 2 + 2 * len(layers)) as advance,
        ):
            builder = CalmBuilder(description, options, opened, weights, partial)
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
    """Builds engines of single layers. Layers count from 0."""

    def layer(self, number: int) -> None:
        """Write layer.{number}.onnx with one layer and the head, from `state` to `hidden`."""
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
        """Write fill.{first}.onnx: keys and values of all layers from `first` for one state."""
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
            dialect.self_attention(
                graph.to_compute(dialect.norm(x, layer.attention_norm)), attention, number
            )
        self._save(graph)

    def _passes(self, engine: str) -> list[ir.passes.InPlacePass]:
        return super()._passes(engine if engine == "shallow" else "deep")


def keys_as_queries(graph: Graph, x: ir.Value, attention: Attention) -> ir.Value:
    """Project keys and values only, and use the keys as queries.

    Such attention only writes its cache. Its output is not read, so it needs no queries.
    """
    both = stacked_linear(graph, x, [attention.key, attention.value])
    key, value = graph.ops("Split", [both], 2, axis=-1, num_outputs=2)
    return graph.op("Concat", [key, key, value], axis=-1)


@dataclass(frozen=True)
class CalmResult:
    """Output of CALM.

    Attributes:
        token_ids: Generated tokens.
        layers: Layers per token. The first token of a decoder-only model takes all, as in other
            modes.
        seconds: Seconds of the whole request.
        first_seconds: Seconds to the first token.
    """

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    seconds: float
    first_seconds: float


class Calm:
    """Decodes one sequence at a time.

    Args:
        bundle: The bundle.
        directory: Directory that `write_calm` wrote.
        least: First layer after which a token may exit.
        threads: Threads per engine call.
    """

    def __init__(self, bundle: Bundle, directory: Path, least: int, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self.least = least
        self._layers = range(least, manifest.layers)

        def engine(path: Path) -> OnnxEngine:
            return OnnxEngine(path, threads, kernels=manifest.kernels)

        names = [
            "shallow",
            "deep",
            *(f"{kind}.{layer}" for layer in self._layers for kind in ("layer", "fill")),
        ]
        self._engines = {name: engine(directory / f"{name}.onnx") for name in names}
        encoder = [
            engine(bundle.path / f"{name}.onnx")
            for name in ("encoder", "prologue")
            if manifest.encoder_decoder
        ]
        self._encoder = Encoder(*encoder) if encoder else None
        self._cache = KVCache(**cache_sizes(manifest, range(manifest.layers), 1, manifest.capacity))
        self._token = np.zeros(1, np.int64)
        self._confidence = np.zeros(1, np.float32)
        self._input = np.zeros((1, 1), np.int64)
        self._calls: dict[str, Call] = {}

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        threshold: float,
        decays: bool = False,
        single: bool = False,
    ) -> CalmResult:
        """Decode a prompt greedily. A token exits after the first layer above the threshold.

        Args:
            prompt: Token ids int64 [n].
            max_new_tokens: Most tokens to generate.
            threshold: Threshold t of the confidence.
            decays: Use the decaying threshold clip(0.9 t + 0.1 exp(-4 n / N)) at token n of N.
            single: Exit only after layer `least`. The further layers are one call.
        """
        began = perf_counter()
        manifest = self._manifest
        self._cache.trim(0, 0)
        ids: list[int] = []
        layers: list[int] = []
        if self._encoder is None:
            self._bind_calls({})
            ids = [self._prefill(prompt)]
            layers = [manifest.layers]
            read = len(prompt)
        else:
            self._bind_calls(self._encoder.run(prompt))
            read = 1
        first = perf_counter()
        limit = min(max_new_tokens, manifest.capacity - read + 1)
        while not ids or (len(ids) < limit and ids[-1] not in manifest.eos_token_ids):
            bar = threshold_at(threshold, len(ids), limit) if decays else threshold
            token, taken = self._step(
                ids[-1] if ids else manifest.decoder_start_token_id or 0, bar, single
            )
            ids.append(token)
            layers.append(taken)
            if len(ids) == 1:
                first = perf_counter()
        return CalmResult(tuple(ids), tuple(layers), perf_counter() - began, first - began)

    def _prefill(self, tokens: np.ndarray) -> int:
        """Run all layers over the prompt in two calls, and the head for the last row only."""
        rows = len(tokens)
        none = np.zeros(0, np.int64)
        state = np.zeros((1, rows, self._manifest.hidden_size), np.float32)
        lengths = self._lengths(rows)
        shallow = range(self.least)
        first = self._engines["shallow"].bind(
            {"input_ids": tokens[None], **lengths, "head_rows": none,
             **self._arrays("past", shallow)},
            {"hidden": state, "token": self._token[:0], "confidence": self._confidence[:0],
             **self._arrays("present", shallow)},
        )  # fmt: skip
        with reading_prompt(not self._manifest.encoder_decoder):
            first.run()
            self._deep(state, np.array([rows - 1], np.int64), lengths, {}).run()
        self._cache.extend(0, rows)
        return int(self._token[0])

    def _step(self, token: int, bar: float, single: bool) -> tuple[int, int]:
        """Return the next token and its number of layers."""
        self._input[0, 0] = token
        self._calls["shallow"].run()
        taken = self.least
        if single and not float(self._confidence[0]) > bar:
            self._calls["deep"].run()
            taken = self._manifest.layers
        while taken < self._manifest.layers and not float(self._confidence[0]) > bar:
            self._calls[f"layer.{taken}"].run()
            taken += 1
        if taken < self._manifest.layers:
            self._calls[f"fill.{taken}"].run()
        self._cache.extend(0, 1)
        return int(self._token[0]), taken

    def _bind_calls(self, cross: Mapping[str, Any]) -> None:
        """Bind the calls of one row. Later requests rebind only the cross-attention inputs."""
        most = self._manifest.layers
        calls = self._calls
        reads = {"shallow": range(self.least), "deep": self._layers}
        reads |= {f"layer.{layer}": range(layer, layer + 1) for layer in self._layers}
        if calls:
            for name, layers in reads.items() if cross else ():
                calls[name].rebind(_cross(cross, layers), {})
            return
        shape = (1, 1, self._manifest.hidden_size)
        head = np.zeros(1, np.int64)
        states = {layer: np.zeros(shape, np.float32) for layer in range(self.least, most + 1)}
        for name, layers in reads.items():
            if name == "deep":
                calls[name] = self._deep(states[self.least], head, self._lengths(1), cross)
                continue
            first = (
                {"input_ids": self._input} if name == "shallow" else {"state": states[layers.start]}
            )
            rows = {**self._lengths(1), "head_rows": head, **_cross(cross, layers)}
            outputs = {
                "hidden": states[layers.stop],
                "token": self._token,
                "confidence": self._confidence,
            }
            calls[name] = self._engines[name].bind(
                {**first, **rows, **self._arrays("past", layers)},
                {**outputs, **self._arrays("present", layers)},
            )
        for layer in self._layers:
            skipped = range(layer, most)
            calls[f"fill.{layer}"] = self._engines[f"fill.{layer}"].bind(
                {"state": states[layer], **self._lengths(1), **self._arrays("past", skipped)},
                self._arrays("present", skipped),
            )

    def _deep(
        self,
        state: np.ndarray,
        head_rows: np.ndarray,
        lengths: Mapping[str, Any],
        cross: Mapping[str, Any],
    ) -> Call:
        given = {
            "hidden": state,
            **lengths,
            "head_rows": head_rows,
            "emitted": np.zeros(1, np.int64),
        }
        return self._engines["deep"].bind(
            {**given, **self._arrays("past", self._layers), **_cross(cross, self._layers)},
            {"token": self._token, **self._arrays("present", self._layers)},
        )

    def _lengths(self, rows: int) -> dict[str, np.ndarray]:
        return {"past_lengths": self._cache.lengths, "query_lengths": np.array([rows], np.int32)}

    def _arrays(self, prefix: str, layers: range) -> dict[str, np.ndarray]:
        names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
        return {f"{prefix}.{name}": self._cache.arrays[name] for name in names}


def _cross(cross: Mapping[str, Any], layers: range) -> dict[str, Any]:
    names = [f"cross.{layer}.{part}" for layer in layers for part in ("key", "value")]
    return {name: cross[name] for name in ("cross_lengths", *names)} if cross else {}


def threshold_at(threshold: float, token: int, limit: int) -> float:
    """Return the decaying threshold at token `token` of `limit` (section 3.2 of the paper)."""
    decayed = (1 - DECAYING) * threshold + DECAYING * math.exp(-TEMPERATURE * token / limit)
    return min(1.0, max(0.0, decayed))
