"""Transformer layers on a residual stream that stays in fp32; and the LM head with arg max and confidence,
so that a few bytes per token leave the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphs.description import MLP, Activation, Attention, Head, Layer, Linear, Norm
from graphs.dialects.base import Dialect, Packing, linear
from graphs.dialects.ort import KernelDialect
from graphs.graph import Graph
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.text.sampler import UNKNOWN

# The logit of suppressed tokens is lower by this: no other comes near, and fp16 holds it.
SUPPRESSED = -30000.0


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

    def read(self, layer: Layer, norm: Norm) -> ir.Value:
        """Input of a layer's block that has this norm, in the compute type."""
        return self.normed(norm) if layer.order == "pre" else self.graph.to_compute(self.value())

    def add(self, layer: Layer, norm: Norm, delta: ir.Value) -> None:
        """Add what the block gave, float32 [M, d]."""
        if layer.order == "pre":
            self._delta = delta
        else:
            _, self._x = self.dialect.add_norm(self.value(), delta, norm)

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
        attended = dialect.self_attention(stream.read(layer, layer.attention_norm), layer.attention, name)
        attended = _normed_out(dialect, project(graph, attended, layer.attention), layer.attention_out)
        stream.add(layer, layer.attention_norm, attended)
        if layer.cross is not None and layer.cross_norm is not None:
            attended = dialect.cross_attention(stream.read(layer, layer.cross_norm), layer.cross, name)
            stream.add(layer, layer.cross_norm, project(graph, attended, layer.cross))
        mixed = mlp(graph, stream.read(layer, layer.mlp_norm), layer.mlp)
        stream.add(layer, layer.mlp_norm, _normed_out(dialect, mixed, layer.mlp_out))
    return stream.value()


def _normed_out(dialect: Dialect, x: ir.Value, norm: Norm | None) -> ir.Value:
    """Norm of a block's output, if any."""
    return x if norm is None else dialect.norm(x, norm)


def encoder_layers(graph: Graph, dialect: Dialect, x: ir.Value, layers: Sequence[Layer], norm: Norm | None) -> ir.Value:
    """Hidden states in the compute type [M, d] after `layers` and `norm`."""
    stream = Residual(graph, dialect, x)
    for layer in layers:
        attended = dialect.encoder_attention(stream.read(layer, layer.attention_norm), layer.attention)
        stream.add(layer, layer.attention_norm, project(graph, attended, layer.attention))
        stream.add(layer, layer.mlp_norm, mlp(graph, stream.read(layer, layer.mlp_norm), layer.mlp))
    return graph.to_compute(stream.value()) if norm is None else stream.normed(norm)


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


def exit_rows(head: Head) -> str:
    """The name of the weight of a head that knows some tokens only."""
    return f"{head.weight}.exit_rows"


def head_outputs(
    graph: Graph,
    dialect: Dialect,
    hidden: ir.Value,
    head: Head,
    vocabulary: int,
    confidence: ConfidenceMeasure,
    emitted: ir.Value | None = None,
    packed: bool = True,
    tokens: np.ndarray | None = None,
    packing: Packing | None = None,
    feature: bool = False,
) -> None:
    """Outputs `token` int64, `confidence` and `logits`, and with `emitted` int64 [R] also `nll` in nats.

    `head_rows` int64 [R] picks their rows of `hidden` float32 [M, d]. Not `packed`, the
    head's weight is used as it stands: as fast for one row, slower for more, and without a copy in memory.

    `tokens` int64 [N] are the only ones that the head knows, None for all: its confidence is that of N logits, and the
    logits of all others are UNKNOWN. Where the head was trained with a class for them, that is one more logit; where it
    is the largest, `confidence` is 0, so nothing exits, and `token` is the best known one. With `packing`, `hidden` has
    the rows that count only. With `feature` also an output of that name, [R, d]: the norm that the head reads.
    """
    rows = graph.input("head_rows", ir.DataType.INT64, ["R"])
    places = rows if packing is None else graph.op("Gather", [packing.rows, rows], axis=0)
    normed = _normed(graph, dialect, graph.op("Gather", [hidden, places], axis=0), head)
    if feature:
        graph.output("feature", normed, ir.DataType.FLOAT, ["R", graph.shape(head.weight)[1]])
    if head.scale != 1.0:
        normed = graph.op("Mul", [normed, graph.constant(np.float32(head.scale))])
    normed = graph.to_compute(normed)
    scores = graph.to_float(graph.op("Gemm", [normed, *_weights(graph, head, packed, tokens)], transB=1))
    scores = _capped(graph, scores, head)
    classes = vocabulary if tokens is None else len(tokens) + (head.other is not None)  # scores [R, classes]
    other = head.other is not None and tokens is not None
    known = None if tokens is None else graph.table("exit_vocabulary", tokens, ir.DataType.INT64)
    logits, nll = scores, None
    if isinstance(dialect, KernelDialect) and confidence != "entropy":
        token, measured, nll = dialect.predict(scores, confidence == "softmax", other, emitted, known)
        if known is not None:
            logits = dialect.in_whole_vocabulary(scores, known, vocabulary)
    else:
        token, measured, nll = _predictions(graph, scores, confidence, emitted, known, classes, other)
        if tokens is not None:
            logits = _in_whole_vocabulary(graph, scores, tokens, classes, vocabulary)
    graph.output("token", token, ir.DataType.INT64, ["R"])
    graph.output("confidence", measured, ir.DataType.FLOAT, ["R"])
    if emitted is not None:
        assert nll is not None
        graph.output("nll", nll, ir.DataType.FLOAT, ["R"])
    graph.output("logits", logits, ir.DataType.FLOAT, ["R", vocabulary])


