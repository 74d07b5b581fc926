"""Transformer layers on an fp32 residual stream, and the LM head.

The head computes token and confidence in the graph, so that only a few bytes per token leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphs.description import MLP, Activation, Attention, Head, Layer, Norm
from graphs.dialects.base import Dialect, Packing, linear
from graphs.dialects.ort import KernelDialect
from graphs.exit_head import EXIT, UNIT_EPSILON
from graphs.graph import Graph
from runtime.bundle.manifest import FEATURE_STATES, ConfidenceMeasure, ExitInput
from runtime.text.sampler import UNKNOWN

# Added to the logits of suppressed tokens: below any other logit, and finite in fp16.
SUPPRESSED = -30000.0


class Residual:
    """Residual stream. Its last summand is added together with the norm that reads the sum."""

    def __init__(self, graph: Graph, dialect: Dialect, x: ir.Value) -> None:
        self.graph = graph
        self.dialect = dialect
        self._x = x
        self._delta: ir.Value | None = None

    def normed(self, norm: Norm) -> ir.Value:
        """Return the norm of the stream, in the compute type."""
        if self._delta is None:
            normed = self.dialect.norm(self._x, norm)
        else:
            self._x, normed = self.dialect.add_norm(self._x, self._delta, norm)
            self._delta = None
        return self.graph.to_compute(normed)

    def read(self, layer: Layer, norm: Norm) -> ir.Value:
        """Return the input of the layer's block with this norm, in the compute type."""
        return self.normed(norm) if layer.order == "pre" else self.graph.to_compute(self.value())

    def add(self, layer: Layer, norm: Norm, delta: ir.Value) -> None:
        """Add a block's output, float32 [M, d]."""
        if layer.order == "pre":
            self._delta = delta
        else:
            _, self._x = self.dialect.add_norm(self.value(), delta, norm)

    def select(self, rows: ir.Value) -> None:
        """Keep only some rows, int64 [R]."""
        self._x = self.graph.op("Gather", [self.value(), rows], axis=0)

    def value(self) -> ir.Value:
        """Return the stream, float32 [M, d]."""
        if self._delta is not None:
            self._x = self.graph.op("Add", [self._x, self._delta])
            self._delta = None
        return self._x


def decoder_layers(
    graph: Graph,
    dialect: Dialect,
    x: ir.Value,
    layers: Sequence[Layer],
    names: Sequence[int | str],
    wanted: ir.Value | None = None,
    embedded: ir.Value | None = None,
) -> ir.Value:
    """Apply decoder layers with cache `names`. Returns hidden states float32 [M, d].

    `embedded` float32 [M, d] are the tokens' embeddings, for layers with an `embedding_norm`. With
    the rows `wanted`, int64 [R], only their states are returned, float32 [R, d]. The last
    layer then computes only keys, values and attention for the other rows.
    """
    stream = Residual(graph, dialect, x)
    for name, layer in zip(names, layers, strict=True):
        selects = wanted is not None and layer is layers[-1]
        x = stream.read(layer, layer.attention_norm)
        if layer.embedding_norm is not None and embedded is not None:
            token = graph.to_compute(dialect.norm(embedded, layer.embedding_norm))
            x = graph.op("Concat", [token, x], axis=-1)
        if layer.joined and layer.cross is not None:
            attended = dialect.joined_attention(x, layer.attention, layer.cross, name)
        else:
            attended = dialect.self_attention(x, layer.attention, name)
        if wanted is not None and selects and layer.cross_norm is None:
            attended = graph.op("Gather", [attended, wanted], axis=0)
            stream.select(wanted)
        projected = project(graph, attended, layer.attention)
        projected = _normed_out(dialect, projected, layer.attention_out)
        stream.add(layer, layer.attention_norm, projected)
        if layer.cross is not None and layer.cross_norm is not None:
            x = stream.read(layer, layer.cross_norm)
            attended = dialect.cross_attention(x, layer.cross, name)
            projected = project(graph, attended, layer.cross)
            stream.add(layer, layer.cross_norm, _normed_out(dialect, projected, layer.cross_out))
            if wanted is not None and selects:
                stream.select(wanted)
        mixed = mlp(graph, stream.read(layer, layer.mlp_norm), layer.mlp)
        stream.add(layer, layer.mlp_norm, _normed_out(dialect, mixed, layer.mlp_out))
    return stream.value()


def _normed_out(dialect: Dialect, x: ir.Value, norm: Norm | None) -> ir.Value:
    """Normalize a block's output, if it has a norm."""
    return x if norm is None else dialect.norm(x, norm)


