"""Adapts an encoder graph from another exporter to the engine contract of a bundle."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tape import Tape

from graphs.errors import GraphError
from graphs.graph import constant, external
from graphs.weights import WeightFile

# Bytes up to which constants stay in the graph.
SMALL = 1024
FP16_MAX = 65504.0


def adapt_encoder(
    model: ir.Model, block: int, weights: WeightFile, stored: ir.DataType, compute: ir.DataType
) -> int:
    """Change an exported encoder, in place, into the encoder engine of a bundle.

    Before: `input_ids` and `attention_mask` int64 [B, N], N a multiple of `block`, and one output
    float32 [B, N, d]. After: `input_ids` int64 [B, E] and `lengths` int32 [B] -> `hidden` [B, E, d]
    in the compute type.

    Weights move to `weights`, where tensors shared with the decoder are stored once. Half-precision
    weights are widened: the layers compute in fp32, because code written for fp32 masks with values
    outside the range of fp16.

    Args:
        model: The exported graph.
        block: The exported code expects prompts padded to a multiple of this number of tokens.
        weights: File that receives the weights.
        stored: Type of the stored weights. Weights outside the range of fp16 are stored in fp32.
        compute: Type of the output.

    Returns:
        Bytes of the widened weights.

    Raises:
        GraphError: If the graph has other inputs or outputs.
    """
    graph = model.graph
    found = sorted(str(value.name) for value in graph.inputs)
    if found != ["attention_mask", "input_ids"] or len(graph.outputs) != 1:
        raise GraphError(
            f"the exported encoder has the inputs {', '.join(found)}, "
            "not input_ids and attention_mask"
        )
    # Exporters record stack traces with paths of their machine.
    ClearMetadataAndDocStringPass()(model)
    graph.name = "encoder"
    _pad(graph, block, compute)
    _pad_integers_as_floats(graph)
    return _move_weights(graph, weights, stored)


def _pad(graph: ir.Graph, block: int, compute: ir.DataType) -> None:
    """Compute padded ids and their mask from the new inputs.

    The output is cut to the first E rows and cast to the compute type.
    """
    old = {value.name: value for value in graph.inputs}
    old["input_ids"].name = "padded_ids"
    old["attention_mask"].name = "mask"
    int64 = ir.TensorType(ir.DataType.INT64)
    int32 = ir.TensorType(ir.DataType.INT32)
    tokens = ir.Value(name="input_ids", type=int64, shape=ir.Shape(["B", "E"]))
    lengths = ir.Value(name="lengths", type=int32, shape=ir.Shape(["B"]))
    tape = Tape()
    zero = constant(graph, "block.zero", np.array([0], np.int64))
    one = constant(graph, "block.one", np.array([1], np.int64))
    size = constant(graph, "block.size", np.array([block], np.int64))
    width = tape.op("Shape", [tokens], {"start": 1, "end": 2})
    # ceil(E / block) * block - E, written without Ceil.
    missing = tape.op("Mod", [tape.op("Neg", [width]), size])
    pads = tape.op("Concat", [zero, zero, zero, missing], {"axis": 0})
    padded = tape.op("Pad", [tokens, pads])
    total = tape.op("Squeeze", [tape.op("Add", [width, missing]), zero])
    start = tape.op("Squeeze", [zero, zero])
    positions = tape.op("Range", [start, total, tape.op("Squeeze", [one, zero])])
    to_int64 = {"to": int(ir.DataType.INT64)}
    ends = tape.op("Cast", [tape.op("Unsqueeze", [lengths, one])], to_int64)
    mask = tape.op("Cast", [tape.op("Less", [positions, ends])], to_int64)
    graph.insert_before(graph[0], tape.nodes)
    for name, value in (("input_ids", padded), ("attention_mask", mask)):
        value.dtype = ir.DataType.INT64
        ir.convenience.replace_all_uses_with(old[name], value)
    graph.inputs[:] = [tokens, lengths]

    whole = graph.outputs[0]
    tape = Tape()
    assert whole.shape is not None
    hidden = tape.op("Slice", [whole, zero, width, one])
    if compute != ir.DataType.FLOAT:
        hidden = tape.op("Cast", [hidden], {"to": int(compute)})
    whole.name = "padded_hidden"
    hidden.name = "hidden"
    hidden.type = ir.TensorType(compute)
    hidden.shape = ir.Shape(["B", "E", whole.shape[2]])
    graph.extend(tape.nodes)
    graph.outputs[:] = [hidden]


def _pad_integers_as_floats(graph: ir.Graph) -> None:
    """Pad integers, which are token ids and masks, as float32, which holds those below 2^24.

    ONNX Runtime's CUDA provider has no kernel to pad integers.
    """
    for node in [node for node in graph if node.op_type == "Pad"]:
        data = node.inputs[0]
        assert data is not None
        if data.dtype != ir.DataType.INT64:
            continue
        for place in (0, 2):  # the data and the constant
            if place < len(node.inputs) and node.inputs[place] is not None:
                wide = ir.node("Cast", [node.inputs[place]], {"to": int(ir.DataType.FLOAT)})
                node.replace_input_with(place, wide.outputs[0])
                graph.insert_before(node, wide)
        padded = node.outputs[0]
        padded.dtype = ir.DataType.FLOAT
        back = ir.node("Cast", [padded], {"to": int(ir.DataType.INT64)})
        back.outputs[0].dtype = ir.DataType.INT64
        back.outputs[0].shape = padded.shape
        ir.convenience.replace_all_uses_with(padded, back.outputs[0])
        back.replace_input_with(0, padded)
        graph.insert_after(node, back)


def _move_weights(graph: ir.Graph, weights: WeightFile, stored: ir.DataType) -> int:
    """Move large initializers to the weight file. Return the bytes of widened weights."""
    widened = 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALL:
            continue
        array = tensor.numpy()
        narrow = tensor.dtype == ir.DataType.FLOAT != stored
        if stored == ir.DataType.FLOAT16:
            narrow = narrow and float(np.abs(array).max()) <= FP16_MAX
        dtype = stored if narrow else tensor.dtype
        tensor_in_file = weights.add(f"encoder/{value.name}", dtype, partial(np.asarray, array))
        replacement = external(graph, tensor_in_file)
        if narrow:
            widened += tensor.nbytes
            cast = ir.node("Cast", [replacement], {"to": int(tensor.dtype)})
            graph.insert_before(graph[0], cast)
            replacement = cast.outputs[0]
        ir.convenience.replace_all_uses_with(value, replacement)
        del graph.initializers[str(value.name)]
    return widened
