"""Dialect of ONNX Runtime's fused operators (com.microsoft), or of this project's attention
kernels.

Attention reads and extends the KV cache in place. See docs/precision.md for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from graphs.description import Attention, Norm
from graphs.dialects.base import (
    CallInputs,
    Packing,
    bias_of_distances,
    cross_query,
    distance_table,
    flat,
    head_norm,
    in_rows,
    key_value_inputs,
    key_value_outputs,
    norm_weights,
    normalized,
    prompt_cache_in_heads,
    prompt_keys_and_values,
    query_key_value,
    query_positions,
    rotary_tables,
    stacked_linear,
)
from graphs.dialects.standard import StandardDialect
from graphs.graph import MICROSOFT, Graph
from runtime.engines.kernels import DOMAIN
from runtime.text.sampler import UNKNOWN


def fits_head_size(attention: Attention) -> bool:
    """Return True if GroupQueryAttention supports this head size and rotary size."""
    return attention.head_dim % _head_step(attention) == 0 and _rotated(attention) % 16 == 0


def misfit(attention: Attention) -> str:
    """Return why GroupQueryAttention does not support the head size."""
    rotated = _rotated(attention)
    if rotated % 16:
        return (
            f"{rotated} values of each head are rotated, "
            "and the ort dialect's operator needs a multiple of 16"
        )
    return (
        f"attention heads of size {attention.head_dim} do not fit the ort dialect, "
        f"whose operator needs a multiple of {_head_step(attention)}"
    )


def fits_fused_attention(attention: Attention) -> bool:
    """Return True if MultiHeadAttention supports this cross-attention or encoder attention."""
    special = (attention.rotary, attention.window, attention.softcap)
    return attention.kv_heads == attention.heads and special == (None, None, None)


def _rotated(attention: Attention) -> int:
    return 2 * len(attention.rotary.inverse_frequencies) if attention.rotary else 0


def _head_step(attention: Attention) -> int:
    return 16 if attention.rotary else 8


class OrtDialect:
    """Implements `graphs.dialects.base.Dialect` with operators of ONNX Runtime.

    Args:
        cache_rows: Most rows of any KV cache of the bundle.
        packing: If given, rows between attentions have no padding.
    """

    rms_norm = "SimplifiedLayerNormalization"

    def __init__(
        self,
        graph: Graph,
        call: CallInputs,
        cache_rows: int = 0,
        packing: Packing | None = None,
    ) -> None:
        self.graph = graph
        self.call = call
        self.cache_rows = cache_rows
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
        graph = self.graph
        one = np.int32(1)
        zero = np.int32(0)
        # The operator expects 0, not -1, for a row without past and new positions.
        last = graph.op("Sub", [self._total, graph.constant(one)])
        return graph.op("Max", [last, graph.constant(zero)])

    @cached_property
    def _longest(self) -> ir.Value:
        longest = self.graph.op("ReduceMax", [self._total, self.graph.constant([0])], keepdims=0)
        if self._packing is None or not self._packing.idle:
            return longest
        # The operator requires at least the rows of the call, even if all are idle.
        rows = self.graph.op("Gather", [self.call.size, self.graph.constant(np.int64(1))], axis=0)
        return self.graph.op("Max", [longest, self.graph.cast(rows, ir.DataType.INT32)])

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        return normalized(self.graph, x, norm, self.rms_norm)

    def add_norm(self, x: ir.Value, delta: ir.Value, norm: Norm) -> tuple[ir.Value, ir.Value]:
        simplified = "Simplified" if norm.kind == "rms" else ""
        kind = f"Skip{simplified}LayerNormalization"
        inputs = [x, delta, *norm_weights(self.graph, norm)]
        normed, _, _, total = self.graph.ops(kind, inputs, 4, MICROSOFT, epsilon=norm.epsilon)
        return total, normed

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph = self.graph
        packed = self.project(graph, x, attention)
        query, key, value = self._split(packed, attention)
        cos, sin = self._rotary_tables(attention)
        past = key_value_inputs(graph, "past", layer, attention, "cache")
        inputs = [query, key, value, *past, self._last, self._longest]
        inputs += [cos, sin, None, self._bias(attention)]
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
        query = self._in_rows(cross_query(self.graph, x, attention, layer))
        if not fits_fused_attention(attention):
            query = flat(self.graph, query, attention.heads * attention.head_dim)
            out = self._standard.attend_to_prompt(query, attention, layer)
            return self._flat(in_rows(self.graph, out, self.call), attention)
        graph = self.graph
        key, value = key_value_inputs(graph, "cross", layer, attention, "E", "P")
        # Sequences that share a prompt become rows of one: [B, rows, n] -> [P, B / P * rows, n].
        width = attention.heads * attention.head_dim
        prompts = graph.op("Shape", [key], start=0, end=1)
        shape = graph.op("Concat", [prompts, graph.constant([-1, width])], axis=0)
        query = graph.op("Reshape", [query, shape])
        out = self._attend([query, key, value, None, self.call.cross_lengths, None], attention)
        return self._flat(in_rows(graph, out, self.call), attention)

    def joined_attention(
        self, x: ir.Value, attention: Attention, cross: Attention, layer: int | str
    ) -> ir.Value:
        graph = self.graph
        width = graph.shape(attention.query.weight)[1]
        rows = flat(graph, self._in_rows(x), width)
        out = self._standard.joined_attention(rows, attention, cross, layer)
        return self._flat(in_rows(graph, out, self.call), attention)

    def prompt_cache(self, x: ir.Value, attention: Attention) -> Sequence[ir.Value]:
        return prompt_cache_in_heads(self.graph, self, x, attention, self.call)

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        if not fits_fused_attention(attention):
            return self._standard.encoder_attention(x, attention)
        packed = query_key_value(self.graph, x, attention)
        parts = map(self._in_rows, self.graph.ops("Split", [packed], 3, axis=-1, num_outputs=3))
        inputs = [*parts, None, self.call.query_lengths, self._bias(attention)]
        return self._flat(self._attend(inputs, attention), attention)

    @cached_property
    def _standard(self) -> StandardDialect:
        """The dialect of attention that MultiHeadAttention does not support."""
        return StandardDialect(self.graph, self.call, self.cache_rows)

    def _rotary_tables(self, attention: Attention) -> tuple[ir.Value | None, ir.Value | None]:
        """Return cosine and sine of every position, or None without rotary positions."""
        if attention.rotary is None:
            return None, None
        return rotary_tables(self.graph, attention.rotary, self.cache_rows)

    def _split(
        self,
        packed: ir.Value,
        attention: Attention,
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Return query, key and value [B, rows, n], or all three packed in the first.

        GroupQueryAttention reads them packed, unless heads are normed.
        """
        graph = self.graph
        size = attention.head_dim
        if attention.query_norm is None and attention.key_norm is None:
            return self._in_rows(packed), None, None
        widths = [attention.heads * size, attention.kv_heads * size, attention.kv_heads * size]
        query, key, value = graph.ops("Split", [packed, graph.constant(widths)], 3, axis=-1)
        query = head_norm(graph, self, query, attention.query_norm, attention.heads, size)
        key = head_norm(graph, self, key, attention.key_norm, attention.kv_heads, size)
        return self._in_rows(query), self._in_rows(key), self._in_rows(value)

    def _in_rows(self, x: ir.Value) -> ir.Value:
        """Unflatten the batch: [M, n] -> [B, rows, n]."""
        if self._packing is not None:
            return self._packing.in_rows(self.graph, x)
        return in_rows(self.graph, x, self.call)

    def _flat(self, x: ir.Value, attention: Attention) -> ir.Value:
        """Flatten the batch: [B, rows, heads * head_dim] -> [M, heads * head_dim]."""
        if self._packing is not None:
            return self._packing.packed(self.graph, x)
        return flat(self.graph, x, attention.heads * attention.head_dim)

    def _attend(self, inputs: list[ir.Value | None], attention: Attention) -> ir.Value:
        return self.graph.op(
            "MultiHeadAttention",
            inputs,
            MICROSOFT,
            num_heads=attention.heads,
            scale=attention.scale,
        )

    def _bias(self, attention: Attention) -> ir.Value | None:
        """Return the relative bias over all keys of the call, one per table."""
        graph = self.graph
        bias = attention.relative_bias
        if bias is None:
            return None
        if bias.table not in self._biases:
            queries = query_positions(graph, self.call)
            if self.call.past_lengths is None:
                keys = graph.op("Squeeze", [queries, graph.constant([0])])
            else:
                end = graph.cast(self._longest, ir.DataType.INT64)
                start = graph.constant(np.int64(0))
                keys = graph.op("Range", [start, end, graph.constant(np.int64(1))])
            self._biases[bias.table] = bias_of_distances(graph, bias, queries, keys)
        return self._biases[bias.table]


