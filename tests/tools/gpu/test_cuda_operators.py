"""Every graph of `convert --target cuda` is made of what ONNX Runtime's CUDA provider has kernels for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner
from device_cases import EXITS
from onnx import TensorProto, helper

from runtime.errors import OptionError
from tools.gpu.operators import OPSETS, check_bundle, check_graph, command, load_table

BY_NAME = {case.name: case for case in (*CASES, *EXITS)}
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
TABLE_HERE = load_table()
KINDS = ("t5-relu-tied", "t5-gated-untied", "umt5", "llama-biases", "mistral-window", "qwen3")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"precision": "fp16"}) for name in KINDS),
        *(
            (name, options)
            for name in ("t5-gated-untied", "qwen3")
            for options in (
                {"precision": "bf16"},
                {"precision": "int8", "compute": "fp32"},
                {"precision": "int4", "compute": "bf16"},
            )
        ),
        ("qwen3", {"precision": "fp32"}),
        *(("qwen3", {"confidence": confidence}) for confidence in ("entropy", "max-prob")),
        *((case.name, {"precision": precision}) for case in EXITS for precision in ("fp16", "int4")),
    ],
)
def test_every_node_has_a_cuda_kernel(name: str, options: dict[str, str], bundle: Bundles) -> None:
    path = bundle(BY_NAME[name], target="cuda", **options)
    assert len(list(path.glob("*.onnx"))) == (4 if "t5" in name else 2)
    assert check_bundle(path, TABLE_HERE) == []


def model(
    kind: str, inputs: Mapping[str, int], domain: str = "", opset: int = OPSETS[""], **attributes: Any
) -> onnx.ModelProto:
    """A graph of one node."""
    node = helper.make_node(kind, list(inputs), ["y"], name="node", domain=domain, **attributes)
    values = [helper.make_tensor_value_info(name, type_, None) for name, type_ in inputs.items()]
    graph = helper.make_graph([node], "graph", values, [])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports)


ATTENTION = {"q": HALF, "k": HALF, "v": HALF, "mask": HALF}
BITS = {"x": HALF, "w": TensorProto.UINT8, "s": HALF}
SHAPE = {"N": 8, "K": 64, "block_size": 32}


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (model("Attention", ATTENTION), None),
        (model("Attention", {**ATTENTION, "mask": FLOAT}), "no kernel is registered for .*U float"),
        (model("Attention", ATTENTION, softmax_precision=11), "softmax_precision = 11 is not supported"),
        (model("Attention", ATTENTION, window=3), "attribute window is not in its schema"),
        (model("Unique", {"x": FLOAT}), "no kernel is registered"),
        (model("Elu", {"x": FLOAT}), "no kernel is registered for this opset"),
        (model("Add", {"a": FLOAT, "b": FLOAT, "c": FLOAT}), "input c is not in its schema"),
        (model("Cast", {"x": FLOAT}, to=TensorProto.STRING), "no kernel is registered for .*T2 string"),
        (model("MatMulNBits", BITS, "com.microsoft", bits=8, **SHAPE), None),
        (model("MatMulNBits", BITS, "com.microsoft", bits=3, **SHAPE), "bits = 3 is not supported"),
        (
            model("TensorScatter", {"p": HALF, "n": HALF, "i": INT64}, mode="spiral"),
            "mode = b'spiral' is not supported",
        ),
        (model("Add", {"a": FLOAT, "b": FLOAT}, opset=25), "opset 25 is not in the table"),
    ],
)
def test_nodes_without_a_cuda_kernel_are_named(graph: onnx.ModelProto, problem: str | None) -> None:
    found = check_graph(graph, "shallow", TABLE_HERE)
    assert len(found) == (problem is not None)
    assert all(text.startswith("shallow: ") and re.search(str(problem), text) for text in found)


def test_directory_without_readable_graphs_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has no graphs; give a bundle"):
        check_bundle(tmp_path, TABLE_HERE)
    (tmp_path / "deep.onnx").write_bytes(b"no graph")
    with pytest.raises(OptionError, match=r"deep\.onnx cannot be read") as raised:
        check_bundle(tmp_path, TABLE_HERE)
    assert "\n" not in str(raised.value)


def test_command_exits_with_1_where_a_node_has_no_kernel(tmp_path: Path) -> None:
    onnx.save(model("Elu", {"x": FLOAT}), tmp_path / "deep.onnx")
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1
    assert "deep: Elu node: no kernel is registered for this opset\n1 nodes without" in result.output
