"""Parts that both ONNX dialects share.

Covers the `Dialect` interface, projections, rotary tables, relative bias (Raffel et al., JMLR 2020,
section 2.1) and packing of rows without padding. Activations are flat, [M, d] with M = batch *
rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphs.description import (
    Attention,
    Embedding,
    Linear,
    Norm,
    Positions,
    RelativeBias,
    Rotary,
    Spectrogram,
)
from graphs.graph import STACK, Dimension, Graph
from runtime.bundle.manifest import cached_width
from runtime.engines.kernels import DOMAIN


@dataclass(frozen=True)
class CallInputs:
    """Inputs of an engine call that attention needs.

    Attributes:
        size: int64 [2], batch size and rows.
        query_lengths: int32 [B], rows of each sequence in this call. In an encoder: prompt lengths,
            or None if there is no padding.
        past_lengths: int32 [B], valid cache positions before the call. None in an encoder.
        cross_lengths: int32 [P], prompt lengths for cross-attention. B / P neighboring sequences
            share a prompt; P is B in the standard dialect. None without an encoder.
    """

    size: ir.Value
    query_lengths: ir.Value | None
    past_lengths: ir.Value | None = None
    cross_lengths: ir.Value | None = None


class Dialect(Protocol):
    rms_norm: str  # the operator that divides by the root mean square, in the default domain

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        """Normalize over the last axis in fp32. `x` and the result are float32 [M, d]."""

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        """Return x + delta and its norm, all float32 [M, d]."""

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        """Causal attention over a layer's KV cache, which it extends in place.

        [M, d] -> [M, heads * head_dim].
        """

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        """Attention over the prompt's keys and values. [M, d] -> [M, heads * head_dim]."""

    def joined_attention(
        self, x: ir.Value, attention: Attention, cross: Attention, layer: int | str
    ) -> ir.Value:
        """Attention over a layer's KV cache and the prompt's keys and values, in one softmax.

        [M, d] -> [M, heads * head_dim].
        """

    def prompt_cache(self, x: ir.Value, attention: Attention) -> Sequence[ir.Value]:
        """Keys and values of prompts for cross-attention.

        [M, d] -> twice [B, kv_heads, rows, cache width].
        """

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        """Bidirectional attention over the prompt. [M, d] -> [M, heads * head_dim]."""


def linear(graph: Graph, x: ir.Value, layer: Linear) -> ir.Value:
    """Apply a linear layer in the compute type. [M, inputs] -> [M, outputs]."""
    return stacked_linear(graph, x, [layer])


