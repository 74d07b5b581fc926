"""Transformer layers, pre-norm, on a residual stream that stays in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphs.description import MLP, Activation, Attention, Layer, Linear, Norm
from graphs.dialects.base import Dialect, linear
from graphs.graph import Graph


class Residual:
    """The residual stream: a sum whose last term is added together with the norm that reads it."""

    def __init__(self, graph: Graph, dialect: Dialect, x: ir.Value) -> None:
        self.graph, self.dialect = graph, dialect
        self._x = x
        self._delta: ir.Value | None = None

    def normed(self, norm: Norm) -> ir.Value:
        """The stream's norm, in the compute type."""
        if self._delta is None:
            normed = self.dialect.norm(self._x, norm)
        else:
            self._x, normed = self.dialect.add_norm(self._x, self._delta, norm)
            self._delta = None
        return self.graph.to_compute(normed)

    def add(self, delta: ir.Value) -> None:
        self._delta = delta

    def value(self) -> ir.Value:
        """The stream itself, float32 [M, d]."""
        if self._delta is not None:
            self._x, self._delta = self.graph.op("Add", [self._x, self._delta]), None
        return self._x


def decoder_layers(
    graph: Graph, dialect: Dialect, x: ir.Value, layers: Sequence[Layer], names: Sequence[int | str]
) -> ir.Value:
    """Hidden states float32 [M, d] after `layers`, which have these `names` in the KV cache."""
    stream = Residual(graph, dialect, x)
    for name, layer in zip(names, layers, strict=True):
        attended = dialect.self_attention(stream.normed(layer.attention_norm), layer.attention, name)
        stream.add(project(graph, attended, layer.attention))
        if layer.cross is not None and layer.cross_norm is not None:
            attended = dialect.cross_attention(stream.normed(layer.cross_norm), layer.cross, name)
            stream.add(project(graph, attended, layer.cross))
        stream.add(mlp(graph, stream.normed(layer.mlp_norm), layer.mlp))
    return stream.value()


def encoder_layers(graph: Graph, dialect: Dialect, x: ir.Value, layers: Sequence[Layer], norm: Norm) -> ir.Value:
    """Hidden states in the compute type [M, d] after `layers` and `norm`."""
    stream = Residual(graph, dialect, x)
    for layer in layers:
        attended = dialect.encoder_attention(stream.normed(layer.attention_norm), layer.attention)
        stream.add(project(graph, attended, layer.attention))
        stream.add(mlp(graph, stream.normed(layer.mlp_norm), layer.mlp))
    return stream.normed(norm)


def project(graph: Graph, attended: ir.Value, attention: Attention) -> ir.Value:
    """[M, heads * head_dim] -> float32 [M, d]."""
    return graph.to_float(linear(graph, attended, attention.output))


def mlp(graph: Graph, x: ir.Value, layer: MLP) -> ir.Value:
    """[M, d] -> float32 [M, d]."""
    up = linear(graph, x, layer.up)
    if layer.gate is None:
        hidden = activate(graph, up, layer.activation)
    else:
        hidden = graph.op("Mul", [activate(graph, linear(graph, x, layer.gate), layer.activation), up])
    if not layer.fp32:
        return graph.to_float(linear(graph, hidden, layer.down))
    return fp32_linear(graph, graph.to_float(hidden), layer.down)


def fp32_linear(graph: Graph, x: ir.Value, layer: Linear) -> ir.Value:
    """A linear layer that stays in fp32 at every precision."""
    names = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return graph.op("Gemm", [x, *(graph.weight(name, ir.DataType.FLOAT) for name in names)], transB=1)


def activate(graph: Graph, x: ir.Value, activation: Activation) -> ir.Value:
    if activation == "relu":
        return graph.op("Relu", [x])
    if activation == "silu":
        return graph.op("Mul", [x, graph.op("Sigmoid", [x])])
    return graph.op("Gelu", [x], approximate="tanh" if activation == "gelu-tanh" else "none")
