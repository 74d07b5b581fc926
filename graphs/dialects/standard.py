"""Dialect of standard ONNX operators, opset 24: TensorScatter and Attention with a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Norm, Rotary
from graphs.dialects.base import (
    CallInputs,
    bias_of_distances,
    cross_query,
    flat,
    head_norm,
    in_heads,
    key_value_inputs,
    normalized,
    prompt_cache_in_heads,
    query_key_value,
    query_positions,
    rotary_tables,
)
from graphs.graph import Dimension, Graph

# Low enough to vanish in the softmax, and finite in fp16.
MASKED = -30000.0


class StandardDialect:
    """Implements `graphs.dialects.base.Dialect` with standard operators.

    Args:
        cache_rows: Most rows of any KV cache of the bundle.
        fixed: The cache has exactly `cache_rows` rows, as TensorRT requires.
    """

    rms_norm = "RMSNormalization"

    def __init__(
        self, graph: Graph, call: CallInputs, cache_rows: int = 0, fixed: bool = False
    ) -> None:
        self.graph = graph
        self.call = call
        self.cache_rows = cache_rows
        self._fixed = fixed
        self._rows: Dimension = cache_rows if fixed else "cache"
        self._masks: dict[tuple[str | None, int | None], ir.Value] = {}
        self._cross_mask: ir.Value | None = None
        self._positions = query_positions(graph, call)
        if call.past_lengths is not None:
            self._past = graph.cast(call.past_lengths, ir.DataType.INT64)
            self._valid = self._valid_rows(call)

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        return normalized(self.graph, x, norm, self.rms_norm)

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        total = self.graph.op("Add", [x, delta])
        return total, self.norm(total, norm)

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        query, key, value = self._query_key_value(x, attention)
        keys = self._extend(f"{layer}.key", key, attention)
        values = self._extend(f"{layer}.value", value, attention)
        mask = self._mask(attention, keys)
        return self._attend(query, keys, values, mask, attention, self._valid)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        return self.attend_to_prompt(cross_query(self.graph, x, attention, layer), attention, layer)

    def attend_to_prompt(self, query: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        """Attend to the prompt's keys and values with queries of all rows, including padding.

        [B * rows, heads * head_dim] -> the same shape.
        """
        graph = self.graph
        call = self.call
        query = in_heads(graph, query, call, attention.heads, attention.head_dim)
        key, value = key_value_inputs(graph, "cross", layer, attention, "E")
        mask = self._prompt_mask(key)
        assert call.cross_lengths is not None
        lengths = None if self._fixed else graph.cast(call.cross_lengths, ir.DataType.INT64)
        return self._attend(query, key, value, mask, attention, lengths)

    def joined_attention(
        self, x: ir.Value, attention: Attention, cross: Attention, layer: int | str
    ) -> ir.Value:
        graph = self.graph
        query, key, value = self._query_key_value(x, attention)
        own = [
            self._extend(f"{layer}.{part}", new, attention)
            for part, new in (("key", key), ("value", value))
        ]
        if self._valid is not None:  # copy only the valid rows of the cache
            end = graph.op("ReduceMax", [self._valid, graph.constant([0])], keepdims=1)
            bounds = [graph.constant([0]), end, graph.constant([2])]
            own = [graph.op("Slice", [part, *bounds]) for part in own]
        prompt = key_value_inputs(graph, "cross", layer, cross, "E")
        masks = [self._mask(attention, own[0]), self._prompt_mask(prompt[0])]
        mask = graph.op("Concat", masks, axis=-1)
        keys, values = (
            graph.op("Concat", parts, axis=2) for parts in zip(own, prompt, strict=True)
        )
        return self._attend(query, keys, values, mask, attention)

    def prompt_cache(self, x: ir.Value, attention: Attention) -> Sequence[ir.Value]:
        return prompt_cache_in_heads(self.graph, self, x, attention, self.call)

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        graph = self.graph
        call = self.call
        query, key, value = self._query_key_value(x, attention)
        bias = attention.relative_bias
        name = (bias.table if bias else None, attention.window)
        if name not in self._masks:
            if call.query_lengths is None:
                return self._attend(query, key, value, None, attention)
            keys = graph.op("Squeeze", [self._positions, graph.constant([0])])
            mask = self._padding_mask(keys, call.query_lengths)
            if bias is not None:
                mask = graph.op(
                    "Add",
                    [bias_of_distances(graph, bias, self._positions, keys), mask],
                )
            if attention.window is not None:
                queries = graph.op("Unsqueeze", [self._positions, graph.constant([2])])
                back = graph.op("Sub", [queries, keys])
                window = graph.constant(np.int64(attention.window))
                ahead = graph.constant(np.int64(-attention.ahead))
                recent = graph.op("Less", [back, window])
                near = graph.op("And", [recent, graph.op("GreaterOrEqual", [back, ahead])])
                near = graph.op("Unsqueeze", [self._additive(near), graph.constant([1])])
                mask = graph.op("Add", [mask, near])
            self._masks[name] = mask
        return self._attend(query, key, value, self._masks[name], attention)

    def _query_key_value(
        self, x: ir.Value, attention: Attention
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Project to queries, keys and values with norms and rotary positions.

        [M, d] -> [B, heads or kv_heads, rows, head_dim] each.
        """
        graph = self.graph
        size = attention.head_dim
        counts = (attention.heads, attention.kv_heads, attention.kv_heads)
        packed = query_key_value(graph, x, attention)
        query, key, value = graph.ops(
            "Split",
            [packed, graph.constant([n * size for n in counts])],
            3,
            axis=-1,
        )
        query = head_norm(graph, self, query, attention.query_norm, attention.heads, size)
        key = head_norm(graph, self, key, attention.key_norm, attention.kv_heads, size)
        query, key, value = (
            in_heads(graph, part, self.call, count, size)
            for part, count in zip((query, key, value), counts, strict=True)
        )
        if attention.rotary:
            tables = self._rotary_tables(attention.rotary)
            rotated = 2 * len(attention.rotary.inverse_frequencies)
            partial: dict[str, Any] = {"rotary_embedding_dim": rotated} if rotated < size else {}
            query = graph.op("RotaryEmbedding", [query, *tables], **partial)
            key = graph.op("RotaryEmbedding", [key, *tables], **partial)
        return query, key, value

    def _rotary_tables(self, rotary: Rotary) -> list[ir.Value]:
        """Return the inputs of RotaryEmbedding after the rows that it rotates.

        A decoder reads tables of all positions of its cache. An encoder computes cosine and sine of
        its rows, since the length of a prompt does not depend on the cache.
        """
        graph = self.graph
        if self.call.past_lengths is not None:
            return [*rotary_tables(graph, rotary, self.cache_rows), self._positions]
        steps = graph.op("Unsqueeze", [self._positions, graph.constant([2])])
        pairs = np.asarray(rotary.inverse_frequencies, np.float32)
        digest = hashlib.sha256(pairs.tobytes()).hexdigest()[:8]  # kinds of layers differ
        frequencies = graph.table(f"rotary.{digest}", pairs, ir.DataType.FLOAT)
        angles = graph.op("Mul", [graph.cast(steps, ir.DataType.FLOAT), frequencies])
        shape = graph.op("Concat", [self.call.size, graph.constant([len(pairs)])], axis=0)
        scale = graph.constant(np.float32(rotary.scale))
        waves = [graph.op("Mul", [graph.op(wave, [angles]), scale]) for wave in ("Cos", "Sin")]
        return [graph.op("Expand", [graph.to_compute(wave), shape]) for wave in waves]

    def _extend(self, name: str, new: ir.Value, attention: Attention) -> ir.Value:
        """Return a cache with the new rows written after the valid ones."""
        graph = self.graph
        shape: list[Dimension] = ["B", attention.kv_heads, self._rows, attention.head_dim]
        past = graph.input(f"past.{name}", graph.compute, shape)
        present = graph.op("TensorScatter", [past, new, self._past], axis=2, mode="linear")
        graph.output(f"present.{name}", present, graph.compute, shape)
        return present

    def _valid_rows(self, call: CallInputs) -> ir.Value | None:
        """Return the number of valid rows of each cache, int64 [B].

        ONNX Runtime's fused kernels then read no more keys. The mask alone would make their cost
        follow the capacity. TensorRT is given the mask alone.
        """
        if self._fixed:
            return None
        graph = self.graph
        assert call.query_lengths is not None
        return graph.op("Add", [self._past, graph.cast(call.query_lengths, ir.DataType.INT64)])

    def _mask(self, attention: Attention, keys: ir.Value) -> ir.Value:
        """Return the tensor that is added to the scores, [B, 1 or heads, rows, cache].

        It holds the relative bias, and MASKED for positions that a query must not attend to.
        """
        graph = self.graph
        bias = attention.relative_bias
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

    def _prompt_mask(self, key: ir.Value) -> ir.Value:
        """Return the mask of cross-attention, [B, 1, rows, E], for keys of a prompt."""
        if self._cross_mask is None:
            assert self.call.cross_lengths is not None
            positions = self._key_positions(key)
            self._cross_mask = self._padding_mask(positions, self.call.cross_lengths)
        return self._cross_mask

    def _padding_mask(self, positions: ir.Value, lengths: ir.Value) -> ir.Value:
        """Return the mask [B, 1, rows, T] for key positions [T] and valid lengths [B]."""
        graph = self.graph
        ends = graph.op("Unsqueeze", [graph.cast(lengths, ir.DataType.INT64), graph.constant([1])])
        mask = graph.op(
            "Unsqueeze",
            [self._additive(graph.op("Less", [positions, ends])), graph.constant([1, 2])],
        )
        rows = graph.op("Slice", [self.call.size, graph.constant([1]), graph.constant([2])])
        shape = graph.op("Concat", [graph.constant([1, 1]), rows, graph.constant([1])], axis=0)
        return graph.op("Expand", [mask, shape])

    def _additive(self, seen: ir.Value) -> ir.Value:
        graph = self.graph
        dtype = graph.compute.numpy()
        zero = graph.constant(np.asarray(0.0, dtype))
        masked = graph.constant(np.asarray(MASKED, dtype))
        return graph.op("Where", [seen, zero, masked])

    def _key_positions(self, keys: ir.Value) -> ir.Value:
        graph = self.graph
        length = graph.op("Squeeze", [graph.op("Shape", [keys], start=2, end=3)])
        return graph.op("Range", [graph.constant(np.int64(0)), length, graph.constant(np.int64(1))])

    def _attend(
        self,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        mask: ir.Value | None,
        attention: Attention,
        lengths: ir.Value | None = None,
    ) -> ir.Value:
        """Attend with an additive mask. `lengths` int64 [B] counts the valid keys."""
        graph = self.graph
        capped: dict[str, Any] = {} if attention.softcap is None else {"softcap": attention.softcap}
        inputs = [query, key, value, mask]
        if lengths is not None:
            inputs += [None, None, lengths]
        out = graph.op("Attention", inputs, scale=attention.scale, **capped)
        return flat(
            graph,
            graph.op("Transpose", [out], perm=[0, 2, 1, 3]),
            attention.heads * attention.head_dim,
        )
