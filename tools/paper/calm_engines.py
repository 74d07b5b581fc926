"""Builds the engines of CALM for a bundle.

The engines are: the first layers with a head, each further layer with a head, engines that fill the
caches of skipped layers, and one engine of all further layers, which reads prompts. The builder of
bundles writes them, with the same operators, kernels and precision, and one weight file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

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
from graphs.layers import head_rows
from graphs.weights import WeightFile
from runtime.bundle.manifest import Manifest
from runtime.errors import OptionError

WEIGHTS = "weights.data"
FACTS = "calm.json"


def write_calm(checkpoint: str, manifest: Manifest, least: int, directory: Path) -> str:
    """Write the engines of CALM, unless the directory already has them.

    Returns:
        The training loss of the checkpoint, "" if unknown.

    Raises:
        OptionError: If the checkpoint, the layer or the bundle does not fit.
        CheckpointError: If the checkpoint cannot be read.
    """
    opened = open_checkpoint(checkpoint)
    if opened.sha256 != manifest.source_sha256:
        raise OptionError(
            f"checkpoint {checkpoint} is not what the bundle came from ({manifest.source}); "
            "name that checkpoint"
        )
    if not 1 <= least < manifest.layers:
        raise OptionError(
            f"first exit layer {least} is out of range; choose 1 to {manifest.layers - 1}"
        )
    if manifest.dialect != "ort" or manifest.target != "cpu":
        raise OptionError("CALM needs a bundle of --target cpu in the dialect ort")
    description = describe(opened.config, opened)
    if description.decoder.layers[0].order != "pre":
        raise OptionError(
            f"CALM needs layers that begin with their norms, unlike those of {description.family}"
        )
    options = EngineOptions(
        exit_layer=least,
        capacity=manifest.capacity,
        max_pending=manifest.max_pending,
        precision=manifest.precision,
        confidence=manifest.confidence,
        kernels="freeexport" if manifest.kernels else "onnxruntime",
        activations=manifest.activations or "int8",
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
        read = graph.op("Gather", [hidden, head_rows(graph, None)], axis=0)
        self._head(graph, dialect, read, None)
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