def has_attention_kernel(attention: Attention) -> bool:
    """Return True if this project's attention kernels support the head size."""
    return attention.head_dim >= 16 and attention.head_dim % 8 == 0


class KernelDialect(OrtDialect):
    """Implements `graphs.dialects.base.Dialect` with this project's attention kernels.

    A row gets the same bits in every call, whatever other rows are in it. Keys and values of
    decoders are float16, or 8 bits with a scale for each head and position, or float32. Attention
    reads flat rows, padded or, with `packing`, packed.

    Args:
        exact: Never read prompts in bfloat16.
    """

    def __init__(
        self,
        graph: Graph,
        call: CallInputs,
        cache_rows: int = 0,
        packing: Packing | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(graph, call, cache_rows, packing)
        self._exact = {"exact": 1} if exact else {}

    def self_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph = self.graph
        call = self.call
        bias = attention.relative_bias
        rows = self.project(graph, x, attention)
        past = key_value_inputs(graph, "past", layer, attention, "cache")
        cos, sin = self._rotary_tables(attention)
        norms = (attention.query_norm, attention.key_norm)
        weights = [
            None if norm is None else graph.weight(norm.weight, dtype=ir.DataType.FLOAT)
            for norm in norms
        ]
        table = None if bias is None else distance_table(graph, bias)
        operators = {ir.DataType.INT8: "Int8Attention", ir.DataType.FLOAT16: "HalfAttention"}
        in_fp32 = "CappedAttention" if attention.softcap else "CachedAttention"
        out, *present = graph.ops(
            operators.get(graph.cache, in_fp32),
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
            **self._exact,
        )
        key_value_outputs(graph, "present", layer, attention, "cache", present)
        return self._typed(out, attention)

    def cross_attention(self, x: ir.Value, attention: Attention, layer: int | str) -> ir.Value:
        graph = self.graph
        call = self.call
        rows = cross_query(graph, x, attention, layer)
        prompt = key_value_inputs(graph, "cross", layer, attention, "E", "P")
        in_halves = "CappedCrossAttention" if attention.softcap else "HalfCrossAttention"
        operators = {ir.DataType.INT8: "Int8CrossAttention", ir.DataType.FLOAT: "CrossAttention"}
        out = graph.op(
            operators.get(graph.cache, in_halves),
            [rows, *prompt, call.cross_lengths, call.query_lengths],
            DOMAIN,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            packed=int(self._packing is not None),
            softcap=attention.softcap or 0.0,
        )
        return self._typed(out, attention)

    def prompt_cache(self, x: ir.Value, attention: Attention) -> Sequence[ir.Value]:
        graph = self.graph
        if graph.cache == ir.DataType.FLOAT:
            return super().prompt_cache(x, attention)
        if attention.key_norm is None:
            rows = stacked_linear(graph, x, [attention.key, attention.value])
        else:
            parts = prompt_keys_and_values(graph, self, x, attention)
            rows = graph.op("Concat", list(parts), axis=-1)
        return graph.ops(
            "Int8PromptCache" if graph.cache == ir.DataType.INT8 else "HalfPromptCache",
            [in_rows(graph, rows, self.call)],
            2,
            DOMAIN,
            kv_num_heads=attention.kv_heads,
            head_size=attention.head_dim,
        )

    def encoder_attention(self, x: ir.Value, attention: Attention) -> ir.Value:
        # Its heads may differ from those of the decoder.
        if not (has_attention_kernel(attention) and fits_fused_attention(attention)):
            return super().encoder_attention(x, attention)
        graph = self.graph
        bias = attention.relative_bias
        out = graph.op(
            "EncoderAttention",
            [
                query_key_value(graph, x, attention),
                self._prompt_lengths,
                None if bias is None else distance_table(graph, bias),
            ],
            DOMAIN,
            num_heads=attention.heads,
            kv_num_heads=attention.kv_heads,
            head_size=attention.head_dim,
            scale=attention.scale,
            **self._exact,
        )
        return self._typed(out, attention)

    @cached_property
    def _prompt_lengths(self) -> ir.Value:
        """Valid rows of each prompt, int32 [B]: all rows of a window of speech."""
        if self.call.query_lengths is not None:
            return self.call.query_lengths
        batch, rows = self.graph.ops("Split", [self.call.size], 2, axis=0, num_outputs=2)
        return self.graph.op("Expand", [self.graph.cast(rows, ir.DataType.INT32), batch])

    def _typed(self, out: ir.Value, attention: Attention) -> ir.Value:
        """Set type and shape, which ONNX Runtime cannot infer for custom operators."""
        out.type = ir.TensorType(self.graph.compute)
        out.shape = ir.Shape([None, attention.heads * attention.head_dim])
        return out

    def predict(
        self,
        scores: ir.Value,
        margin: bool,
        other: bool,
        emitted: ir.Value | None,
        known: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Predict from scores [R, C].

        Args:
            margin: Confidence is the best probability minus the second best. If False, it is the
                best probability.
            other: The last of N + 1 classes is for all tokens that are not `known`.
            emitted: int64 [R], tokens whose negative log-likelihood is wanted.
            known: int64 [N], the exit vocabulary. None if classes are token ids.

        Returns:
            token int64 [R], confidence float32 [R], nll float32 [R] in nats.
        """
        token, confidence, nll = self.graph.ops(
            "Predict",
            [scores, emitted, known],
            3,
            DOMAIN,
            margin=int(margin),
            other=int(other),
        )
        token.type = ir.TensorType(ir.DataType.INT64)
        confidence.type = ir.TensorType(ir.DataType.FLOAT)
        nll.type = ir.TensorType(ir.DataType.FLOAT)
        for output in (token, confidence, nll):
            output.shape = ir.Shape([None])
        return token, confidence, nll

    def in_whole_vocabulary(self, scores: ir.Value, known: ir.Value, vocabulary: int) -> ir.Value:
        """Scatter logits [R, C] of the `known` tokens, int64 [N], to [R, V]."""
        out = self.graph.op(
            "WholeVocabulary",
            [scores, known],
            DOMAIN,
            vocabulary=vocabulary,
            unknown=float(UNKNOWN),
        )
        out.type = ir.TensorType(ir.DataType.FLOAT)
        out.shape = ir.Shape([None, vocabulary])
        return out
