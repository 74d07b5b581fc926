"""The rows of a call that count, side by side, so that padding is neither normed nor multiplied with weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs.dialects.base import Call
from graphs.graph import Graph


@dataclass(frozen=True)
class Packing:
    """`valid` int64 [N, 2]: sequence and row of each row that counts. `rows` int64 [B * rows]: which of them each row
    of the call is; of padding, any. `attended`: the same, [B, rows].

    `idle`: there are calls in which no row counts.
    """

    valid: ir.Value
    rows: ir.Value
    attended: ir.Value
    idle: bool = False

    def packed(self, graph: Graph, x: ir.Value) -> ir.Value:
        """[B, rows, n] -> [N, n]."""
        return graph.op("GatherND", [x, self.valid])

    def in_rows(self, graph: Graph, x: ir.Value) -> ir.Value:
        """[N, n] -> [B, rows, n]."""
        if self.idle:  # padding has a row to be
            x = graph.op("Pad", [x, graph.constant([0, 1]), None, graph.constant([0])])
        return graph.op("Gather", [x, self.attended], axis=0)


def packing(graph: Graph, call: Call, idle: bool = False) -> Packing:
    """Of a call; `idle` as there."""
    longest = graph.op("Gather", [call.size, graph.constant(np.int64(1))], axis=0)
    first, one = graph.constant(np.int64(0)), graph.constant(np.int64(1))
    steps = graph.op("Range", [first, longest, one])
    lengths = graph.op("Unsqueeze", [graph.cast(call.query_lengths, ir.DataType.INT64), graph.constant([1])])
    counts = graph.op("Less", [steps, lengths])  # [B, rows]
    valid = graph.op("Transpose", [graph.op("NonZero", [counts])], perm=[1, 0])
    flags = graph.op("Reshape", [graph.cast(counts, ir.DataType.INT64), graph.constant([-1])])
    before = graph.op("Sub", [graph.op("CumSum", [flags, first]), one])
    rows = graph.op("Max", [before, first])
    return Packing(valid, rows, graph.op("Reshape", [rows, graph.op("Shape", [counts])]), idle)
