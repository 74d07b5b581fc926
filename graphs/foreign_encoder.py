"""An encoder's graph from another exporter, given the contract of an encoder engine and the weights of the bundle."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnx_ir.tape import Tape

from graphs.errors import GraphError
from graphs.graph import constant, external
from graphs.weights import WeightFile

# Scalars and short constants stay in the graph.
SMALL = 1024
FP16_MAX = 65504.0


def adapt_encoder(model: ir.Model, block: int, weights: WeightFile, compute: ir.DataType) -> int:
    """Change an exported encoder, in place, into the encoder engine of a bundle.

    Before: `input_ids` and `attention_mask` int64 [B, N], N a multiple of `block` -> one output float32 [B, N, d].
    After: `input_ids` int64 [B, E], `lengths` int32 [B] -> `hidden` [B, E, d] in the compute type.

    Its weights go to `weights`, where those that the decoder has too stand once. In fp16 they are stored as fp16 and
    widened: the layers compute in fp32, because code that was written for fp32 masks with values out of fp16's range.
    Returns the bytes of the widened weights. GraphError where the inputs or outputs are others.
    """
    graph = model.graph
    found = sorted(str(value.name) for value in graph.inputs)
    if found != ["attention_mask", "input_ids"] or len(graph.outputs) != 1:
        raise GraphError(f"the exported encoder has the inputs {', '.join(found)}, not input_ids and attention_mask")
    # Exporters leave stack traces of the machine they ran on.
    ClearMetadataAndDocStringPass()(model)
    graph.name = "encoder"
    _pad(graph, block, compute)
    return _move_weights(graph, weights, compute)


def _pad(graph: ir.Graph, block: int, compute: ir.DataType) -> None:
    """Compute the padded ids and their mask from the new inputs, and give the first E rows in the compute type."""
    old = {value.name: value for value in graph.inputs}
    old["input_ids"].name, old["attention_mask"].name = "padded_ids", "mask"
    tokens = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", "E"]))
    lengths = ir.Value(name="lengths", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["B"]))
    tape = Tape()
    numbers = {"zero": 0, "one": 1, "size": block}
    zero, one, size = (constant(graph, f"block.{name}", np.array([n], np.int64)) for name, n in numbers.items())
    width = tape.op("Shape", [tokens], {"start": 1, "end": 2})
    # ceil(E / block) * block - E, without a ceiling
    missing = tape.op("Mod", [tape.op("Neg", [width]), size])
    pads = tape.op("Concat", [zero, zero, zero, missing], {"axis": 0})
    padded = tape.op("Pad", [tokens, pads])
    total = tape.op("Squeeze", [tape.op("Add", [width, missing]), zero])
    positions = tape.op("Range", [tape.op("Squeeze", [zero, zero]), total, tape.op("Squeeze", [one, zero])])
    to_int64 = {"to": int(ir.DataType.INT64)}
    ends = tape.op("Cast", [tape.op("Unsqueeze", [lengths, one])], to_int64)
    mask = tape.op("Cast", [tape.op("Less", [positions, ends])], to_int64)
    graph.insert_before(graph[0], tape.nodes)
    for name, value in (("input_ids", padded), ("attention_mask", mask)):
        ir.convenience.replace_all_uses_with(old[name], value)
    graph.inputs[:] = [tokens, lengths]

    whole, tape = graph.outputs[0], Tape()
    assert whole.shape is not None
    hidden = tape.op("Slice", [whole, zero, width, one])
    hidden = hidden if compute == ir.DataType.FLOAT else tape.op("Cast", [hidden], {"to": int(compute)})
    whole.name, hidden.name = "padded_hidden", "hidden"
    hidden.type, hidden.shape = ir.TensorType(compute), ir.Shape(["B", "E", whole.shape[2]])
    graph.extend(tape.nodes)
    graph.outputs[:] = [hidden]


def _move_weights(graph: ir.Graph, weights: WeightFile, compute: ir.DataType) -> int:
    """Replace big initializers by tensors of the weight file. Returns the bytes of those that are widened."""
    widened = 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALL:
            continue
        array = tensor.numpy()
        narrow = tensor.dtype == ir.DataType.FLOAT != compute and float(np.abs(array).max()) <= FP16_MAX
        stored = weights.add(f"encoder/{value.name}", compute if narrow else tensor.dtype, partial(np.asarray, array))
        replacement = external(graph, stored)
        if narrow:
            widened += tensor.nbytes
            cast = ir.node("Cast", [replacement], {"to": int(tensor.dtype)})
            graph.insert_before(graph[0], cast)
            replacement = cast.outputs[0]
        ir.convenience.replace_all_uses_with(value, replacement)
        del graph.initializers[str(value.name)]
    return widened
