"""ONNX opset 24 operators only: TensorScatter writes the KV cache, Attention reads it through a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Norm
from graphs.dialects.base import (
    Call,
    bias_of_distances,
    flat,
    head_norm,
    in_heads,
    key_value_inputs,
    linear,
    norm_weights,
    query_key_value,
    query_positions,
    rotary_tables,
)
from graphs.graph import Dimension, Graph

# Far enough below any score to vanish in the softmax, and finite in fp16.
MASKED = -30000.0


class StandardDialect:
    """See graphs.dialects.base.Dialect. `cache_rows` is the most rows a KV cache of the bundle has, and where the cache
    is `fixed`, as TensorRT wants it, also the least."""

    def __init__(self, graph: Graph, call: Call, cache_rows: int = 0, fixed: bool = False) -> None:
        self.graph, self.call, self.cache_rows = graph, call, cache_rows
        self._rows: Dimension = cache_rows if fixed else "cache"
        self._masks: dict[tuple[str | None, int | None], ir.Value] = {}
        self._cross_mask: ir.Value | None = None
        self._positions = query_positions(graph, call)
        if call.past_lengths is not None:
            self._past = graph.cast(call.past_lengths, ir.DataType.INT64)

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        kind = "RMSNormalization" if norm.kind == "rms" else "LayerNormalization"
        return self.graph.op(kind, [x, *norm_weights(self.graph, norm)], axis=-1, epsilon=norm.epsilon, stash_type=1)

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        total = self.graph.op("Add", [x, delta])
        return total, self.norm(total, norm)

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call, size = self.graph, self.call, attention.head_dim
        counts = (attention.heads, attention.kv_heads, attention.kv_heads)
        packed = query_key_value(graph, x, attention)
        query, key, value = graph.ops("Split", [packed, graph.constant([n * size for n in counts])], 3, axis=-1)
        query = head_norm(graph, self, query, attention.query_norm, attention.heads, size)
        key = head_norm(graph, self, key, attention.key_norm, attention.kv_heads, size)
        query, key, value = (
            in_heads(graph, part, call, heads, size) for part, heads in zip((query, key, value), counts, strict=True)
        )
        if attention.rotary:
            cos, sin = rotary_tables(graph, attention.rotary, self.cache_rows)
            turned = 2 * len(attention.rotary.inverse_frequencies)
            part_of: dict[str, Any] = {"rotary_embedding_dim": turned} if turned < size else {}
            query, key = (
                graph.op("RotaryEmbedding", [part, cos, sin, self._positions], **part_of) for part in (query, key)
            )
        present = [self._extend(f"{layer}.{part}", new, attention) for part, new in (("key", key), ("value", value))]
        mask = self._mask(attention, present[0])
        return self._attend(query, present[0], present[1], mask, attention)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call = self.graph, self.call
        query = in_heads(graph, linear(graph, x, attention.query), call, attention.heads, attention.head_dim)
        key, value = key_value_inputs(graph, "cross", layer, attention, "E")
        if self._cross_mask is None:
            assert call.cross_lengths is not None
            self._cross_mask = self._padding_mask(self._key_positions(key), call.cross_lengths)
        return self._attend(query, key, value, self._cross_mask, attention)

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        graph, call = self.graph, self.call
        parts = graph.ops("Split", [query_key_value(graph, x, attention)], 3, axis=-1, num_outputs=3)
        query, key, value = (in_heads(graph, p, call, attention.heads, attention.head_dim) for p in parts)
        bias = attention.relative_bias
        name = (bias.table if bias else None, None)
        if name not in self._masks:
            if call.query_lengths is None:
                return self._attend(query, key, value, None, attention)
            keys = graph.op("Squeeze", [self._positions, graph.constant([0])])
            mask = self._padding_mask(keys, call.query_lengths)
            if bias is not None:
                mask = graph.op("Add", [bias_of_distances(graph, bias, self._positions, keys), mask])
            self._masks[name] = mask
        return self._attend(query, key, value, self._masks[name], attention)

    def _extend(self, name: str, new: ir.Value, attention: Attention) -> ir.Value:
        """A cache with the new rows written behind the valid ones."""
        graph = self.graph
        shape: list[Dimension] = ["B", attention.kv_heads, self._rows, attention.head_dim]
        past = graph.input(f"past.{name}", graph.compute, shape)
        present = graph.op("TensorScatter", [past, new, self._past], axis=2, mode="linear")
        graph.output(f"present.{name}", present, graph.compute, shape)
        return present

    def _mask(self, attention: Attention, keys: ir.Value) -> ir.Value:
        """The tensor added to the scores, [B, 1 or heads, rows, cache]: the relative bias, and MASKED for what is
        unseen."""
        graph, bias = self.graph, attention.relative_bias
        name = (bias.table if bias else None, attention.window)
        if name not in self._masks:
            positions = self._key_positions(keys)
            queries = graph.op("Unsqueeze", [self._positions, graph.constant([2])])
            seen = graph.op("LessOrEqual", [positions, queries])
            if attention.window is not None:
                oldest = graph.op("Sub", [queries, graph.constant(np.int64(attention.window))])
                seen = graph.op("And", [seen, graph.op("Greater", [positions, oldest])])
            mask = graph.op("Unsqueeze", [self._additive(seen), graph.constant([1])])
            if bias is not None:
                table = bias_of_distances(graph, bias, self._positions, positions)
                mask = graph.op("Add", [table, mask])
            self._masks[name] = mask
        return self._masks[name]

    def _padding_mask(self, positions: ir.Value, lengths: ir.Value) -> ir.Value:
        """[B, 1, rows, T] for key positions [T] and valid lengths [B]."""
        graph = self.graph
        ends = graph.op("Unsqueeze", [graph.cast(lengths, ir.DataType.INT64), graph.constant([1])])
        mask = graph.op("Unsqueeze", [self._additive(graph.op("Less", [positions, ends])), graph.constant([1, 2])])
        rows = graph.op("Slice", [self.call.size, graph.constant([1]), graph.constant([2])])
        shape = graph.op("Concat", [graph.constant([1, 1]), rows, graph.constant([1])], axis=0)
        return graph.op("Expand", [mask, shape])

    def _additive(self, seen: ir.Value) -> ir.Value:
        graph = self.graph
        values = [graph.constant(np.asarray(number, graph.compute.numpy())) for number in (0.0, MASKED)]
        return graph.op("Where", [seen, *values])

    def _key_positions(self, keys: ir.Value) -> ir.Value:
        graph = self.graph
        length = graph.op("Squeeze", [graph.op("Shape", [keys], start=2, end=3)])
        return graph.op("Range", [graph.constant(np.int64(0)), length, graph.constant(np.int64(1))])

    def _attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, attention: Attention
    ) -> ir.Value:
        graph = self.graph
        capped: dict[str, Any] = {} if attention.softcap is None else {"softcap": attention.softcap}
        out = graph.op("Attention", [query, key, value, mask], scale=attention.scale, **capped)
        return flat(graph, graph.op("Transpose", [out], perm=[0, 2, 1, 3]), attention.heads * attention.head_dim)
