"""The files that a graph names, wherever in it a tensor may stand, and whatever else the file holds."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import CASES, Bundles
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle import bundle as reading
from runtime.bundle.bundle import external_data
from runtime.errors import BundleError


def tensor(location: str | None) -> TensorProto:
    made = numpy_helper.from_array(np.zeros(3, np.float32), "location")
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "12")):
            made.external_data.add(key=key, value=value)
    return made


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["location"], value=tensor(location))


def test_external_tensors_are_found_in_every_place_that_onnx_allows(tmp_path: Path) -> None:
    inner = helper.make_graph([constant("f")], "inner", [], [], initializer=[tensor("a")])
    condition = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    listed = helper.make_node("Two", [], [], tensors=[tensor("g")], graphs=[inner])
    graph = helper.make_graph([condition, listed, constant("b")], "g", [], [], initializer=[tensor("c"), tensor(None)])
    graph.sparse_initializer.add(values=tensor("d"), indices=tensor("e"))
    function = helper.make_function("own", "f", [], [], [constant("h")], [])
    model = helper.make_model(graph, functions=[function])
    model.training_info.add(algorithm=helper.make_graph([], "t", [], [], initializer=[tensor("i")]))
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    assert external_data(tmp_path / "graph.onnx") == set("abcdefghi")


def test_field_order_does_not_hide_external_data(tmp_path: Path) -> None:
    # An entry with its value first, its length in two bytes.
    entry = b"\x12\x81\x00x" + b"\x0a\x08location"
    entries = b"\x6a" + bytes([len(entry)]) + entry
    initializer = b"\x2a" + bytes([len(entries)]) + entries
    (tmp_path / "graph.onnx").write_bytes(b"\x3a" + bytes([len(initializer)]) + initializer)
    assert onnx.load_from_string((tmp_path / "graph.onnx").read_bytes()).graph.initializer[0].external_data
    assert external_data(tmp_path / "graph.onnx") == {"x"}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("llama-tied", "t5-relu-tied")])
def test_graphs_of_a_bundle_name_its_weight_file(case: object, bundle: Bundles) -> None:
    paths = list(bundle(case).glob("*.onnx"))  # type: ignore[arg-type]
    assert {name for path in paths for name in external_data(path)} == {"weights.data"}


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x3a\x7f", b"\x3a", b"\x0b\x0c", b"\xff" * 9 + b"\x7f"])
def test_files_that_are_not_graphs_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "deep.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"deep\.onnx cannot be read \(it is not an ONNX graph"):
        external_data(tmp_path / "deep.onnx")


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    content = b"location"
    for level in range(levels):
        size, length = len(content), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        content = (b"\x0a", b"\x32", b"\x2a")[level % 3] + length + bytes([size]) + content
    return b"\x3a" + content[1:]


@pytest.mark.parametrize("content", [nested(3002), b"\x08\x01" * 10_000])
def test_graph_that_is_slow_to_parse_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_FIELDS", 10_000)
    (tmp_path / "deep.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"deep\.onnx cannot be read \(its graph is too large"):
        external_data(tmp_path / "deep.onnx")


@given(content=st.binary(max_size=200), data=st.data())
def test_arbitrary_bytes_give_names_or_a_refusal(
    content: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    model = helper.make_model(helper.make_graph([constant("a")], "g", [], [], initializer=[tensor("b")]))
    whole = model.SerializeToString()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + content + whole[at:])
    with suppress(BundleError):
        external_data(path)
