"""Shared by the two ways to write a decoder in ONNX: norms, attention and the KV cache as an interface, projections,
rotary tables, relative bias (Raffel et al., JMLR 2020, section 2.1), rows without padding. Activations are flat: [M, d]
with M = batch * rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Embedding, Linear, Norm, Positions, RelativeBias, Rotary, Spectrogram
from graphs.graph import STACK, Dimension, Graph
from runtime.kernels import DOMAIN


@dataclass(frozen=True)
class Call:
    """The inputs of an engine call that attention needs. Lengths are int32 [B]; `size` is int64 [2]: B and rows. In an
    encoder `past_lengths` is None and `query_lengths` are the lengths of the prompts, None where all are whole."""

    size: ir.Value
    query_lengths: ir.Value | None
    past_lengths: ir.Value | None = None
    cross_lengths: ir.Value | None = None


class Dialect(Protocol):
    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        """The norm over the last axis, computed in fp32. `x` and the result are float32 [M, d]."""

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        """x + delta, and its norm; all float32 [M, d]."""

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        """Causal attention over the KV cache of a layer, which it extends in place. [M, d] -> [M, heads * head_dim]."""

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        """Attention over the prompt's keys and values of a layer. [M, d] -> [M, heads * head_dim]."""

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        """Attention of all prompt positions to each other. [M, d] -> [M, heads * head_dim]."""


def linear(graph: Graph, x: ir.Value, layer: Linear) -> ir.Value:
    """[M, inputs] -> [M, outputs], in the compute type."""
    return stacked_linear(graph, x, [layer])


