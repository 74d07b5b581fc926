"""One ONNX graph under construction: inputs, outputs, operators and weights by reference."""

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
# Separates the names of the tensors in a stacked weight.
STACK = "+"
# Opset 24 adds TensorScatter and lengths for Attention. IR version 11 is the oldest that every
# runtime reads with it.
OPSET = 24
IR_VERSION = 11


class Graph:
    """Records the inputs, operators, weights and outputs of one graph.

    Args:
        name: Name of the graph.
        source: Weights of the checkpoint.
        weights: File that receives the weights.
        compute: Type of weights and activations outside the fp32 islands.
        cache: Type of keys and values. Default: `compute`.
    """

    def __init__(
        self,
        name: str,
        source: Weights,
        weights: WeightFile,
        compute: ir.DataType,
        cache: ir.DataType | None = None,
    ) -> None:
        self.name = name
        self.compute = compute
        self.cache = cache or compute
        self._source = source
        self._weights = weights
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(
        self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[Dimension]
    ) -> None:
        if value.name in {output.name for output in self._outputs} or value in self._inputs:
            value = self.op("Identity", [value])
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def op(
        self, kind: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Record an operator with one output."""
        return self._tape.op(kind, inputs=inputs, attributes=attributes, domain=domain)

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Record an operator with several outputs."""
        return self._tape.op_multi_out(
            kind, inputs=inputs, attributes=attributes, domain=domain, num_outputs=outputs
        )

    def constant(self, array: np.ndarray | np.generic | Sequence[int]) -> ir.Value:
        """Return a small constant stored in the graph. Equal constants are shared.

        Lists of integers become int64.

        Raises:
            GraphError: If the constant is too large for the graph.
        """
        data = np.asarray(array, dtype=np.int64 if isinstance(array, list) else None)
        name = f"constant.{data.dtype}.{list(data.shape)}.{data.tobytes().hex()}"
        if len(name) > 80:
            raise GraphError(f"a constant of {data.nbytes} bytes belongs in the weight file")
        return self._initializer(name, ir.tensor(data, name=name))

    def table(self, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """Return a computed table, stored with the weights."""
        return self._unread(name, array.shape, dtype, lambda: array)

    def weight(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """Return a checkpoint tensor, by default in the compute type."""
        return self.stacked_weight([name], dtype)

    def unpacked_weight(self, name: str) -> ir.Value:
        """Return a checkpoint tensor that ONNX Runtime reads from the file, without a prepacked
        copy.

        ONNX Runtime prepacks constants only. An initializer that is also an input may be
        overridden, so it is not a constant.
        """
        value = self.weight(name)
        if value not in self._inputs:
            self._inputs.append(value)
        return value

    def stacked_weight(self, names: Sequence[str], dtype: ir.DataType | None = None) -> ir.Value:
        """Return checkpoint tensors joined along axis 0, by default in the compute type."""
        shapes = [self._source.shape(name) for name in names]

        def produce() -> np.ndarray:
            parts = [self._source.read(name) for name in names]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        rows = [shape[0] for shape in shapes]
        value = self._unread(STACK.join(names), (sum(rows), *shapes[0][1:]), dtype, produce)
        assert value.const_value is not None
        value.const_value.meta[STACK] = rows
        return value

    def selected_weight(
        self, name: str, rows: np.ndarray, as_name: str, also: Sequence[str] = ()
    ) -> ir.Value:
        """Return a new weight of some rows of a checkpoint tensor.

        Args:
            name: The checkpoint tensor.
            rows: Indices of the rows.
            as_name: Name of the new weight.
            also: Checkpoint tensors appended as a whole.
        """
        shape = self._source.shape(name)
        count = len(rows) + sum(self._source.shape(other)[0] for other in also)

        def produce() -> np.ndarray:
            return np.concatenate([self._source.read(name)[rows], *map(self._source.read, also)])

        return self._unread(as_name, (count, *shape[1:]), None, produce)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a checkpoint tensor."""
        return self._source.shape(name)

    def read(self, name: str) -> np.ndarray:
        """Read a checkpoint tensor as float32, to compute a table from it."""
        return self._source.read(name)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast `value` to `dtype`."""
        return self.op("Cast", [value], to=int(dtype))

    def to_compute(self, value: ir.Value) -> ir.Value:
        """Cast an fp32 value to the compute type."""
        return value if self.compute == ir.DataType.FLOAT else self.cast(value, self.compute)

    def to_float(self, value: ir.Value) -> ir.Value:
        """Cast a value of the compute type to fp32."""
        return value if self.compute == ir.DataType.FLOAT else self.cast(value, ir.DataType.FLOAT)

    def save(self, path: Path, passes: Sequence[ir.passes.InPlacePass] = ()) -> None:
        """Apply `passes` and write the graph. Weights that they left in place go to the weight
        file.
        """
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={
                "": OPSET,
                **{node.domain: 1 for node in self._tape.nodes if node.domain},
            },
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
        self,
        name: str,
        shape: Sequence[int],
        dtype: ir.DataType | None,
        produce: Callable[[], np.ndarray],
    ) -> ir.Value:
        """Return a tensor that is read when the graph is saved, unless a pass replaces it first."""
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
    """Return a tensor of the weight file as an initializer, registered once per graph."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        graph.register_initializer(_value_of(tensor.name, tensor))
    return graph.initializers[tensor.name]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return a small named constant, registered once per graph."""
    if name not in graph.initializers:
        graph.register_initializer(_value_of(name, ir.tensor(array, name=name)))
    return graph.initializers[name]


def unread(value: ir.Value | None) -> ir.LazyTensor | None:
    """Return the tensor of a weight that is not written yet, and may be replaced, or None."""
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, ir.LazyTensor) else None


def drop_unused(graph: ir.Graph) -> None:
    """Remove unused initializers, including those that are inputs."""
    unused = [
        value
        for value in graph.initializers.values()
        if not value.uses() and not value.is_graph_output()
    ]
    for value in unused:
        del graph.initializers[str(value.name)]
        if value in graph.inputs:
            graph.inputs.remove(value)