def encoder_layers(
    graph: Graph, dialect: Dialect, x: ir.Value, layers: Sequence[Layer], norm: Norm | None
) -> ir.Value:
    """Apply encoder layers and a final norm. Returns states [M, d] in the compute type."""
    stream = Residual(graph, dialect, x)
    for layer in layers:
        x = stream.read(layer, layer.attention_norm)
        attended = dialect.encoder_attention(x, layer.attention)
        projected = project(graph, attended, layer.attention)
        projected = _normed_out(dialect, projected, layer.attention_out)
        stream.add(layer, layer.attention_norm, projected)
        mixed = mlp(graph, stream.read(layer, layer.mlp_norm), layer.mlp)
        stream.add(layer, layer.mlp_norm, _normed_out(dialect, mixed, layer.mlp_out))
    return graph.to_compute(stream.value()) if norm is None else stream.normed(norm)


def project(graph: Graph, attended: ir.Value, attention: Attention) -> ir.Value:
    """Apply the output projection. [M, heads * head_dim] -> float32 [M, d]."""
    return graph.to_float(linear(graph, attended, attention.output))


def mlp(graph: Graph, x: ir.Value, layer: MLP) -> ir.Value:
    """Apply a feed-forward block. [M, d] -> float32 [M, d]."""
    up = linear(graph, x, layer.up)
    if layer.gate is None:
        hidden = activate(graph, up, layer.activation)
    else:
        gate = activate(graph, linear(graph, x, layer.gate), layer.activation)
        hidden = graph.op("Mul", [gate, up])
    if not layer.fp32:
        return graph.to_float(linear(graph, hidden, layer.down))
    names = [layer.down.weight] if layer.down.bias is None else [layer.down.weight, layer.down.bias]
    weights = [graph.weight(name, ir.DataType.FLOAT) for name in names]
    return graph.op("Gemm", [graph.to_float(hidden), *weights], transB=1)


def activate(graph: Graph, x: ir.Value, activation: Activation) -> ir.Value:
    if activation == "relu":
        return graph.op("Relu", [x])
    if activation == "silu":
        return graph.op("Mul", [x, graph.op("Sigmoid", [x])])
    return graph.op("Gelu", [x], approximate="tanh" if activation == "gelu-tanh" else "none")


def unit_scaled(graph: Graph, dialect: Dialect, x: ir.Value, width: int) -> ir.Value:
    """Scale rows float32 [N, d] to a root mean square of 1."""
    ones = graph.table("ones", np.ones(width, np.float32), ir.DataType.FLOAT)
    return graph.op(dialect.rms_norm, [x, ones], axis=-1, epsilon=UNIT_EPSILON, stash_type=1)


def exit_rows(head: Head) -> str:
    """Return the name of the weight of a head with an exit vocabulary."""
    return f"{head.weight}.exit_rows"


def head_rows(graph: Graph, packing: Packing | None) -> ir.Value:
    """Add the input `head_rows` int64 [R], and return these rows of the hidden states.

    With `packing`, states have only the rows without padding.
    """
    rows = graph.input("head_rows", ir.DataType.INT64, ["R"])
    return rows if packing is None else graph.op("Gather", [packing.rows, rows], axis=0)


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
    reads: ExitInput = "state",
) -> None:
    """Add the outputs `token` int64 [R], `confidence` float32 [R] and `logits` float32 [R, vocab].

    With `emitted` also `nll` float32 [R], in nats.

    Args:
        hidden: float32 [R, d], the rows that the head reads.
        head: Description of the head.
        vocabulary: Size of the model's vocabulary.
        confidence: Confidence measure.
        emitted: int64 [R], tokens whose negative log-likelihood is wanted.
        packed: Let ONNX Runtime prepack the head's weight. Otherwise it is read from the file: as
            fast for one row, slower for more, and without a copy in memory.
        tokens: int64 [N], exit vocabulary. Confidence is then computed from N logits, and the
            logits of all other tokens are UNKNOWN. If the head has a class for other tokens and it
            is the largest, `confidence` is 0 and `token` is the best token of the exit vocabulary.
        reads: Input of the exit that this head belongs to. Unless it is "state", also output
            `feature` [R, f], in place of a feature that the deep engine has not computed yet: the
            normed states that the head reads, as many times as the feature has states. For
            "eagle3": the states before the norm.
    """
    normed = hidden
    if head.norm is not None:
        normed = dialect.norm(normed, head.norm)
    if count := FEATURE_STATES[reads]:
        width = graph.shape(head.weight)[1]
        feature = hidden if reads == "eagle3" else normed
        if count > 1:
            earlier = unit_scaled(graph, dialect, normed, width)
            feature = graph.op("Concat", [*[earlier] * (count - 1), normed], axis=-1)
        graph.output("feature", feature, ir.DataType.FLOAT, ["R", count * width])
    if head.scale != 1.0:
        normed = graph.op("Mul", [normed, graph.constant(np.float32(head.scale))])
    normed = graph.to_compute(normed)
    weights = _weights(graph, head, packed, tokens)
    scores = graph.to_float(graph.op("Gemm", [normed, *weights], transB=1))  # [R, classes]
    scores = _capped(graph, scores, head)
    classes = vocabulary if tokens is None else len(tokens) + (head.other is not None)
    other = head.other is not None and tokens is not None
    known = None if tokens is None else graph.table("exit_vocabulary", tokens, ir.DataType.INT64)
    logits = scores
    nll: ir.Value | None
    if isinstance(dialect, KernelDialect) and confidence != "entropy":
        token, measured, nll = dialect.predict(
            scores, confidence == "softmax", other, emitted, known
        )
        if known is not None:
            logits = dialect.in_whole_vocabulary(scores, known, vocabulary)
    else:
        token, measured, nll = _predictions(
            graph, scores, confidence, emitted, known, classes, other
        )
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
    """Compute token, confidence and nll from scores with standard operators, for any measure.

    See `KernelDialect.predict`. `classes` is the number of scores per row.
    """
    log_probabilities = graph.op("LogSoftmax", [scores], axis=-1)
    _, top = graph.ops("TopK", [scores, graph.constant([2])], 2, axis=-1, largest=1, sorted=1)
    token = graph.op("Gather", [top, graph.constant(np.int64(0))], axis=1)
    # Confidence in [0, 1], higher is more confident.
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
    # Rounding errors may leave [0, 1].
    zero = graph.constant(np.float32(0))
    measured = graph.op("Clip", [measured, zero, graph.constant(np.float32(1))])
    if other:
        is_other = graph.op("Equal", [token, graph.constant(np.int64(classes - 1))])
        second = graph.op("Gather", [top, graph.constant(np.int64(1))], axis=1)
        token = graph.op("Where", [is_other, second, token])
        measured = graph.op("Where", [is_other, zero, measured])
    if known is not None:
        token = graph.op("Gather", [known, token], axis=0)
    if emitted is None:
        return token, measured, None
    index = graph.op("Unsqueeze", [emitted, graph.constant([1])])
    chosen = graph.op("GatherElements", [log_probabilities, index], axis=1)
    return token, measured, graph.op("Neg", [graph.op("Squeeze", [chosen, graph.constant([1])])])


