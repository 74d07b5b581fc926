"""ONNX Runtime's fused operators (com.microsoft), or our own for the attention of decoders (docs/precision.md):
attention reads and extends the KV cache in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Norm, RelativeBias
from graphs.dialects.base import (
    Call,
    Packing,
    bias_of_distances,
    by_distance,
    flat,
    head_norm,
    in_rows,
    linear,
    query_key_value,
    query_positions,
    rotary_tables,
)
from graphs.errors import GraphError
from graphs.graph import MICROSOFT, Dimension, Graph
from runtime.kernels import DOMAIN


def fits_head_size(attention: Attention) -> bool:
    """Whether GroupQueryAttention has a kernel for heads of this size."""
    return attention.head_dim % _head_step(attention) == 0


def check_head_size(attention: Attention) -> None:
    """GraphError where GroupQueryAttention has no kernel for heads of this size."""
    if not fits_head_size(attention):
        raise GraphError(f"{misfit(attention)}; choose --dialect standard")


def misfit(attention: Attention) -> str:
    """Why heads of this size do not fit."""
    return (
        f"attention heads of size {attention.head_dim} do not fit the ort dialect, whose operator needs "
        f"a multiple of {_head_step(attention)}"
    )


def _head_step(attention: Attention) -> int:
    return 16 if attention.rotary else 8


class OrtDialect:
    """See graphs.dialects.base.Dialect. `cache_rows` is the most rows a KV cache of the bundle has.

    `packing`: between attentions there are the rows that count only.
    """

    def __init__(
        self,
        graph: Graph,
        call: Call,
        cache_rows: int = 0,
        packing: Packing | None = None,
    ) -> None:
        self.graph, self.call, self.cache_rows = graph, call, cache_rows
        # [M, d] -> query, key and value in one, [M, (heads + 2 kv_heads) * head_dim]
        self.project: Callable[[Graph, ir.Value, Attention], ir.Value] = query_key_value
        self._biases: dict[str, ir.Value] = {}
        self._packing = packing

    @cached_property
    def _total(self) -> ir.Value:
        assert self.call.past_lengths is not None
        return self.graph.op("Add", [self.call.past_lengths, self.call.query_lengths])

    @cached_property
    def _last(self) -> ir.Value:
        graph, one, zero = self.graph, np.int32(1), np.int32(0)
        # An idle row has nothing before it and nothing new: the operator wants 0 there, not -1.
        last = graph.op("Sub", [self._total, graph.constant(one)])
        return graph.op("Max", [last, graph.constant(zero)])

    @cached_property
    def _longest(self) -> ir.Value:
        longest = self.graph.op("ReduceMax", [self._total, self.graph.constant([0])], keepdims=0)
        if self._packing is None or not self._packing.idle:
            return longest
        # The operator wants no fewer than the rows of the call, also where all of them are idle.
        rows = self.graph.op("Gather", [self.call.size, self.graph.constant(np.int64(1))], axis=0)
        return self.graph.op("Max", [longest, self.graph.cast(rows, ir.DataType.INT32)])

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        weight = self.graph.weight(norm.weight, dtype=ir.DataType.FLOAT)
        return self.graph.op("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=norm.epsilon, stash_type=1)

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        weight = self.graph.weight(norm.weight, dtype=ir.DataType.FLOAT)
        normed, _, _, total = self.graph.ops(
            "SkipSimplifiedLayerNormalization", [x, delta, weight], 4, MICROSOFT, epsilon=norm.epsilon
        )
        return total, normed

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph = self.graph
        heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
        packed = self.project(graph, x, attention)
        query, key, value = self._split(packed, attention)
        cos, sin = rotary_tables(graph, attention.rotary, self.cache_rows) if attention.rotary else (None, None)
        shape: list[Dimension] = ["B", kv_heads, "cache", size]
        past = [graph.input(f"past.{layer}.{part}", graph.compute, shape) for part in ("key", "value")]
        inputs = [query, key, value, *past, self._last, self._longest, cos, sin, None, self._bias(attention)]
        inputs += [None] * 5 + [self.call.query_lengths]
        out, *present = graph.ops(
            "GroupQueryAttention",
            inputs,
            3,
            MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=attention.scale,
            do_rotary=int(attention.rotary is not None),
            local_window_size=attention.window or -1,
        )
        for part, written in zip(("key", "value"), present, strict=True):
            graph.output(f"present.{layer}.{part}", written, graph.compute, shape)
        return self._flat(out, heads * size)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call = self.graph, self.call
        width = attention.heads * attention.head_dim
        query = self._in_rows(linear(graph, x, attention.query))
        shape: list[Dimension] = ["B", attention.kv_heads, "E", attention.head_dim]
        key, value = (graph.input(f"cross.{layer}.{part}", graph.compute, shape) for part in ("key", "value"))
        out = self._attend(query, key, value, attention, call.cross_lengths, None)
        return self._flat(out, width)

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        graph, call = self.graph, self.call
        width = attention.heads * attention.head_dim
        packed = query_key_value(graph, x, attention)
        parts = graph.ops("Split", [packed], 3, axis=-1, num_outputs=3)
        query, key, value = map(self._in_rows, parts)
        out = self._attend(query, key, value, attention, call.query_lengths, self._bias(attention))
        return self._flat(out, width)

    def _split(self, packed: ir.Value, attention: Attention) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """GroupQueryAttention takes query, key and value packed, unless a norm stands in between."""
        graph, size = self.graph, attention.head_dim
        if attention.query_norm is None and attention.key_norm is None:
            return self._in_rows(packed), None, None
        widths = [attention.heads * size, attention.kv_heads * size, attention.kv_heads * size]
        query, key, value = graph.ops("Split", [packed, graph.constant(widths)], 3, axis=-1)
        query = head_norm(graph, self, query, attention.query_norm, attention.heads, size)
        key = head_norm(graph, self, key, attention.key_norm, attention.kv_heads, size)
        return self._in_rows(query), self._in_rows(key), self._in_rows(value)

    def _in_rows(self, x: ir.Value) -> ir.Value:
        """[M, n] -> [B, rows, n]."""
        if self._packing is not None:
            return self._packing.in_rows(self.graph, x)
        return in_rows(self.graph, x, self.call)

    def _flat(self, x: ir.Value, width: int) -> ir.Value:
        """[B, rows, width] -> [M, width]."""
        return self._packing.packed(self.graph, x) if self._packing is not None else flat(self.graph, x, width)

    def _attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        attention: Attention,
        lengths: ir.Value | None,
        bias: ir.Value | None,
    ) -> ir.Value:
        return self.graph.op(
            "MultiHeadAttention",
            [query, key, value, None, lengths, bias],
            MICROSOFT,
            num_heads=attention.heads,
            scale=attention.scale,
        )

    def _bias(self, attention: Attention) -> ir.Value | None:
        """Relative bias over all keys of the call; layers that share a table share the result."""
        bias = attention.relative_bias
        if bias is None:
            return None
        if bias.table not in self._biases:
            self._biases[bias.table] = self._expand(bias)
        return self._biases[bias.table]

    def _expand(self, bias: RelativeBias) -> ir.Value:
        graph = self.graph
        queries = query_positions(graph, self.call)
        if self.call.past_lengths is None:
            keys = graph.op("Squeeze", [queries, graph.constant([0])])
        else:
            last = graph.cast(self._longest, ir.DataType.INT64)
            keys = graph.op("Range", [graph.constant(np.int64(0)), last, graph.constant(np.int64(1))])
        return bias_of_distances(graph, bias, queries, keys)


def has_attention_kernel(attention: Attention) -> bool:
    """Whether our own attention takes heads of this size."""
    return attention.head_dim >= 16 and attention.head_dim % 8 == 0


class KernelDialect(OrtDialect):
    """See graphs.dialects.base.Dialect. Attention gives a row the same bits in every call, and takes rows as they stand
    between attentions, with padding or, with `packing`, without."""

    def __init__(self, graph: Graph, call: Call, cache_rows: int, packing: Packing | None) -> None:
        super().__init__(graph, call, cache_rows, packing)
        self._tables: dict[str, ir.Value] = {}

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call, heads, kv_heads = self.graph, self.call, attention.heads, attention.kv_heads
        rows = self.project(graph, x, attention)
        shape: list[Dimension] = ["B", kv_heads, "cache", attention.head_dim]
        past = [graph.input(f"past.{layer}.{part}", graph.compute, shape) for part in ("key", "value")]
        cos, sin = rotary_tables(graph, attention.rotary, self.cache_rows) if attention.rotary else (None, None)
        norms = (attention.query_norm, attention.key_norm)
        weights = [None if norm is None else graph.weight(norm.weight, dtype=ir.DataType.FLOAT) for norm in norms]
        out, *present = graph.ops(
            "CachedAttention",
            [rows, *past, call.past_lengths, call.query_lengths, cos, sin, self._by_distance(attention), *weights],
            3,
            DOMAIN,
            num_heads=heads,
            kv_num_heads=kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            window=attention.window or 0,
            packed=int(self._packing is not None),
            epsilon=next((norm.epsilon for norm in norms if norm), 0.0),
        )
        for part, written in zip(("key", "value"), present, strict=True):
            graph.output(f"present.{layer}.{part}", written, graph.compute, shape)
        out.type, out.shape = ir.TensorType(graph.compute), ir.Shape([None, heads * attention.head_dim])
        return out

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call, heads, kv_heads = self.graph, self.call, attention.heads, attention.kv_heads
        width = heads * attention.head_dim
        rows = linear(graph, x, attention.query)
        shape: list[Dimension] = ["B", kv_heads, "E", attention.head_dim]
        prompt = [graph.input(f"cross.{layer}.{part}", graph.compute, shape) for part in ("key", "value")]
        out = graph.op(
            "CrossAttention",
            [rows, *prompt, call.cross_lengths, call.query_lengths],
            DOMAIN,
            num_heads=heads,
            kv_num_heads=kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            packed=int(self._packing is not None),
        )
        out.type, out.shape = ir.TensorType(graph.compute), ir.Shape([None, width])
        return out

    def best_two(self, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """[R, V] -> the indices of the best two int64 [R, 2], and the logarithm of the sum of exponentials [R]."""
        top, log_sum = self.graph.ops("BestTwo", [logits], 2, DOMAIN)
        top.type, top.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None, 2])
        log_sum.type, log_sum.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None])
        return top, log_sum

    def _by_distance(self, attention: Attention) -> ir.Value | None:
        """The bias of each distance [reach + 1, heads]; layers share a table."""
        bias = attention.relative_bias
        if bias is None:
            return None
        if bias.table not in self._tables:
            self._tables[bias.table] = self._table(bias)
        return self._tables[bias.table]

    def _table(self, bias: RelativeBias) -> ir.Value:
        table = by_distance(self.graph.read(bias.table), bias)
        return self.graph.table(f"{bias.table}.by_distance", table)
