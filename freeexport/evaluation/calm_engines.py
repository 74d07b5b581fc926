"""The engines of CALM: the first layers with a head, each further layer with a head, and what fills skipped caches;
and the further layers in one, which read the prompt.

They are written by the builder of bundles: the same operators, kernels and precision, and one weight file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from freeexport.checkpoints.checkpoint import open_checkpoint
from freeexport.conversion.options import ConvertOptions, engine_options
from freeexport.system.output_directory import output_directory
from freeexport.system.progress import progress
from graphs.description import Attention
from graphs.dialects.base import stacked_linear
from graphs.dialects.ort import OrtDialect
from graphs.engines import FLOAT, EngineBuilder
from graphs.families import describe
from graphs.graph import Graph
from graphs.weights import WeightFile
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError

WEIGHTS, FACTS = "weights.data", "calm.json"


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
    description = describe(opened.config, opened)
    given = ConvertOptions(
        exit_layer=least,
        precision=manifest.precision,
        dialect="ort",
        confidence=manifest.confidence,
        capacity=manifest.capacity,
        max_pending=manifest.max_pending,
        kernels="freeexport" if manifest.kernels else "onnxruntime",
    )
    options = engine_options(description, given, least)
    loss = opened.exit.loss if opened.exit is not None else ""
    facts: dict[str, Any] = json.loads(json.dumps({"version": 2, "source": opened.sha256, **asdict(options)}))
    if _facts(directory) == facts:
        return loss
    with output_directory(directory, FACTS, overwrite=True) as partial:
        layers = range(least, manifest.layers)
        with WeightFile(partial / WEIGHTS) as weights, progress("building calm", 2 + 2 * len(layers)) as advance:
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


def _facts(directory: Path) -> Any:
    try:
        return json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class CalmBuilder(EngineBuilder):
    """Layers count from 0."""

    def layer(self, number: int) -> None:
        """layer.{number}.onnx: one layer and the head, from `hidden` to `hidden`."""
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
        """fill.{first}.onnx: a state is copied to layers `first` and on, whose keys and values of it are written."""
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


def keys_as_queries(graph: Graph, x: ir.Value, attention: Attention, width: int) -> ir.Value:
    """Attention that runs for the cache it writes needs no product for queries, as nobody reads what it gives: keys
    stand in their place."""
    size = attention.kv_heads * attention.head_dim
    both = stacked_linear(graph, x, [attention.key, attention.value], [size, size], width)
    key, value = graph.ops("Split", [both], 2, axis=-1, num_outputs=2)
    return graph.op("Concat", [key, key, value], axis=-1)
