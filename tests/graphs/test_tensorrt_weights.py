"""TensorRT takes weights of 8 and 4 bits where a graph widens them, and keeps them as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed (tools/tensorrt_environment.py)")
pytestmark = pytest.mark.tensorrt

SIZE = 256
# Type, bits, and how many weights share a scale: a row, or a block of it.
FORMATS = {
    "int8": (TensorProto.INT8, 8, None),
    "fp8": (TensorProto.FLOAT8E4M3FN, 8, None),
    "int4": (TensorProto.INT4, 4, 64),
}


def model(kind: int | None, bits: int, block: int | None) -> bytes:
    """fp16 x [M, SIZE] times a weight of SIZE rows."""
    nodes, weights, count = [], [], SIZE * SIZE
    random = np.random.default_rng(0)
    if kind is None:
        weights.append(onnx.numpy_helper.from_array(random.random((SIZE, SIZE)).astype(np.float16), "weight"))
    else:
        data = random.integers(0, 100, count * bits // 8).astype(np.uint8).tobytes()
        shape = (SIZE,) if block is None else (SIZE, SIZE // block)
        weights.append(helper.make_tensor("rounded", kind, [SIZE, SIZE], data, raw=True))
        weights.append(onnx.numpy_helper.from_array(np.full(shape, 0.01, np.float16), "scale"))
        attributes = {"axis": 0} if block is None else {"axis": 1, "block_size": block}
        nodes.append(helper.make_node("DequantizeLinear", ["rounded", "scale"], ["weight"], **attributes))
    nodes.append(helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["M", SIZE]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "linear", values[:1], values[1:], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


def built_bytes(content: bytes) -> int:
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(content), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", (1, SIZE), (1, SIZE), (16, SIZE))
    config.add_optimization_profile(profile)
    return int(builder.build_serialized_network(network, config).nbytes)


@pytest.mark.parametrize("name", FORMATS)
def test_rounded_weights_stay_rounded_in_the_engine(name: str) -> None:
    kind, bits, block = FORMATS[name]
    saved = built_bytes(model(None, 16, None)) - built_bytes(model(kind, bits, block))
    assert saved > 0.9 * SIZE * SIZE * (16 - bits) / 8