def _weights(graph: Graph, head: Head, packed: bool, tokens: np.ndarray | None) -> list[ir.Value]:
    """Return the head's weight [classes, d], and its bias if it is not zero."""
    if head.weight.startswith(EXIT):  # an EAGLE-3 head, which has the rows of its tokens only
        return [graph.weight(head.weight)]
    bias = head_bias(head, graph.shape(head.weight)[0], graph.read)
    if tokens is None:
        weight = graph.weight(head.weight) if packed else graph.unpacked_weight(head.weight)
        return [weight, graph.table(f"{head.weight}.bias", bias)] if bias.any() else [weight]
    bias = bias[tokens]
    also = []
    if head.other is not None:
        assert head.other.bias is not None
        bias = np.concatenate([bias, graph.read(head.other.bias)])
        also = [head.other.weight]
    weight = graph.selected_weight(head.weight, tokens, exit_rows(head), also)
    return [weight, graph.table(f"{exit_rows(head)}.bias", bias)] if bias.any() else [weight]


def head_bias(head: Head, vocabulary: int, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the bias of the logits, float32 [vocab].

    Suppressed tokens get the lowest possible bias.
    """
    if head.bias is None:
        bias = np.zeros(vocabulary, np.float32)
    else:
        bias = read(head.bias).reshape(-1).copy()
    bias[list(head.suppressed)] = SUPPRESSED
    return bias


def _capped(graph: Graph, scores: ir.Value, head: Head) -> ir.Value:
    """Cap the logits [R, classes], except the class of other tokens."""
    if head.softcap is None:
        return scores
    limit = graph.constant(np.float32(head.softcap))
    other = None
    if head.other is not None:
        sizes = graph.constant([len(head.tokens), 1])
        scores, other = graph.ops("Split", [scores, sizes], 2, axis=1)
    capped = graph.op("Mul", [graph.op("Tanh", [graph.op("Div", [scores, limit])]), limit])
    return capped if other is None else graph.op("Concat", [capped, other], axis=1)


def _in_whole_vocabulary(
    graph: Graph, logits: ir.Value, tokens: np.ndarray, classes: int, vocabulary: int
) -> ir.Value:
    """Scatter logits [R, classes] of an exit vocabulary to [R, V]."""
    place = np.full(vocabulary, classes, np.int64)
    place[tokens] = np.arange(len(tokens))
    rows = graph.op("Shape", [logits], start=0, end=1)
    shape = graph.op("Concat", [rows, graph.constant([1])], axis=0)
    unknown = graph.op("Expand", [graph.constant(np.array([UNKNOWN])), shape])
    extended = graph.op("Concat", [logits, unknown], axis=1)
    places = graph.table("exit_vocabulary.place", place, ir.DataType.INT64)
    return graph.op("Gather", [extended, places], axis=1)
