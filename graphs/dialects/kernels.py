"""Decoders whose attention is on our own operators (docs/kernels.md); norms as in OrtDialect."""

from __future__ import annotations

import onnx_ir as ir

from graphs.description import Attention, RelativeBias
from graphs.dialects.base import Call, linear, rotary_tables
from graphs.dialects.ort import OrtDialect
from graphs.dialects.packing import Packing
from graphs.dialects.relative_bias import by_distance
from graphs.graph import Dimension, Graph
from runtime.kernels import DOMAIN


def has_attention_kernel(attention: Attention) -> bool:
    """Whether our own attention takes heads of this size."""
    return attention.head_dim >= 16 and attention.head_dim % 8 == 0


class KernelDialect(OrtDialect):
    """See graphs.dialects.base.Dialect. Attention gives a row the same bits in every call, and takes rows as they stand
    between attentions, with padding or, with `packing`, without."""

    def __init__(self, graph: Graph, call: Call, width: int, cache_rows: int, packing: Packing | None) -> None:
        super().__init__(graph, call, width, cache_rows, packing)
        self._tables: dict[str, ir.Value] = {}

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph, call, heads, kv_heads = self.graph, self.call, attention.heads, attention.kv_heads
        rows = self.project(graph, x, attention, self.width)
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
        rows = linear(graph, x, attention.query, width, self.width)
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
            self._tables[bias.table] = self._table(bias, attention.heads)
        return self._tables[bias.table]

    def _table(self, bias: RelativeBias, heads: int) -> ir.Value:
        table = by_distance(self.graph.read(bias.table, (bias.buckets, heads)), bias)
        return self.graph.table(f"{bias.table}.by_distance", table)