def stacked_linear(graph: Graph, x: ir.Value, layers: Sequence[Linear]) -> ir.Value:
    """Several linear layers of one input as one product: [M, inputs] -> [M, sum of outputs]."""
    weight = graph.stacked_weight([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        return graph.op("Gemm", [x, weight], transB=1)
    if len(biases) == len(layers):
        return graph.op("Gemm", [x, weight, graph.stacked_weight(biases)], transB=1)
    # Whisper's keys have none: zeros stand for it.
    parts = [
        np.zeros(graph.shape(one.weight)[0], np.float32) if one.bias is None else graph.read(one.bias) for one in layers
    ]
    return graph.op("Gemm", [x, weight, graph.table(f"{STACK.join(biases)}.filled", np.concatenate(parts))], transB=1)


def query_key_value(graph: Graph, x: ir.Value, attention: Attention) -> ir.Value:
    """[M, d] -> [M, (heads + 2 kv_heads) * head_dim], query first."""
    return stacked_linear(graph, x, [attention.query, attention.key, attention.value])


def key_value_inputs(
    graph: Graph, prefix: str, layer: int | str, attention: Attention, rows: Dimension
) -> list[ir.Value]:
    """Inputs `{prefix}.{layer}.key|value` [B, kv_heads, rows, head_dim]."""
    shape: list[Dimension] = ["B", attention.kv_heads, rows, attention.head_dim]
    return [graph.input(f"{prefix}.{layer}.{part}", graph.cache, shape) for part in ("key", "value")]


def key_value_outputs(
    graph: Graph, prefix: str, layer: int | str, attention: Attention, rows: Dimension, values: Sequence[ir.Value]
) -> None:
    """Outputs `{prefix}.{layer}.key|value` [B, kv_heads, rows, head_dim]."""
    shape: list[Dimension] = ["B", attention.kv_heads, rows, attention.head_dim]
    for part, value in zip(("key", "value"), values, strict=True):
        graph.output(f"{prefix}.{layer}.{part}", value, graph.cache, shape)


def in_heads(graph: Graph, x: ir.Value, call: Call, heads: int, head_dim: int) -> ir.Value:
    """[M, heads * head_dim] -> [B, heads, rows, head_dim]."""
    shape = graph.op("Concat", [call.size, graph.constant([heads, head_dim])], axis=0)
    return graph.op("Transpose", [graph.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])


def in_rows(graph: Graph, x: ir.Value, call: Call) -> ir.Value:
    """[M, n] -> [B, rows, n]."""
    return graph.op("Reshape", [x, graph.op("Concat", [call.size, graph.constant([-1])], axis=0)])


def flat(graph: Graph, x: ir.Value, width: int) -> ir.Value:
    """[B, rows, width] -> [M, width]."""
    return graph.op("Reshape", [x, graph.constant([-1, width])])


def head_norm(graph: Graph, dialect: Dialect, x: ir.Value, norm: Norm | None, heads: int, head_dim: int) -> ir.Value:
    """The norm of each head on its own (Qwen3). [M, heads * head_dim] -> the same."""
    if norm is None:
        return x
    heads_in_rows = graph.op("Reshape", [graph.to_float(x), graph.constant([-1, head_dim])])
    normed = graph.to_compute(dialect.norm(heads_in_rows, norm))
    return graph.op("Reshape", [normed, graph.constant([-1, heads * head_dim])])


def rotary_tables(graph: Graph, rotary: Rotary, positions: int) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of every position, [positions, pairs that are turned]."""
    # Angles in float32, as the models were trained and as Hugging Face computes them.
    frequencies = np.asarray(rotary.inverse_frequencies, np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None]
    # Equal tables share a name.
    digest = hashlib.sha256(frequencies.tobytes() + repr(rotary.scale).encode()).hexdigest()[:8]
    cos, sin = (
        graph.table(f"rotary.{positions}.{digest}.{name}", (of(angles) * np.float32(rotary.scale)).astype(np.float32))
        for name, of in (("cos", np.cos), ("sin", np.sin))
    )
    return cos, sin


def norm_weights(graph: Graph, norm: Norm) -> list[ir.Value]:
    """The scale of a norm, and its bias where it has one."""
    names = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
    return [graph.weight(name, dtype=ir.DataType.FLOAT) for name in names]


def embed(graph: Graph, dialect: Dialect, call: Call, tokens: ir.Value, embedding: Embedding) -> ir.Value:
    """int64 [B, rows] -> float32 [M, d]."""
    x = graph.op("Gather", [graph.weight(embedding.table), graph.op("Reshape", [tokens, graph.constant([-1])])], axis=0)
    x = graph.to_float(x)
    if embedding.scale != 1.0:
        x = graph.op("Mul", [x, graph.constant(np.float32(embedding.scale))])
    if (positions := embedding.positions) is not None:
        width = graph.shape(embedding.table)[1]
        rows = position_rows(graph, positions, width)
        digest = hashlib.sha256(rows.tobytes()).hexdigest()[:8]  # equal tables share a name
        table = graph.table(f"positions.{digest}", rows, ir.DataType.FLOAT)
        # Padding may stand behind the last position.
        last = graph.constant(np.int64(positions.count - 1))
        added = graph.op("Gather", [table, graph.op("Min", [query_positions(graph, call), last])], axis=0)
        x = flat(graph, graph.op("Add", [in_rows(graph, x, call), added]), width)
    return x if embedding.norm is None else dialect.norm(x, embedding.norm)


def embed_sound(graph: Graph, features: ir.Value, spectrogram: Spectrogram) -> ir.Value:
    """Features float32 [B, bins, 2 * count] -> float32 [B, count, d]."""
    x = graph.to_compute(features)
    for stride, layer in enumerate(spectrogram.convolutions, 1):
        assert layer.bias is not None
        weights = [graph.weight(layer.weight), graph.weight(layer.bias)]
        x = graph.op("Gelu", [graph.op("Conv", [x, *weights], pads=[1, 1], strides=[stride])])
    x = graph.to_float(graph.op("Transpose", [x], perm=[0, 2, 1]))
    assert spectrogram.positions.table is not None
    return graph.op("Add", [x, graph.weight(spectrogram.positions.table, ir.DataType.FLOAT)])


def position_rows(graph: Graph, positions: Positions, width: int) -> np.ndarray:
    """float32 [count, width]."""
    if positions.table is not None:
        return graph.read(positions.table)[positions.offset : positions.offset + positions.count]
    steps = np.arange(positions.offset, positions.offset + positions.count)
    angles = steps[:, None] * np.asarray(positions.frequencies)[None]
    waves = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((len(steps), width))], axis=1)
    return waves[:, :width].astype(np.float32)


def query_positions(graph: Graph, call: Call) -> ir.Value:
    """Absolute position of each row, int64 [B, rows]."""
    rows = graph.op("Squeeze", [graph.op("Slice", [call.size, graph.constant([1]), graph.constant([2])])])
    steps = graph.op("Range", [graph.constant(np.int64(0)), rows, graph.constant(np.int64(1))])
    if call.past_lengths is None:
        return graph.op("Unsqueeze", [steps, graph.constant([0])])
    past = graph.op("Unsqueeze", [graph.cast(call.past_lengths, ir.DataType.INT64), graph.constant([1])])
    return graph.op("Add", [past, steps])


def bias_of_distances(graph: Graph, bias: RelativeBias, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """Relative bias [B, heads, rows, T] for query positions int64 [B, rows] and key positions int64 [T]."""
    reach, table = bias.max_distance, distance_table(graph, bias)
    distance = graph.op("Sub", [graph.op("Unsqueeze", [queries, graph.constant([2])]), keys])  # [B, rows, T]
    if bias.bidirectional:
        low, high = np.int64(-reach), np.int64(reach)
        index = graph.op("Clip", [graph.op("Neg", [distance]), graph.constant(low), graph.constant(high)])
        index = graph.op("Add", [index, graph.constant(np.int64(reach))])
    else:
        index = graph.op("Clip", [distance, graph.constant(np.int64(0)), graph.constant(np.int64(reach))])
    return graph.op("Transpose", [graph.op("Gather", [table, index], axis=0)], perm=[0, 3, 1, 2])


def buckets(distance: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """Bucket of each signed distance key - query. Half the buckets are exact, the others grow logarithmically."""
    count, offset = bias.buckets, np.zeros_like(distance)
    if bias.bidirectional:
        count //= 2
        offset = np.where(distance > 0, count, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = count // 2
    # In float32, operation by operation, as the models were trained: the edges of buckets depend on it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(np.log(bias.max_distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + grown.astype(np.int64), count - 1)
    return offset + np.where(distance < exact, distance, far)


def by_distance(table: np.ndarray, bias: RelativeBias) -> np.ndarray:
    """The bias of every distance that has its own: [max_distance + 1, heads] by query - key, or
    [2 max_distance + 1, heads] by key - query + max_distance where bidirectional. `table` [buckets, heads]."""
    reach = bias.max_distance
    distance = np.arange(-reach, reach + 1) if bias.bidirectional else -np.arange(reach + 1)
    return np.ascontiguousarray(table[buckets(distance, bias)])


def distance_table(graph: Graph, bias: RelativeBias) -> ir.Value:
    """`by_distance` of a checkpoint's table, which is tiny and read at once: this replaces it in the bundle."""
    return graph.table(f"{bias.table}.by_distance", by_distance(graph.read(bias.table), bias))


@dataclass(frozen=True)
class Packing:
    """`counted` float32 [N, d]: the rows that count of what was packed. `rows` int64 [B * rows]: which of them each row
    of the call is; of padding, any. `size` int64 [2]: B and rows. `valid` int64 [N, 2]: sequence and row of each that
    counts, which attention that takes padding needs. `idle`: in some calls no row counts."""

    counted: ir.Value
    rows: ir.Value
    size: ir.Value
    valid: ir.Value | None = None
    idle: bool = False

    def packed(self, graph: Graph, x: ir.Value) -> ir.Value:
        """[B, rows, n] -> [N, n]."""
        assert self.valid is not None
        return graph.op("GatherND", [x, self.valid])

    def in_rows(self, graph: Graph, x: ir.Value) -> ir.Value:
        """[N, n] -> [B, rows, n]."""
        if self.idle:  # padding has a row to be
            x = graph.op("Pad", [x, graph.constant([0, 1]), None, graph.constant([0])])
        return graph.op("Gather", [x, graph.op("Reshape", [self.rows, self.size])], axis=0)


def packing(graph: Graph, call: Call, x: ir.Value, idle: bool = False, own: bool = False) -> Packing:
    """Pack `x` float32 [B, rows, d]; `idle` as there. `own`: by our own operator, for our own attention."""
    assert call.query_lengths is not None
    if own:
        counted, rows = graph.ops("CountedRows", [x, call.query_lengths], 2, DOMAIN)
        counted.type, rows.type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
        assert x.shape is not None
        counted.shape, rows.shape = ir.Shape([None, x.shape[2]]), ir.Shape([None])
        return Packing(counted, rows, call.size, None, idle)
    longest = graph.op("Gather", [call.size, graph.constant(np.int64(1))], axis=0)
    first, one = graph.constant(np.int64(0)), graph.constant(np.int64(1))
    steps = graph.op("Range", [first, longest, one])
    lengths = graph.op("Unsqueeze", [graph.cast(call.query_lengths, ir.DataType.INT64), graph.constant([1])])
    counts = graph.op("Less", [steps, lengths])  # [B, rows]
    valid = graph.op("Transpose", [graph.op("NonZero", [counts])], perm=[1, 0])
    flags = graph.op("Reshape", [graph.cast(counts, ir.DataType.INT64), graph.constant([-1])])
    before = graph.op("Sub", [graph.op("CumSum", [flags, first]), one])
    rows = graph.op("Max", [before, first])
    return Packing(graph.op("GatherND", [x, valid]), rows, call.size, valid, idle)
