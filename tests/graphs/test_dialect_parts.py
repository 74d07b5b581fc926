"""Relative bias by distance, and rows without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from kernel_cases import session_of
from onnxruntime import InferenceSession
from tensor_source import Source
from transformers.models.t5.modeling_t5 import T5Attention

from graphs.description import RelativeBias
from graphs.dialects.base import CallInputs, buckets, by_distance, packing
from graphs.graph import Graph
from graphs.weights import WeightFile
from runtime.engines.kernels import missing

FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64

# (buckets, max_distance): T5 and its kin, the test checkpoints, and ones whose logarithms fall on bucket edges.
SIZES = [(32, 128), (16, 40), (32, 64), (8, 16), (64, 256)]
REACH = 400


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_relative_position_buckets_match_transformers(sizes: tuple[int, int], bidirectional: bool) -> None:
    distance = np.arange(-REACH, REACH + 1)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), bidirectional, *sizes)
    bias, longest = RelativeBias("table", *sizes, bidirectional=bidirectional), sizes[1]
    ours = buckets(distance, bias)
    np.testing.assert_array_equal(ours, theirs.numpy())
    # Those beyond the longest distance are that one's, so that a table by distance has all of them.
    assert len(set(ours[: REACH - longest])) == len(set(ours[REACH + longest :])) == 1
    table = np.random.default_rng(0).standard_normal((sizes[0], 3)).astype(np.float32)
    expanded = by_distance(table, bias)
    rows = range(-longest, longest + 1) if bidirectional else range(0, -longest - 1, -1)
    assert len(expanded) == len(rows)
    np.testing.assert_array_equal(expanded, table[[ours[REACH + distance] for distance in rows]])


@pytest.mark.parametrize(
    "own", [False, pytest.param(True, marks=pytest.mark.skipif(missing() is not None, reason=str(missing())))]
)
def test_valid_rows_are_packed_for_attention_and_unpacked(own: bool, tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights:
        graph = Graph("g", Source({}), weights, FLOAT)
        x, lengths = graph.input("x", FLOAT, ["B", "k", 2]), graph.input("query_lengths", INT32, ["B"])
        rows = packing(graph, CallInputs(graph.op("Shape", [x], start=0, end=2), lengths), x, own=own)
        graph.output("packed", rows.counted, FLOAT, ["N", 2])
        graph.output("attended", rows.in_rows(graph, rows.counted), FLOAT, ["B", "k", 2])
        graph.output("rows", rows.rows, INT64, ["M"])
        graph.save(tmp_path / "g.onnx")
    given = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    path = tmp_path / "g.onnx"
    session = session_of(path) if own else InferenceSession(str(path), providers=["CPUExecutionProvider"])
    counts = [2, 0, 3, 1]
    found, attended, places = session.run(None, {"x": given, "query_lengths": np.array(counts, np.int32)})
    np.testing.assert_array_equal(found, np.concatenate([given[row, :count] for row, count in enumerate(counts)]))
    assert attended.shape == (4, 3, 2)
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(attended[row, :count], given[row, :count])
        np.testing.assert_array_equal(found[places.reshape(4, 3)[row, :count]], given[row, :count])
