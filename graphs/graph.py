"""One ONNX graph in the making: named inputs and outputs, recorded operators, weights by reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from graphs.errors import GraphError
from graphs.weights import WeightFile, Weights

Dimension = int | str
MICROSOFT = "com.microsoft"
# Between the names of the tensors that a weight is stacked of.
STACK = "+"
# Opset 24 has TensorScatter and Attention with valid lengths; IR version 11 is the first that carries it everywhere.
OPSET, IR_VERSION = 24, 11


class Graph:
    """Records operators. `compute` is the type of weights and activations between the fp32 islands, `cache` that of
    keys and values, the same if none is given."""

    def __init__(
        self,
        name: str,
        source: Weights,
        weights: WeightFile,
        compute: ir.DataType,
        cache: ir.DataType | None = None,
    ) -> None:
        self.name = name
        self.compute, self.cache = compute, cache or compute
        self._source, self._weights = source, weights
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[Dimension]) -> None:
        if value.name in {output.name for output in self._outputs} or value in self._inputs:
            value = self.op("Identity", [value])
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        """An operator with one output."""
        return self._tape.op(kind, inputs=inputs, attributes=attributes, domain=domain)

    def ops(
        self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """An operator with several outputs."""
        return self._tape.op_multi_out(kind, inputs=inputs, attributes=attributes, domain=domain, num_outputs=outputs)

    def constant(self, array: np.ndarray | np.generic | Sequence[int]) -> ir.Value:
        """A small constant inside the graph; equal ones are one. Lists of integers are int64."""
        data = np.asarray(array, dtype=np.int64 if isinstance(array, list) else None)
        name = f"constant.{data.dtype}.{list(data.shape)}.{data.tobytes().hex()}"
        if len(name) > 80:
            raise GraphError(f"a constant of {data.nbytes} bytes belongs in the weight file")
        return self._initializer(name, ir.tensor(data, name=name))

    def table(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A computed table, stored with the weights."""
        return self._unread(name, array.shape, dtype, lambda: array)

    def weight(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A checkpoint tensor."""
        return self.stacked_weight([name], dtype)

    def unpacked_weight(self, name: str) -> ir.Value:
        """A checkpoint tensor that ONNX Runtime must use where it stands in the file, without a packed copy. An
        initializer that is also an input may be overridden, so it is no constant, and only constants are packed."""
        value = self.weight(name)
        if value not in self._inputs:
            self._inputs.append(value)
        return value

    def stacked_weight(self, names: Sequence[str], dtype: ir.DataType | None = None) -> ir.Value:
        """Checkpoint tensors joined along their first axis."""
        found = [self._source.shape(name) for name in names]

        def produce() -> np.ndarray:
            parts = [self._source.read(name) for name in names]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        value = self._unread(STACK.join(names), (sum(shape[0] for shape in found), *found[0][1:]), dtype, produce)
        assert value.const_value is not None
        value.const_value.meta[STACK] = [shape[0] for shape in found]  # rows of each
        return value

    def selected_weight(self, name: str, rows: np.ndarray, as_name: str, also: Sequence[str] = ()) -> ir.Value:
        """Some rows of a checkpoint tensor, and all of the tensors `also`, as a weight of its own."""
        shape = self._source.shape(name)
        count = len(rows) + sum(self._source.shape(other)[0] for other in also)

        def produce() -> np.ndarray:
            return np.concatenate([self._source.read(name)[rows], *map(self._source.read, also)])

        return self._unread(as_name, (count, *shape[1:]), None, produce)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a checkpoint tensor."""
        return self._source.shape(name)

    def read(self, name: str) -> np.ndarray:
        """A checkpoint tensor as float32, to compute a table from."""
        return self._source.read(name)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as `dtype`."""
        return self.op("Cast", [value], to=int(dtype))

    def to_compute(self, value: ir.Value) -> ir.Value:
        """An fp32 value in the compute type."""
        return value if self.compute == ir.DataType.FLOAT else self.cast(value, self.compute)

    def to_float(self, value: ir.Value) -> ir.Value:
        """A value of the compute type in fp32."""
        return value if self.compute == ir.DataType.FLOAT else self.cast(value, ir.DataType.FLOAT)

    def save(self, path: Path, passes: Sequence[ir.passes.InPlacePass] = ()) -> None:
        """Write the graph after `passes`, and to the weight file beside it the weights that these left in place."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET, **{node.domain: 1 for node in self._tape.nodes if node.domain}},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="freeexport")
        for change in passes:
            change(model)
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.LazyTensor):
                assert tensor.name is not None
                value.const_value = self._weights.add(tensor.name, tensor.dtype, tensor.numpy)
        ir.save(model, path)

    def _unread(
        self, name: str, shape: Sequence[int], dtype: ir.DataType | None, produce: Callable[[], np.ndarray]
    ) -> ir.Value:
        """A tensor that is read when the graph is saved, unless a pass has replaced it by then."""
        kind = dtype or self.compute
        tensor = ir.LazyTensor(lambda: ir.tensor(produce()), kind, ir.Shape(shape), name=name)
        return self._initializer(f"{name}.{kind.name.lower()}", tensor)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = _value_of(name, tensor)
        return self._initializers[name]


def _value_of(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(list(tensor.shape))  # type: ignore[arg-type]
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def external(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """A tensor of the weight file, once a graph."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        graph.register_initializer(_value_of(tensor.name, tensor))
    return graph.initializers[tensor.name]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A small constant under a name of its own, once a graph."""
    if name not in graph.initializers:
        graph.register_initializer(_value_of(name, ir.tensor(array, name=name)))
    return graph.initializers[name]


def unread(value: ir.Value | None) -> ir.LazyTensor | None:
    """The tensor of a weight that is not written yet, and so may be replaced."""
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, ir.LazyTensor) else None


def drop_unused(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads, also where they are inputs."""
    unused = [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]
    for value in unused:
        del graph.initializers[str(value.name)]
        if value in graph.inputs:
            graph.inputs.remove(value)
