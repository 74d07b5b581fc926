"""Initializers of a graph that a pass changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def external(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """A tensor of the weight file, once a graph."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        shape = ir.Shape(list(tensor.shape))  # type: ignore[arg-type]
        graph.register_initializer(
            ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        )
    return graph.initializers[tensor.name]


def constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """A small constant under a name of its own, once a graph."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(array), name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
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