def stacked_linear(graph: Graph, x: ir.Value, layers: Sequence[Linear]) -> ir.Value:
    """Apply linear layers to one input as one product. [M, inputs] -> [M, sum of outputs]."""
    weight = graph.stacked_weight([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        return graph.op("Gemm", [x, weight], transB=1)
    if len(biases) == len(layers):
        return graph.op("Gemm", [x, weight, graph.stacked_weight(biases)], transB=1)
    # Whisper's keys have no bias: use zeros.
    parts = [_bias_or_zeros(graph, layer) for layer in layers]
    bias = graph.table(f"{STACK.join(biases)}.filled", np.concatenate(parts))
    return graph.op("Gemm", [x, weight, bias], transB=1)


def _bias_or_zeros(graph: Graph, layer: Linear) -> np.ndarray:
    if layer.bias is None:
        return np.zeros(graph.shape(layer.weight)[0], np.float32)
    return graph.read(layer.bias)


def query_key_value(graph: Graph, x: ir.Value, attention: Attention) -> ir.Value:
    """Project to query, key, value, in order. [M, d] -> [M, (heads + 2 kv_heads) * head_dim]."""
    return stacked_linear(graph, x, [attention.query, attention.key, attention.value])


def cross_query(graph: Graph, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
    """Project to the queries of cross-attention. [M, d] -> [M, heads * head_dim].

    With `outputs_query` they are also the output `query.{layer}`.
    """
    query = linear(graph, x, attention.query)
    if attention.outputs_query:
        shape: list[Dimension] = ["M", attention.heads * attention.head_dim]
        graph.output(f"query.{layer}", query, graph.compute, shape)
    return query


def key_value_inputs(
    graph: Graph,
    prefix: str,
    layer: int | str,
    attention: Attention,
    rows: Dimension,
    batch: Dimension = "B",
) -> list[ir.Value]:
    """Declare the inputs `{prefix}.{layer}.key|value` [batch, kv_heads, rows, cache width]."""
    width = cached_width(attention.head_dim, int(graph.cache.itemsize))
    shape: list[Dimension] = [batch, attention.kv_heads, rows, width]
    names = [f"{prefix}.{layer}.{part}" for part in ("key", "value")]
    return [graph.input(name, graph.cache, shape) for name in names]


def key_value_outputs(
    graph: Graph,
    prefix: str,
    layer: int | str,
    attention: Attention,
    rows: Dimension,
    values: Sequence[ir.Value],
) -> None:
    """Declare the outputs `{prefix}.{layer}.key|value` [B, kv_heads, rows, cache width]."""
    width = cached_width(attention.head_dim, int(graph.cache.itemsize))
    shape: list[Dimension] = ["B", attention.kv_heads, rows, width]
    for part, value in zip(("key", "value"), values, strict=True):
        graph.output(f"{prefix}.{layer}.{part}", value, graph.cache, shape)


def in_heads(graph: Graph, x: ir.Value, call: CallInputs, heads: int, head_dim: int) -> ir.Value:
    """Split into heads: [M, heads * head_dim] -> [B, heads, rows, head_dim]."""
    shape = graph.op("Concat", [call.size, graph.constant([heads, head_dim])], axis=0)
    return graph.op("Transpose", [graph.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])


def prompt_keys_and_values(
    graph: Graph, dialect: Dialect, x: ir.Value, attention: Attention
) -> tuple[ir.Value, ir.Value]:
    """Project to normed keys and values. [M, d] -> twice [M, kv_heads * head_dim]."""
    key, value = (linear(graph, x, part) for part in (attention.key, attention.value))
    if attention.key_norm is not None:
        sizes = (attention.kv_heads, attention.head_dim)
        key = head_norm(graph, dialect, key, attention.key_norm, *sizes)
    return key, value


def prompt_cache_in_heads(
    graph: Graph, dialect: Dialect, x: ir.Value, attention: Attention, call: CallInputs
) -> list[ir.Value]:
    """Implement `Dialect.prompt_cache` with standard operators, for a cache of floats."""
    sizes = (attention.kv_heads, attention.head_dim)
    parts = prompt_keys_and_values(graph, dialect, x, attention)
    values = [in_heads(graph, part, call, *sizes) for part in parts]
    if graph.cache != graph.compute:
        values = [graph.cast(value, graph.cache) for value in values]
    return values


def in_rows(graph: Graph, x: ir.Value, call: CallInputs) -> ir.Value:
    """Unflatten the batch: [M, n] -> [B, rows, n]."""
    return graph.op("Reshape", [x, graph.op("Concat", [call.size, graph.constant([-1])], axis=0)])


def flat(graph: Graph, x: ir.Value, width: int) -> ir.Value:
    """Flatten the batch: [B, rows, width] -> [M, width]."""
    return graph.op("Reshape", [x, graph.constant([-1, width])])


def head_norm(
    graph: Graph,
    dialect: Dialect,
    x: ir.Value,
    norm: Norm | None,
    heads: int,
    head_dim: int,
) -> ir.Value:
    """Normalize each head separately (Gemma 3, Qwen 3). [M, heads * head_dim] -> same shape."""
    if norm is None:
        return x
    heads_in_rows = graph.op("Reshape", [graph.to_float(x), graph.constant([-1, head_dim])])
    normed = graph.to_compute(dialect.norm(heads_in_rows, norm))
    return graph.op("Reshape", [normed, graph.constant([-1, heads * head_dim])])


def rotary_tables(graph: Graph, rotary: Rotary, positions: int) -> tuple[ir.Value, ir.Value]:
    """Return cosine and sine of every position, each [positions, rotated pairs]."""
    # Angles in float32: the models were trained so, and Hugging Face computes them so.
    frequencies = np.asarray(rotary.inverse_frequencies, np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None]
    # Equal tables share a name.
    digest = hashlib.sha256(frequencies.tobytes() + repr(rotary.scale).encode()).hexdigest()[:8]
    scale = np.float32(rotary.scale)
    cos = (np.cos(angles) * scale).astype(np.float32)
    sin = (np.sin(angles) * scale).astype(np.float32)
    prefix = f"rotary.{positions}.{digest}"
    return graph.table(f"{prefix}.cos", cos), graph.table(f"{prefix}.sin", sin)


def norm_weights(graph: Graph, norm: Norm) -> list[ir.Value]:
    """Return the scale of a norm, followed by its bias if it has one."""
    names = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    return [graph.weight(name, dtype=ir.DataType.FLOAT) for name in names]


def normalized(graph: Graph, x: ir.Value, norm: Norm, rms_norm: str) -> ir.Value:
    """Normalize over the last axis in fp32. `rms_norm` is the operator for RMS norms."""
    return graph.op(
        rms_norm if norm.kind == "rms" else "LayerNormalization",
        [x, *norm_weights(graph, norm)],
        axis=-1,
        epsilon=norm.epsilon,
        stash_type=1,
    )


def embed(
    graph: Graph,
    dialect: Dialect,
    call: CallInputs,
    tokens: ir.Value,
    embedding: Embedding,
) -> ir.Value:
    """Embed tokens int64 [B, rows] as float32 [M, d]."""
    table = graph.weight(embedding.table)
    x = graph.op("Gather", [table, graph.op("Reshape", [tokens, graph.constant([-1])])], axis=0)
    x = graph.to_float(x)
    if embedding.scale != 1.0:
        x = graph.op("Mul", [x, graph.constant(np.float32(embedding.scale))])
    if (positions := embedding.positions) is not None:
        width = graph.shape(embedding.table)[1]
        rows = position_rows(graph, positions, width)
        digest = hashlib.sha256(rows.tobytes()).hexdigest()[:8]  # equal tables share a name
        table = graph.table(f"positions.{digest}", rows, ir.DataType.FLOAT)
        # Padding may lie beyond the last position.
        last = graph.constant(np.int64(positions.count - 1))
        places = graph.op("Min", [query_positions(graph, call), last])
        added = graph.op("Gather", [table, places], axis=0)
        x = flat(graph, graph.op("Add", [in_rows(graph, x, call), added]), width)
    return x if embedding.norm is None else dialect.norm(x, embedding.norm)


def embed_sound(
    graph: Graph, features: ir.Value, spectrogram: Spectrogram, as_products: bool
) -> ir.Value:
    """Embed features float32 [B, bins, 2 * count] as float32 [B, count, d].

    Args:
        as_products: Multiply columns of three rows with a matrix. For Whisper base in int8, this
            takes 20 ms, and ONNX Runtime's convolutions, which stay in fp32, take 43 (Zen 4).
    """
    x = graph.to_compute(features)
    if as_products:
        rows = 2 * spectrogram.positions.count
        x = graph.op("Transpose", [x], perm=[0, 2, 1])
        for stride, layer in enumerate(spectrogram.convolutions, 1):
            x = _convolution_of_rows(graph, x, layer, rows, stride)
            rows //= stride
        x = graph.to_float(x)
    else:
        for stride, layer in enumerate(spectrogram.convolutions, 1):
            assert layer.bias is not None
            weights = [graph.weight(layer.weight), graph.weight(layer.bias)]
            x = graph.op("Gelu", [graph.op("Conv", [x, *weights], pads=[1, 1], strides=[stride])])
        x = graph.to_float(graph.op("Transpose", [x], perm=[0, 2, 1]))
    assert spectrogram.positions.table is not None
    return graph.op("Add", [x, graph.weight(spectrogram.positions.table, ir.DataType.FLOAT)])


def _convolution_of_rows(
    graph: Graph, x: ir.Value, layer: Linear, rows: int, stride: int
) -> ir.Value:
    """Convolve [B, rows, inputs] with width 3, with zeros at the ends, and apply a GELU.

    Returns [B, rows / stride, outputs].
    """
    assert layer.bias is not None
    outputs, inputs, width = graph.shape(layer.weight)
    axis = graph.constant([1])
    x = graph.op("Pad", [x, graph.constant([1, 1]), None, axis])
    step = graph.constant([stride])
    shifted = []
    for first in range(width):
        start = graph.constant([first])
        end = graph.constant([rows - stride + first + 1])
        shifted.append(graph.op("Slice", [x, start, end, axis, step]))
    columns = graph.op("Concat", shifted, axis=2)
    columns = graph.op("Reshape", [columns, graph.constant([-1, width * inputs])])
    matrix = graph.read(layer.weight).transpose(0, 2, 1).reshape(outputs, -1)
    weights = [graph.table(layer.weight, matrix), graph.weight(layer.bias)]
    x = graph.op("Gelu", [graph.op("Gemm", [columns, *weights], transB=1)])
    return graph.op("Reshape", [x, graph.constant([-1, rows // stride, outputs])])


def position_rows(graph: Graph, positions: Positions, width: int) -> np.ndarray:
    """Return the position embeddings, float32 [count, width]."""
    if positions.table is not None:
        return graph.read(positions.table)[positions.offset : positions.offset + positions.count]
    steps = np.arange(positions.offset, positions.offset + positions.count)
    angles = steps[:, None] * np.asarray(positions.frequencies)[None]
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((len(steps), width))], axis=1)
    return waves[:, :width].astype(np.float32)


def query_positions(graph: Graph, call: CallInputs) -> ir.Value:
    """Return the absolute position of each row, int64 [B, rows] (encoder: [1, rows])."""
    rows = graph.op("Slice", [call.size, graph.constant([1]), graph.constant([2])])
    rows = graph.op("Squeeze", [rows])
    steps = graph.op("Range", [graph.constant(np.int64(0)), rows, graph.constant(np.int64(1))])
    if call.past_lengths is None:
        return graph.op("Unsqueeze", [steps, graph.constant([0])])
    past = graph.cast(call.past_lengths, ir.DataType.INT64)
    past = graph.op("Unsqueeze", [past, graph.constant([1])])
    return graph.op("Add", [past, steps])


def bias_of_distances(
    graph: Graph,
    bias: RelativeBias,
    queries: ir.Value,
    keys: ir.Value,
) -> ir.Value:
    """Return the relative bias [B, heads, rows, T].

    Args:
        queries: Query positions, int64 [B, rows].
        keys: Key positions, int64 [T].
    """
    reach = bias.max_distance
    table = distance_table(graph, bias)
    # [B, rows, T]
    distance = graph.op("Sub", [graph.op("Unsqueeze", [queries, graph.constant([2])]), keys])
    if bias.bidirectional:
        negated = graph.op("Neg", [distance])
        low = graph.constant(np.int64(-reach))
        high = graph.constant(np.int64(reach))
        index = graph.op("Clip", [negated, low, high])
        index = graph.op("Add", [index, high])
    else:
        low = graph.constant(np.int64(0))
        high = graph.constant(np.int64(reach))
        index = graph.op("Clip", [distance, low, high])
    return graph.op("Transpose", [graph.op("Gather", [table, index], axis=0)], perm=[0, 3, 1, 2])


def buckets(distance: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """Return the bucket of each signed distance key - query.

    The first half of the buckets hold one distance each. The others grow logarithmically.
    """
    count = bias.buckets
    offset = np.zeros_like(distance)
    if bias.bidirectional:
        count //= 2
        offset = np.where(distance > 0, count, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    # Every operation in float32, as in training: the edges of the buckets depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(np.log(bias.max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + grown.astype(np.int64), count - 1)
    return offset + np.where(distance < exact, distance, far)


def by_distance(table: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """Expand a bias `table` [buckets, heads] to one row per distance up to `max_distance`.

    Returns [max_distance + 1, heads], indexed by query - key. If bidirectional, [2 max_distance +
    1, heads], indexed by key - query + max_distance.
    """
    reach = bias.max_distance
    distance = np.arange(-reach, reach + 1) if bias.bidirectional else -np.arange(reach + 1)
    return np.ascontiguousarray(table[buckets(distance, bias)])


def distance_table(graph: Graph, bias: RelativeBias) -> ir.Value:
    """Add `by_distance` of a checkpoint's table to the graph, in place of the table itself."""
    return graph.table(f"{bias.table}.by_distance", by_distance(graph.read(bias.table), bias))


@dataclass(frozen=True)
class Packing:
    """Rows of a call without padding.

    Attributes:
        counted: float32 [N, d], the valid rows of the packed tensor.
        rows: int64 [B * rows], index into `counted` of each row of the call. Arbitrary for padding.
        size: int64 [2], batch size and rows.
        valid: int64 [N, 2], sequence and row of each valid row. Needed by attention that reads
            padded rows.
        idle: Some calls have no valid row.
    """

    counted: ir.Value
    rows: ir.Value
    size: ir.Value
    valid: ir.Value | None = None
    idle: bool = False

    def packed(self, graph: Graph, x: ir.Value) -> ir.Value:
        """Remove padding: [B, rows, n] -> [N, n]."""
        assert self.valid is not None
        return graph.op("GatherND", [x, self.valid])

    def in_rows(self, graph: Graph, x: ir.Value) -> ir.Value:
        """Restore padding, with arbitrary values: [N, n] -> [B, rows, n]."""
        if self.idle:  # padding needs a row to index
            x = graph.op("Pad", [x, graph.constant([0, 1]), None, graph.constant([0])])
        return graph.op("Gather", [x, graph.op("Reshape", [self.rows, self.size])], axis=0)


def packing(
    graph: Graph,
    call: CallInputs,
    x: ir.Value,
    idle: bool = False,
    own: bool = False,
) -> Packing:
    """Pack `x` float32 [B, rows, d].

    Args:
        idle: Some calls have no valid row.
        own: Use this project's operator, for its attention kernels.
    """
    assert call.query_lengths is not None
    if own:
        counted, rows = graph.ops("CountedRows", [x, call.query_lengths], 2, DOMAIN)
        counted.type = ir.TensorType(ir.DataType.FLOAT)
        rows.type = ir.TensorType(ir.DataType.INT64)
        assert x.shape is not None
        counted.shape = ir.Shape([None, x.shape[2]])
        rows.shape = ir.Shape([None])
        return Packing(counted, rows, call.size, None, idle)
    longest = graph.op("Gather", [call.size, graph.constant(np.int64(1))], axis=0)
    first = graph.constant(np.int64(0))
    one = graph.constant(np.int64(1))
    steps = graph.op("Range", [first, longest, one])
    lengths = graph.cast(call.query_lengths, ir.DataType.INT64)
    lengths = graph.op("Unsqueeze", [lengths, graph.constant([1])])
    counts = graph.op("Less", [steps, lengths])  # [B, rows]
    valid = graph.op("Transpose", [graph.op("NonZero", [counts])], perm=[1, 0])
    flags = graph.op("Reshape", [graph.cast(counts, ir.DataType.INT64), graph.constant([-1])])
    before = graph.op("Sub", [graph.op("CumSum", [flags, first]), one])
    rows = graph.op("Max", [before, first])
    return Packing(graph.op("GatherND", [x, valid]), rows, call.size, valid, idle)