def _predictions(
    graph: Graph,
    scores: ir.Value,
    confidence: ConfidenceMeasure,
    emitted: ir.Value | None,
    known: ir.Value | None,
    classes: int,
    other: bool,
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """See KernelDialect.predict, of so many `classes`; by operators of ONNX, and any measure of confidence."""
    log_probabilities = graph.op("LogSoftmax", [scores], axis=-1)
    _, top = graph.ops("TopK", [scores, graph.constant([2])], 2, axis=-1, largest=1, sorted=1)
    token = graph.op("Gather", [top, graph.constant(np.int64(0))], axis=1)
    # In [0, 1], higher is more confident.
    if confidence == "entropy":
        terms = graph.op("Mul", [graph.op("Exp", [log_probabilities]), log_probabilities])
        negative = graph.op("ReduceSum", [terms, graph.constant([1])], keepdims=0)
        scaled = graph.op("Div", [negative, graph.constant(np.float32(np.log(classes)))])
        measured = graph.op("Add", [scaled, graph.constant(np.float32(1))])
    else:
        best_two = graph.op("Exp", [graph.op("GatherElements", [log_probabilities, top], axis=1)])
        measured = graph.op("Gather", [best_two, graph.constant(np.int64(0))], axis=1)
        if confidence == "softmax":
            second = graph.op("Gather", [best_two, graph.constant(np.int64(1))], axis=1)
            measured = graph.op("Sub", [measured, second])
    # Rounding may step over the ends; the contract does not.
    measured = graph.op("Clip", [measured, graph.constant(np.float32(0)), graph.constant(np.float32(1))])
    if other:
        is_other = graph.op("Equal", [token, graph.constant(np.int64(classes - 1))])
        second = graph.op("Gather", [top, graph.constant(np.int64(1))], axis=1)
        token = graph.op("Where", [is_other, second, token])
        measured = graph.op("Where", [is_other, graph.constant(np.float32(0)), measured])
    if known is not None:
        token = graph.op("Gather", [known, token], axis=0)
    if emitted is None:
        return token, measured, None
    index = graph.op("Unsqueeze", [emitted, graph.constant([1])])
    chosen = graph.op("GatherElements", [log_probabilities, index], axis=1)
    return token, measured, graph.op("Neg", [graph.op("Squeeze", [chosen, graph.constant([1])])])


def _normed(graph: Graph, dialect: Dialect, hidden: ir.Value, head: Head) -> ir.Value:
    """float32 [R, d] -> the norm that the head reads, but for its scale."""
    if (adapter := head.adapter) is not None:
        inner = fp32_linear(graph, dialect.norm(hidden, adapter.norm), adapter.down)
        outer = fp32_linear(graph, activate(graph, inner, "silu"), adapter.up)
        hidden = graph.op("Add", [hidden, outer])
    return hidden if head.norm is None else dialect.norm(hidden, head.norm)


def _weights(graph: Graph, head: Head, packed: bool, tokens: np.ndarray | None) -> list[ir.Value]:
    """The head's weight [classes, d], and its bias, where it is not zero."""
    bias = head_bias(head, graph.shape(head.weight)[0], graph.read)
    if tokens is None:
        weight = graph.weight(head.weight) if packed else graph.unpacked_weight(head.weight)
        return [weight, graph.table(f"{head.weight}.bias", bias)] if bias.any() else [weight]
    bias, also = bias[tokens], []
    if head.other is not None:
        assert head.other.bias is not None
        bias, also = np.concatenate([bias, graph.read(head.other.bias)]), [head.other.weight]
    weight = graph.selected_weight(head.weight, tokens, exit_rows(head), also)
    return [weight, graph.table(f"{exit_rows(head)}.bias", bias)] if bias.any() else [weight]


def head_bias(head: Head, vocabulary: int, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Biases of the logits, float32 [vocab]: suppressed tokens get so little that no other token gets less."""
    bias = np.zeros(vocabulary, np.float32) if head.bias is None else read(head.bias).reshape(-1).copy()
    bias[list(head.suppressed)] = SUPPRESSED
    return bias


def _capped(graph: Graph, scores: ir.Value, head: Head) -> ir.Value:
    """[R, classes], all but the class of other tokens capped."""
    if head.softcap is None:
        return scores
    limit, other = graph.constant(np.float32(head.softcap)), None
    if head.other is not None:
        sizes = graph.constant([len(head.tokens), 1])
        scores, other = graph.ops("Split", [scores, sizes], 2, axis=1)
    capped = graph.op("Mul", [graph.op("Tanh", [graph.op("Div", [scores, limit])]), limit])
    return capped if other is None else graph.op("Concat", [capped, other], axis=1)


def _in_whole_vocabulary(graph: Graph, logits: ir.Value, tokens: np.ndarray, classes: int, vocabulary: int) -> ir.Value:
    """[R, classes] -> [R, V]: what reads logits need not know which tokens the head knows."""
    place = np.full(vocabulary, classes, np.int64)
    place[tokens] = np.arange(len(tokens))
    rows = graph.op("Shape", [logits], start=0, end=1)
    shape = graph.op("Concat", [rows, graph.constant([1])], axis=0)
    unknown = graph.op("Expand", [graph.constant(np.array([UNKNOWN])), shape])
    extended = graph.op("Concat", [logits, unknown], axis=1)
    return graph.op("Gather", [extended, graph.table("exit_vocabulary.place", place, ir.DataType.INT64)], axis=1)
