from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime import InferenceSession
from tensor_source import Source

from graphs.dialects.base import Call, packing
from graphs.graph import Graph
from graphs.weights import WeightFile

FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


def test_rows_that_count_stand_side_by_side_and_find_their_places(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        graph = Graph("g", Source({}), weights, FLOAT)
        x, lengths = graph.input("x", FLOAT, ["B", "k", 2]), graph.input("query_lengths", INT32, ["B"])
        rows = packing(graph, Call(graph.op("Shape", [x], start=0, end=2), lengths))
        packed = rows.packed(graph, x)
        graph.output("packed", packed, FLOAT, ["N", 2])
        graph.output("attended", rows.in_rows(graph, packed), FLOAT, ["B", "k", 2])
        graph.output("rows", rows.rows, INT64, ["M"])
        graph.save(tmp_path / "g.onnx")
    given = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    session = InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
    counts = [2, 0, 3, 1]
    found, attended, places = session.run(None, {"x": given, "query_lengths": np.array(counts, np.int32)})
    np.testing.assert_array_equal(found, np.concatenate([given[row, :count] for row, count in enumerate(counts)]))
    assert attended.shape == (4, 3, 2)
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(attended[row, :count], given[row, :count])
        np.testing.assert_array_equal(found[places.reshape(4, 3)[row, :count]], given[row, :count])
