"""The embedding table in 8 bits: a token reads one row, so what counts is its size on disk."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.graph import MICROSOFT
from graphs.quantization.quantizer import Quantizer, Stored
from graphs.rewrites.initializers import drop_unused, external, unread
from runtime.kernels import DOMAIN


class QuantizeEmbedding(ir.passes.InPlacePass):
    """Before: rows of the unwritten float32 tensor `table` [rows, d] are read by Gather along axis 0.
    After: by GatherBlockQuantized, from 8-bit rows in blocks, or, where it is `tied` to a head that stands packed in
    8 bits, from that."""

    def __init__(self, quantizer: Quantizer, table: str, tied: bool = False) -> None:
        self._quantizer, self._table, self._tied = quantizer, table, tied

    def requires(self, model: ir.Model) -> None:
        if len(self._lookups(model.graph)) != 1:
            raise ir.passes.PreconditionError(f"{self._table} is not read by one Gather")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        (node,) = self._lookups(graph)
        tensor = unread(node.inputs[0])
        assert tensor is not None
        tape = Tape()
        head = self._quantizer.store(tensor, "int8-block") if self._tied else None
        if head is not None and head.rounded:
            rows = _packed_rows(tape, graph, node, head)
        else:
            rows = _rows(tape, graph, node, self._quantizer.store_table(tensor))
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [rows])
        graph.opset_imports.update({made.domain: 1 for made in tape.nodes})
        drop_unused(graph)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        if self._lookups(model.graph):
            raise ir.passes.PostconditionError(f"{self._table} is still read in float32")

    def _lookups(self, graph: ir.Graph) -> list[ir.Node]:
        found = [(node, unread(node.inputs[0])) for node in graph if node.op_type == "Gather"]
        return [node for node, tensor in found if tensor is not None and tensor.name == self._table]


def _rows(tape: Tape, graph: ir.Graph, node: ir.Node, stored: Stored) -> ir.Value:
    data, scales = (external(graph, part) for part in stored.operands.values())
    attributes = {"bits": 8, "block_size": stored.block, "gather_axis": 0, "quantize_axis": 1}
    return tape.op("GatherBlockQuantized", [data, node.inputs[1], scales], attributes, domain=MICROSOFT)


def _packed_rows(tape: Tape, graph: ir.Graph, node: ir.Node, stored: Stored) -> ir.Value:
    table = node.inputs[0]
    assert table is not None
    assert table.shape is not None
    outputs, inputs = table.shape.numpy()
    data, scales = (external(graph, part) for part in stored.operands.values())
    attributes = {"N": outputs, "K": inputs, "block_size": stored.block}
    made = tape.op("PackedRows", [node.inputs[1], data, scales], attributes, domain=DOMAIN)
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, inputs])
    return made
