"""Every graph of `convert --target cuda` is made of what ONNX Runtime's CUDA provider has kernels for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from checkpoints import CASES, Bundles
from onnx import TensorProto, helper

from tools.gpu.operators import OPSET, RULES, TABLE, Table, check_bundle, main, write

BY_NAME = {case.name: case for case in CASES}
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


@pytest.fixture(scope="module")
def table() -> Table:
    return Table.load()


KINDS = ("t5-relu-tied", "t5-gated-untied", "umt5", "llama-biases", "mistral-window", "qwen3")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"precision": precision}) for name in KINDS for precision in ("fp16", "bf16")),
        *(
            (name, {"precision": precision, "compute": compute})
            for name in ("t5-gated-untied", "qwen3")
            for precision, compute in (("int8", "fp16"), ("int8", "fp32"), ("int4", "bf16"))
        ),
        *((name, {"precision": "fp32"}) for name in ("t5-relu-tied", "qwen3")),
        *(("qwen3", {"confidence": confidence}) for confidence in ("entropy", "max-prob")),
    ],
)
def test_every_node_has_a_kernel(name: str, options: dict[str, str], bundle: Bundles, table: Table) -> None:
    path = bundle(BY_NAME[name], target="cuda", **options)
    assert len(list(path.glob("*.onnx"))) == (4 if "t5" in name else 2)
    assert check_bundle(path, table) == []


@pytest.mark.parametrize("name", ["t5-relu-tied", "qwen3"])
def test_the_fused_dialect_is_not_for_cuda(name: str, bundle: Bundles, table: Table) -> None:
    """GroupQueryAttention has no lengths of queries there, which batches of different lengths need."""
    problems = {str(finding) for finding in check_bundle(bundle(BY_NAME[name]), table)}
    assert any(
        "GroupQueryAttention" in text and "query_lengths is more than its schema has" in text for text in problems
    )


def model(
    kind: str,
    inputs: Mapping[str, int],
    domain: str = "",
    opset: int = OPSET,
    outputs: Sequence[str] = ("y",),
    **attributes: Any,
) -> onnx.ModelProto:
    """A graph of one node."""
    node = helper.make_node(kind, list(inputs), list(outputs), name="node", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, type_, None) for name, type_ in inputs.items() if name]
    graph = helper.make_graph([node], "graph", values, [])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    )


ATTENTION = {"q": HALF, "k": HALF, "v": HALF, "mask": HALF}
BITS = {"x": HALF, "w": TensorProto.UINT8, "s": HALF}
SHAPE = {"N": 8, "K": 64, "block_size": 32}


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (model("Attention", ATTENTION), None),
        (model("Attention", {**ATTENTION, "mask": FLOAT}), "no kernel is registered for .*U float"),
        (model("Attention", ATTENTION, softmax_precision=11), "softmax_precision = 11 is refused"),
        (model("Attention", ATTENTION, window=3), "attribute window is not in its schema"),
        (model("NonZero", {"x": FLOAT}), None),
        (model("Unique", {"x": FLOAT}), "no kernel is registered"),
        (model("Elu", {"x": FLOAT}), "no kernel is registered for this opset"),
        (model("Add", {"a": TensorProto.BOOL, "b": TensorProto.BOOL}), "no kernel is registered for .*T bool"),
        (model("Add", {"a": FLOAT, "b": FLOAT, "c": FLOAT}), "input c is more than its schema has"),
        (model("Cast", {"x": FLOAT}, to=TensorProto.STRING), "no kernel is registered for .*T2 string"),
        (model("MatMulNBits", BITS, "com.microsoft", bits=4, **SHAPE), None),
        (model("MatMulNBits", BITS, "com.microsoft", bits=8, **SHAPE), None),
        (model("MatMulNBits", BITS, "com.microsoft", bits=3, **SHAPE), "bits = 3 is refused"),
        (model("MatMulNBits", BITS, "com.microsoft", **{**SHAPE, "block_size": 512}), "block_size = 512 is refused"),
        (model("TensorScatter", {"p": HALF, "n": HALF, "i": INT64}, axis=2, mode="linear"), None),
        (model("TensorScatter", {"p": HALF, "n": HALF, "i": INT64}, mode="spiral"), "mode b'spiral' is refused"),
        (model("Add", {"a": FLOAT, "b": FLOAT}, opset=25), "opset 25 is not in the table"),
    ],
)
def test_what_the_provider_cannot_run_is_named(graph: onnx.ModelProto, problem: str | None, table: Table) -> None:
    found = table.check(graph, "shallow")
    assert len(found) == (problem is not None)
    for finding in found:
        assert problem is not None
        assert re.search(problem, finding.problem)
        assert str(finding).startswith("shallow: ")


def test_types_go_through_a_graph(table: Table) -> None:
    """A Cast decides the type of what follows, and a Shape is int64."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["h"], to=HALF),
            helper.make_node("Attention", ["h", "h", "h", "x"], ["y"], name="mixed"),
            helper.make_node("Shape", ["y"], ["n"]),
            helper.make_node("Range", ["n", "n", "n"], ["r"]),
            helper.make_node("Mod", ["r", "h"], ["z"], name="unlike"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, None)],
        [],
    )
    found = table.check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]), "deep")
    assert [finding.node for finding in found] == ["mixed"]


def test_a_bundle_is_checked_from_the_command_line(
    bundle: Bundles, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path, code in ((bundle(BY_NAME["qwen3"], target="cuda"), 0), (bundle(BY_NAME["qwen3"]), 1), (tmp_path, 1)):
        monkeypatch.setattr("sys.argv", ["cuda_operators.py", str(path)])
        assert main() == code
    output = capsys.readouterr()
    assert "0 nodes without a CUDA kernel in ONNX Runtime 1.31.1" in output.out
    assert "has no graphs; give a bundle" in output.err


def test_the_table_names_its_version_and_source_and_rules_name_theirs(table: Table, tmp_path: Path) -> None:
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    assert content["onnxruntime"] == table.version == "1.31.1"
    assert "get_all_opkernel_def" in content["source"]
    assert all(rule.source and rule.operator in content["operators"] for rule in RULES)
    write(content, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == TABLE.read_text(encoding="utf-8")


def test_a_table_of_another_opset_is_refused() -> None:
    content = copy.deepcopy(json.loads(TABLE.read_text(encoding="utf-8")))
    content["opset"] = 23
    with pytest.raises(ValueError, match="opset 23, the graphs are of 24"):
        Table(content)
