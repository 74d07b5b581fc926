"""Builds the graphs of a bundle.

These are the shallow and the deep decoder, the exit if it is an engine of its own, and for
encoder-decoders the encoder and the prologue. Inputs and outputs follow the engine contract in
docs/architecture.md: B sequences of q or k tokens each, and R head rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphs.description import (
    DecoderStack,
    Description,
    Embedding,
    EncoderStack,
    Layer,
    Spectrogram,
)
from graphs.dialects.base import (
    CallInputs,
    Dialect,
    Packing,
    embed,
    embed_sound,
    flat,
    in_rows,
    key_value_outputs,
    linear,
    packing,
)
from graphs.dialects.ort import KernelDialect, OrtDialect
from graphs.dialects.standard import StandardDialect
from graphs.engine_options import CACHE_TYPES, FLOAT_TYPES, EngineOptions
from graphs.exit_head import fused_layers
from graphs.graph import Dimension, Graph
from graphs.layers import (
    decoder_layers,
    encoder_layers,
    exit_rows,
    head_outputs,
    head_rows,
    unit_scaled,
)
from graphs.quantization.panels import InFile
from graphs.quantization.passes import FuseProducts, QuantizeEmbedding, QuantizeLinears
from graphs.quantization.quantizer import Quantizer
from graphs.quantization.rounding import Rounded
from graphs.shapes import check_weights
from graphs.weights import WeightFile, Weights
from runtime.bundle.manifest import FEATURE_STATES
from runtime.bundle.quantization import Quantization

FLOAT = ir.DataType.FLOAT
INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


class EngineBuilder:
    """Builds the graphs of one model into one directory, with one shared weight file.

    Args:
        description: Structure of the model.
        options: Options of the engines.
        source: Weights of the checkpoint.
        weights: File that receives the weights.
        directory: Where the graphs are written.
        rounded: Weights that are already rounded to 4 bits, by tensor name.
        in_file: Returns a tensor's quantized form in the checkpoint file if this project's kernels
            can read it, else None. Its second argument is True if the form replaces floats.

    Raises:
        GraphError: If the options are invalid for the model.
        UnsupportedModelError: If a weight has the wrong shape.
    """

    def __init__(
        self,
        description: Description,
        options: EngineOptions,
        source: Weights,
        weights: WeightFile,
        directory: Path,
        rounded: Mapping[str, Rounded] = MappingProxyType({}),
        in_file: Callable[[str, bool], InFile | None] = lambda *_: None,
    ) -> None:
        options.check(description)
        check_weights(description, source)
        self.description = description.at(options.capacity)
        self.options = options
        self._source = source
        self._weights = weights
        self._directory = directory
        self._rounding = options.rounding
        head = description.decoder.head.weight

        def keep_in_file(name: str) -> InFile | None:
            keeps = options.keeps_file_bits(name == head)
            return in_file(name, options.in_floats) if keeps else None

        self._quantizer = Quantizer(
            weights,
            self._rounding.scheme,
            own=self._rounding.products.own,
            given=rounded,
            in_file=keep_in_file,
        )

    @property
    def quantization(self) -> Quantization | None:
        """Quantization of the engines built so far. None if weights are not quantized."""
        if self.options.precision in FLOAT_TYPES:
            return None
        return Quantization(tuple(self._quantizer.engines), tuple(self._quantizer.higher))

    @property
    def weight_formats(self) -> dict[str, int]:
        """Number of matrices by stored format, if products are those of their exact values."""
        return self._quantizer.formats if self.options.in_floats else {}

    def shallow(self) -> None:
        """Build shallow.onnx: the embedding, layers 1..S, and the exit.

        The exit's layers and head are left out if they are an engine of their own.
        """
        graph = self._graph("shallow")
        tokens = graph.input("input_ids", INT64, ["B", "q"])
        call = self._decoder_call(graph, tokens)
        dialect = self._dialect(graph, call)
        layers = self.description.decoder.layers[: self.options.exit_layer]
        x = embed(graph, dialect, call, tokens, self.description.decoder.embedding)
        hidden = self._layers(graph, dialect, x, layers, 0)
        rows = self._output_hidden(graph, hidden, call, FLOAT, "q")
        if self.description.decoder.exit_layers and not self.description.exit_engine:
            self._own_exit(graph, dialect, call, rows)
        elif not self.description.exit_engine:
            wanted = head_rows(graph, None)
            self._head(graph, dialect, graph.op("Gather", [hidden, wanted], axis=0), None)
        self._save(graph)

    def _own_exit(self, graph: Graph, dialect: Dialect, call: CallInputs, hidden: ir.Value) -> None:
        """Add the exit's layers and head, which read `hidden` [B, q, d].

        The input `exit_lengths` int32 [B] is the number of rows of each sequence that they compute:
        all rows of the call, or none. In the standard dialect, which cannot pack rows, every
        sequence pays for them.
        """
        decoder = self.description.decoder
        rows = None
        assert decoder.exit_map is not None
        call = replace(call, query_lengths=graph.input("exit_lengths", INT32, ["B"]))
        if self.options.packed:
            rows = self._packing(graph, call, hidden, idle=True)
            dialect = self._dialect(graph, call, rows)
            x = rows.counted
        else:
            x = flat(graph, hidden, self.description.hidden_size)
        x = graph.to_float(linear(graph, graph.to_compute(x), decoder.exit_map))
        wanted = head_rows(graph, rows)
        x = decoder_layers(graph, dialect, x, decoder.exit_layers, exit_names(decoder), wanted)
        self._head(graph, dialect, x, None)

    def exit(self) -> None:
        """Build exit.onnx: the layers and head of an exit that reads a feature.

        It reads the states after layer S, or tokens if S is 0, and the features of the previous
        positions. The input of its head is also an output. It replaces a feature that is not known
        yet. An EAGLE-3 head does not read the first position, so the second one is in the first row
        of its cache.
        """
        graph = self._graph("exit")
        decoder = self.description.decoder
        width = self.description.hidden_size
        features = graph.input("features", FLOAT, ["B", "k", (decoder.exit_inputs - 1) * width])
        call = self._decoder_call(graph, features)
        if decoder.exit_fusion is not None:
            before = graph.op("Sub", [call.past_lengths, graph.constant(np.int32(1))])
            before = graph.op("Max", [before, graph.constant(np.int32(0))])  # of an idle sequence
            call = replace(call, past_lengths=before)
        if self.options.exit_layer:
            states = graph.input("hidden", FLOAT, ["B", "k", width])
        else:
            tokens = graph.input("input_ids", INT64, ["B", "k"])
            x = embed(graph, self._dialect(graph, call), call, tokens, decoder.embedding)
            states = graph.to_float(in_rows(graph, x, call))
        joined = graph.op("Concat", [states, features], axis=-1)
        joined.shape = ir.Shape(["B", "k", decoder.exit_inputs * width])
        joined.dtype = FLOAT
        rows = self._packing(graph, call, joined) if self.options.packed else None
        dialect = self._dialect(graph, call, rows)
        x = rows.counted if rows else flat(graph, joined, decoder.exit_inputs * width)
        embedded = None
        if decoder.exit_map is None:
            embedded, x = graph.ops("Split", [x, graph.constant([width, width])], 2, axis=-1)
        else:
            x = graph.to_float(linear(graph, graph.to_compute(x), decoder.exit_map))
        wanted = head_rows(graph, rows)
        x = decoder_layers(
            graph, dialect, x, decoder.exit_layers, exit_names(decoder), wanted, embedded
        )
        self._head(graph, dialect, x, None)
        self._save(graph)

    def deep(self) -> None:
        """Build deep.onnx: layers S+1..L and the head.

        For an exit that reads a feature it also outputs `features` of all rows: the normed states,
        after two earlier ones if the exit reads fused features, or the map of three states that an
        EAGLE-3 head reads.
        """
        graph = self._graph("deep")
        width = self.description.hidden_size
        stacked = graph.input("hidden", FLOAT, ["B", "k", width])
        call = self._decoder_call(graph, stacked)
        rows = self._packing(graph, call, stacked) if self.options.packed else None
        dialect = self._dialect(graph, call, rows)
        layers = self.description.decoder.layers
        hidden = rows.counted if rows else flat(graph, stacked, width)
        first = self.options.exit_layer
        earlier = []
        fusion = self.description.decoder.exit_fusion
        taps = fused_layers(self.description.exit_input, first, len(layers))
        for last in taps if fusion is None else fusion.layers:
            hidden = self._layers(graph, dialect, hidden, layers[first:last], first)
            earlier.append(hidden if fusion else unit_scaled(graph, dialect, hidden, width))
            first = last
        hidden = self._layers(graph, dialect, hidden, layers[first:], first)
        read = graph.op("Gather", [hidden, head_rows(graph, rows)], axis=0)
        self._head(graph, dialect, read, graph.input("emitted", INT64, ["R"]))
        if self.description.exit_engine:
            norm = self.description.decoder.head.norm
            if fusion is not None:
                joined = graph.op("Concat", earlier, axis=-1)
                features = graph.to_float(linear(graph, graph.to_compute(joined), fusion.linear))
            else:
                features = hidden if norm is None else dialect.norm(hidden, norm)
                if earlier:
                    features = graph.op("Concat", [*earlier, features], axis=-1)
            features = rows.in_rows(graph, features) if rows else in_rows(graph, features, call)
            size = FEATURE_STATES[self.description.exit_input] * width
            graph.output("features", features, FLOAT, ["B", "k", size])
        self._save(graph)

    def encoder(self) -> None:
        """Build encoder.onnx: `input_ids` int64 [B, E], `lengths` int32 [B] -> `hidden` [B, E, d].

        For speech the input is `features` float32 [B, bins, 2 E], with a fixed E.
        """
        encoder = self.description.encoder
        assert isinstance(encoder, EncoderStack)
        graph = self._graph("encoder")
        embedding = encoder.embedding
        if isinstance(embedding, Spectrogram):
            shape: list[Dimension] = ["B", embedding.bins, 2 * embedding.positions.count]
            features = graph.input("features", FLOAT, shape)
            x = embed_sound(graph, features, embedding, self._rounding.products.own)
            call = CallInputs(_size(graph, x), None)
            dialect = self._dialect(graph, call)
            x = flat(graph, x, self.description.hidden_size)
        else:
            tokens = graph.input("input_ids", INT64, ["B", "E"])
            call = CallInputs(_size(graph, tokens), graph.input("lengths", INT32, ["B"]))
            dialect = self._dialect(graph, call)
            x = embed(graph, dialect, call, tokens, embedding)
        hidden = encoder_layers(graph, dialect, x, encoder.layers, encoder.norm)
        self._output_hidden(graph, hidden, call, graph.compute, "E")
        self._save(graph)

    def prologue(self) -> None:
        """Build prologue.onnx: keys and values for cross-attention.

        `hidden` [B, E, d] -> `cross.{layer}.key|value` [B, kv_heads, E, cache width] of all decoder
        layers and the exit's layers.
        """
        graph = self._graph("prologue")
        width = self.description.hidden_size
        hidden = graph.input("hidden", graph.compute, ["B", "E", width])
        dialect = self._dialect(graph, CallInputs(_size(graph, hidden), hidden))
        x = flat(graph, hidden, width)
        decoder = self.description.decoder
        names = [*range(len(decoder.layers)), *exit_names(decoder)]
        for name, layer in zip(names, decoder.layers + decoder.exit_layers, strict=True):
            cross = layer.cross
            assert cross is not None
            key_value_outputs(graph, "cross", name, cross, "E", dialect.prompt_cache(x, cross))
        self._save(graph)

    def _save(self, graph: Graph) -> None:
        graph.save(self._directory / f"{graph.name}.onnx", self._passes(graph.name))

    def _passes(self, engine: str) -> list[ir.passes.InPlacePass]:
        plan = self.options.plan
        decoder = self.description.decoder
        encoder = self.description.encoder
        if plan is None:
            return []
        exits = engine in ("shallow", "exit") and decoder.exit_tokens
        head = exit_rows(decoder.head) if exits else decoder.head.weight
        if engine == "exit" and decoder.exit_fusion is not None and decoder.exit_head is not None:
            head = decoder.exit_head.weight
        wanted = self.options.wanted(self.description, engine, head)
        products = self._rounding.products
        passes: list[ir.passes.InPlacePass] = [
            QuantizeLinears(self._quantizer, products, engine, plan.linears(engine), wanted, head)
        ]
        if products.own:
            passes.append(FuseProducts())
        tables = {"shallow": decoder.embedding, "encoder": getattr(encoder, "embedding", None)}
        read = tables.get("shallow" if engine == "exit" and not self.options.exit_layer else engine)
        if self._rounding.embedding and isinstance(read, Embedding):
            table = read.table
            tied = products.own and table == decoder.head.weight
            # A 4-bit head would be too coarse a table.
            in_panels = self.options.in_floats or (tied and plan.head == "int8-block")
            panels = plan.head if in_panels else None
            passes.append(QuantizeEmbedding(self._quantizer, table, panels))
        return passes

    def _graph(self, name: str) -> Graph:
        compute = FLOAT_TYPES[self.options.float_type]
        cache = CACHE_TYPES[self.options.cache_type(self.description)]
        return Graph(name, self._source, self._weights, compute, cache)

    def _dialect(self, graph: Graph, call: CallInputs, packed: Packing | None = None) -> Dialect:
        rows = self.options.capacity + self.options.max_pending
        if self.options.own_attention(self.description):
            return KernelDialect(graph, call, rows, packed, exact=self.options.in_floats)
        if self.options.dialect == "ort":
            return OrtDialect(graph, call, rows, packed)
        return StandardDialect(graph, call, rows, fixed=self.options.target == "tensorrt")

    def _packing(self, graph: Graph, call: CallInputs, x: ir.Value, idle: bool = False) -> Packing:
        return packing(graph, call, x, idle, self.options.own_attention(self.description))

    def _decoder_call(self, graph: Graph, rows: ir.Value) -> CallInputs:
        past = graph.input("past_lengths", INT32, ["B"])
        query = graph.input("query_lengths", INT32, ["B"])
        prompts = "P" if self.options.shares_prompts(self.description) else "B"
        cross = graph.input("cross_lengths", INT32, [prompts]) if self.description.encoder else None
        return CallInputs(_size(graph, rows), query, past, cross)

    def _layers(
        self, graph: Graph, dialect: Dialect, x: ir.Value, layers: tuple[Layer, ...], first: int
    ) -> ir.Value:
        return decoder_layers(graph, dialect, x, layers, range(first, first + len(layers)))

    def _head(
        self,
        graph: Graph,
        dialect: Dialect,
        hidden: ir.Value,
        emitted: ir.Value | None,
    ) -> None:
        # A shallow step reads one row at a time, so the deep engine's prepacked copy is enough.
        packed = emitted is not None or self.options.dialect != "ort"
        decoder = self.description.decoder
        shallow = emitted is None
        head = (decoder.exit_head or decoder.head) if shallow else decoder.head
        head_outputs(
            graph,
            dialect,
            hidden,
            head,
            vocabulary=self.description.vocab_size,
            confidence=self.options.confidence,
            emitted=emitted,
            packed=packed,
            tokens=np.array(head.tokens, np.int64) if head.tokens else None,
            reads=self.description.exit_input if shallow else "state",
        )

    def _output_hidden(
        self, graph: Graph, hidden: ir.Value, call: CallInputs, dtype: ir.DataType, rows: str
    ) -> ir.Value:
        """Output `hidden` [M, d] as [B, rows, d]."""
        width = self.description.hidden_size
        shape = graph.op("Concat", [call.size, graph.constant([width])], axis=0)
        shaped = graph.op("Reshape", [hidden, shape])
        graph.output("hidden", shaped, dtype, ["B", rows, width])
        return shaped


def exit_names(decoder: DecoderStack) -> list[str]:
    """Return the cache names of the exit's layers."""
    return [f"exit.{number}" for number in range(len(decoder.exit_layers))]


def _size(graph: Graph, x: ir.Value) -> ir.Value:
    """Return the first two dimensions of `x`, int64 [2]."""
    return graph.op("Shape", [x], start=0, end=2)


def engine_names(description: Description) -> list[str]:
    """Return the names of a model's engines, in the order in which they are built and run."""
    exits = ["exit"] if description.exit_engine else []
    return [*(["encoder", "prologue"] if description.encoder else []), "shallow", *exits, "deep"]
