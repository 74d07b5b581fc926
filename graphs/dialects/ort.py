"""ONNX Runtime's fused operators (com.microsoft), or our own for the attention of decoders (docs/precision.md):
attention reads and extends the KV cache in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Norm
from graphs.dialects.base import (
    Call,
    Packing,
    bias_of_distances,
    distance_table,
    flat,
    head_norm,
    in_rows,
    key_value_inputs,
    key_value_outputs,
    linear,
    norm_weights,
    query_key_value,
    query_positions,
    rotary_tables,
)
from graphs.graph import MICROSOFT, Graph
from runtime.kernels import DOMAIN
from runtime.text.sampler import UNKNOWN


def fits_head_size(attention: Attention) -> bool:
    """Whether GroupQueryAttention has a kernel for heads of this size, and for the part of it that is turned."""
    return attention.head_dim % _head_step(attention) == 0 and _turned(attention) % 16 == 0


def misfit(attention: Attention) -> str:
    """Why heads of this size do not fit."""
    if (turned := _turned(attention)) % 16:
        return f"{turned} values of each head are rotated, and the ort dialect's operator needs a multiple of 16"
    return (
        f"attention heads of size {attention.head_dim} do not fit the ort dialect, whose operator needs "
        f"a multiple of {_head_step(attention)}"
    )


def _turned(attention: Attention) -> int:
    return 2 * len(attention.rotary.inverse_frequencies) if attention.rotary else 0


def _head_step(attention: Attention) -> int:
    return 16 if attention.rotary else 8


class OrtDialect:
    """See graphs.dialects.base.Dialect. `cache_rows` is the most rows a KV cache of the bundle has. `packing`: between
    attentions there are the rows that count only."""

    def __init__(self, graph: Graph, call: Call, cache_rows: int = 0, packing: Packing | None = None) -> None:
        self.graph, self.call, self.cache_rows = graph, call, cache_rows
        # [M, d] -> query, key and value in one, [M, (heads + 2 kv_heads) * head_dim]
        self.project: Callable[[Graph, ir.Value, Attention], ir.Value] = query_key_value
        self._biases: dict[str, ir.Value] = {}
        self._packing = packing

    @cached_property
    def _total(self) -> ir.Value:
        assert self.call.past_lengths is not None
        assert self.call.query_lengths is not None
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
        kind = "SimplifiedLayerNormalization" if norm.kind == "rms" else "LayerNormalization"
        return self.graph.op(kind, [x, *norm_weights(self.graph, norm)], axis=-1, epsilon=norm.epsilon, stash_type=1)

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        kind = "SkipSimplifiedLayerNormalization" if norm.kind == "rms" else "SkipLayerNormalization"
        inputs = [x, delta, *norm_weights(self.graph, norm)]
        normed, _, _, total = self.graph.ops(kind, inputs, 4, MICROSOFT, epsilon=norm.epsilon)
        return total, normed

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph = self.graph
        packed = self.project(graph, x, attention)
        query, key, value = self._split(packed, attention)
        cos, sin = rotary_tables(graph, attention.rotary, self.cache_rows) if attention.rotary else (None, None)
        past = key_value_inputs(graph, "past", layer, attention, "cache")
        inputs = [query, key, value, *past, self._last, self._longest, cos, sin, None, self._bias(attention)]
        inputs += [None] * 5 + [self.call.query_lengths]
        out, *present = graph.ops(
            "GroupQueryAttention",
            inputs,
            3,
            MICROSOFT,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            scale=attention.scale,
            do_rotary=int(attention.rotary is not None),
            local_window_size=attention.window or -1,
            softcap=attention.softcap or 0.0,
        )
        key_value_outputs(graph, "present", layer, attention, "cache", present)
        return self._flat(out, attention)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        query = self._in_rows(linear(self.graph, x, attention.query))
        prompt = key_value_inputs(self.graph, "cross", layer, attention, "E")
        return self._attend([query, *prompt, None, self.call.cross_lengths, None], attention)

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        packed = query_key_value(self.graph, x, attention)
        parts = map(self._in_rows, self.graph.ops("Split", [packed], 3, axis=-1, num_outputs=3))
        return self._attend([*parts, None, self.call.query_lengths, self._bias(attention)], attention)

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

    def _flat(self, x: ir.Value, attention: Attention) -> ir.Value:
        """[B, rows, heads * head_dim] -> [M, heads * head_dim]."""
        if self._packing is not None:
            return self._packing.packed(self.graph, x)
        return flat(self.graph, x, attention.heads * attention.head_dim)

    def _attend(self, inputs: list[ir.Value | None], attention: Attention) -> ir.Value:
        attributes = {"num_heads": attention.heads, "scale": attention.scale}
        return self._flat(self.graph.op("MultiHeadAttention", inputs, MICROSOFT, **attributes), attention)

    def _bias(self, attention: Attention) -> ir.Value | None:
        """Relative bias over all keys of the call; layers that share a table share the result."""
        graph, bias = self.graph, attention.relative_bias
        if bias is None:
            return None
        if bias.table not in self._biases:
            queries = query_positions(graph, self.call)
            if self.call.past_lengths is None:
                keys = graph.op("Squeeze", [queries, graph.constant([0])])
            else:
                last = graph.cast(self._longest, ir.DataType.INT64)
                keys = graph.op("Range", [graph.constant(np.int64(0)), last, graph.constant(np.int64(1))])
            self._biases[bias.table] = bias_of_distances(graph, bias, queries, keys)
        return self._biases[bias.table]


def has_attention_kernel(attention: Attention) -> bool:
    """Whether our own attention takes heads of this size."""
    return attention.head_dim >= 16 and attention.head_dim % 8 == 0


class KernelDialect(OrtDialect):
    """See graphs.dialects.base.Dialect. Attention gives a row the same bits in every call, keeps keys and values in
    float16, and takes rows as they stand between attentions, with padding or, with `packing`, without."""

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call, bias = self.graph, self.call, attention.relative_bias
        rows = self.project(graph, x, attention)
        past = key_value_inputs(graph, "past", layer, attention, "cache")
        cos, sin = rotary_tables(graph, attention.rotary, self.cache_rows) if attention.rotary else (None, None)
        norms = (attention.query_norm, attention.key_norm)
        weights = [None if norm is None else graph.weight(norm.weight, dtype=ir.DataType.FLOAT) for norm in norms]
        table = None if bias is None else distance_table(graph, bias)
        out, *present = graph.ops(
            "HalfAttention",
            [rows, *past, call.past_lengths, call.query_lengths, cos, sin, table, *weights],
            3,
            DOMAIN,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            window=attention.window or 0,
            packed=int(self._packing is not None),
            epsilon=next((norm.epsilon for norm in norms if norm), 0.0),
            softcap=attention.softcap or 0.0,
        )
        key_value_outputs(graph, "present", layer, attention, "cache", present)
        return self._typed(out, attention)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call = self.graph, self.call
        rows = linear(graph, x, attention.query)
        out = graph.op(
            "HalfCrossAttention",
            [rows, *key_value_inputs(graph, "cross", layer, attention, "E"), call.cross_lengths, call.query_lengths],
            DOMAIN,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            packed=int(self._packing is not None),
        )
        return self._typed(out, attention)

    def _typed(self, out: ir.Value, attention: Attention) -> ir.Value:
        """ONNX Runtime cannot work it out from an operator that it does not know."""
        out.type = ir.TensorType(self.graph.compute)
        out.shape = ir.Shape([None, attention.heads * attention.head_dim])
        return out

    def predict(
        self, scores: ir.Value, margin: bool, other: bool, emitted: ir.Value | None, known: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """[R, C] -> token int64 [R], confidence and nll float32 [R]. Of `known` tokens, int64 [N], the last of N + 1
        classes may be any `other`; `margin`: confidence is the best probability less the second."""
        outputs = self.graph.ops("Predict", [scores, emitted, known], 3, DOMAIN, margin=int(margin), other=int(other))
        for output, dtype in zip(outputs, (ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.FLOAT), strict=True):
            output.type, output.shape = ir.TensorType(dtype), ir.Shape([None])
        token, confidence, nll = outputs
        return token, confidence, nll

    def in_whole_vocabulary(self, scores: ir.Value, known: ir.Value, vocabulary: int) -> ir.Value:
        """[R, C] of `known` tokens, int64 [N] -> [R, V]."""
        out = self.graph.op("WholeVocabulary", [scores, known], DOMAIN, vocabulary=vocabulary, unknown=float(UNKNOWN))
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, vocabulary])
        return out
