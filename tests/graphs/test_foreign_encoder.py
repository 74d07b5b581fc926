from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.tape import Tape

from graphs.errors import GraphError
from graphs.foreign_encoder import adapt_encoder
from graphs.weights import WeightFile

BLOCK, VOCAB, WIDTH = 4, 40, 16
TABLE = np.random.default_rng(0).standard_normal((VOCAB, WIDTH)).astype(np.float32)
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def exported(mask_name: str = "attention_mask", table: np.ndarray = TABLE) -> ir.Model:
    """An exporter's output: a graph that only takes whole blocks, and adds to each row the sum of its block."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", "N"]))
        for name in ("input_ids", mask_name)
    ]
    ids, mask = inputs
    constants = {
        "table": table,
        "blocks": np.array([0, -1, BLOCK, WIDTH], np.int64),
        "rows": np.array([0, -1, WIDTH], np.int64),
        "last": np.array([-1], np.int64),
        "inner": np.array([2], np.int64),
        "more": np.array([0, 0, 0, BLOCK], np.int64),
        "masked": np.array(0, np.int64),
        "start": np.array([0], np.int64),
        "end": np.array([-BLOCK], np.int64),
    }
    values = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        for name, array in constants.items()
    }
    tape = Tape()
    longer = tape.op("Pad", [mask, values["more"], values["masked"]])  # as LongT5 pads its blocks
    longer.dtype = ir.DataType.INT64
    mask = tape.op("Slice", [longer, values["start"], values["end"], values["last"]])
    valid = tape.op("Unsqueeze", [tape.op("Cast", [mask], {"to": int(FLOAT)}), values["last"]])
    states = tape.op("Mul", [tape.op("Gather", [values["table"], ids]), valid])
    blocks = tape.op("Reshape", [states, values["blocks"]])
    summed = tape.op("Add", [blocks, tape.op("ReduceSum", [blocks, values["inner"]], {"keepdims": 1})])
    hidden = tape.op("Reshape", [summed, values["rows"]])
    hidden.name, hidden.type, hidden.shape = "last_hidden_state", ir.TensorType(FLOAT), ir.Shape(["B", "N", WIDTH])
    for node in tape.nodes:
        node.metadata_props["stack_trace"] = "File /home/somebody/model.py"
    graph = ir.Graph(
        inputs, [hidden], nodes=tape.nodes, initializers=list(values.values()), opset_imports={"": 20}, name="main"
    )
    return ir.Model(graph, ir_version=10)


def adapted(
    directory: Path, stored: ir.DataType, compute: ir.DataType, table: np.ndarray = TABLE
) -> tuple[Path, int, int]:
    """The path of the engine, the bytes that were widened, and those of the weight file."""
    model = exported(table=table)
    with WeightFile(directory / "weights.data") as weights:
        weights.add("shared.weight", stored, lambda: table)
        widened = adapt_encoder(model, BLOCK, weights, stored, compute)
        ir.save(model, directory / "encoder.onnx")
        return directory / "encoder.onnx", widened, weights.bytes


def expected(ids: np.ndarray, lengths: list[int]) -> np.ndarray:
    states = TABLE[ids] * (np.arange(ids.shape[1]) < np.array(lengths)[:, None])[..., None]
    padded = np.pad(states, ((0, 0), (0, -ids.shape[1] % BLOCK), (0, 0)))
    blocks = padded.reshape(len(ids), -1, BLOCK, WIDTH)
    return (blocks + blocks.sum(axis=2, keepdims=True)).reshape(len(ids), -1, WIDTH)[:, : ids.shape[1]]


@pytest.mark.parametrize(("stored", "compute"), [(FLOAT, FLOAT), (FLOAT16, FLOAT16), (BFLOAT16, FLOAT)])
@pytest.mark.parametrize("lengths", [[1], [3, 2], [4], [5, 1, 4], [8], [13, 9]])
def test_prompts_of_any_length_are_padded_to_whole_blocks(
    lengths: list[int], stored: ir.DataType, compute: ir.DataType, tmp_path: Path
) -> None:
    path, _, _ = adapted(tmp_path, stored, compute)
    session = onnxruntime.InferenceSession(path)
    ids = np.random.default_rng(1).integers(0, VOCAB, (len(lengths), max(lengths)))
    (hidden,) = session.run(["hidden"], {"input_ids": ids, "lengths": np.array(lengths, np.int32)})
    assert hidden.dtype == compute.numpy()
    np.testing.assert_allclose(
        hidden, expected(ids, lengths), atol={FLOAT: 1e-6, FLOAT16: 2e-2, BFLOAT16: 1e-1}[stored]
    )


@pytest.mark.parametrize(
    ("stored", "widened"), [(FLOAT, 0), (FLOAT16, TABLE.nbytes), (BFLOAT16, TABLE.nbytes)], ids=str
)
def test_weight_shared_with_the_decoder_is_stored_once(stored: ir.DataType, widened: int, tmp_path: Path) -> None:
    path, bytes_widened, in_file = adapted(tmp_path, stored, stored)
    assert in_file == TABLE.size * stored.itemsize
    assert bytes_widened == widened
    assert b"somebody" not in path.read_bytes()  # who exported it


def test_weights_beyond_fp16_are_stored_in_fp32(tmp_path: Path) -> None:
    for stored, size in ((FLOAT16, 4), (BFLOAT16, 2)):
        with WeightFile(tmp_path / "weights.data") as weights:
            adapt_encoder(exported(table=TABLE * 1e6), BLOCK, weights, stored, stored)
            assert weights.bytes == TABLE.size * size


def test_integer_inputs_are_padded_as_floats_for_cuda(tmp_path: Path) -> None:
    path, _, _ = adapted(tmp_path, FLOAT, FLOAT)
    nodes = list(ir.load(path).graph)
    pads = [node for node in nodes if node.op_type == "Pad"]
    assert len(pads) == 2
    casts = {node.outputs[0].name for node in nodes if node.op_type == "Cast" and node.attributes["to"].value == FLOAT}
    assert {node.inputs[0].name for node in pads} <= casts


def test_encoder_with_other_inputs_is_refused(tmp_path: Path) -> None:
    with WeightFile(tmp_path / "weights.data") as weights, pytest.raises(GraphError, match="input_ids, langs, not"):
        adapt_encoder(exported("langs"), BLOCK, weights, FLOAT, FLOAT)
