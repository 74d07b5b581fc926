"""The LM head with arg max and confidence: a few bytes per token leave the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphs.description import Adapter, Head
from graphs.dialects.base import Dialect, Packing
from graphs.dialects.ort import KernelDialect
from graphs.graph import Graph
from graphs.layers import activate, fp32_linear
from runtime.bundle.manifest import ConfidenceMeasure
from runtime.text.sampler import UNKNOWN


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
) -> None:
    """Outputs `token` int64, `confidence` and `logits`, and with `emitted` int64 [R] also `nll` in nats.

    `head_rows` int64 [R] picks their rows of `hidden` float32 [M, d]. Not `packed`, the
    head's weight is used as it stands: as fast for one row, slower for more, and without a copy in memory.

    `tokens` int64 [N] are the only ones that the head knows, None for all: its confidence is that of N logits, and the
    logits of all others are UNKNOWN. Where the head was trained with a class for them, that is one more logit; where it
    is the largest, `confidence` is 0, so nothing exits, and `token` is the best known one. With `packing`, `hidden` has
    the rows that count only.
    """
    rows = graph.input("head_rows", ir.DataType.INT64, ["R"])
    places = rows if packing is None else graph.op("Gather", [packing.rows, rows], axis=0)
    normed = _normed(graph, dialect, graph.op("Gather", [hidden, places], axis=0), head)
    logits = graph.to_float(graph.op("Gemm", [normed, *_weights(graph, head, packed, tokens)], transB=1))
    classes = vocabulary if tokens is None else len(tokens) + (head.other is not None)  # logits [R, classes]
    choice: _Choice
    if isinstance(dialect, KernelDialect) and confidence != "entropy":
        choice = _OwnChoice(graph, dialect, logits)
    else:
        choice = _Choice(graph, logits)
    token = graph.op("Gather", [choice.top, graph.constant(np.int64(0))], axis=1)
    measured = _confidence(graph, choice, confidence, classes)
    if tokens is not None and head.other is not None:
        is_other = graph.op("Equal", [token, graph.constant(np.int64(len(tokens)))])
        second = graph.op("Gather", [choice.top, graph.constant(np.int64(1))], axis=1)
        token = graph.op("Where", [is_other, second, token])
        measured = graph.op("Where", [is_other, graph.constant(np.float32(0)), measured])
    if tokens is not None:
        known = graph.table("exit_vocabulary", tokens, ir.DataType.INT64)
        token = graph.op("Gather", [known, token], axis=0)
        logits = _in_whole_vocabulary(graph, logits, tokens, classes, vocabulary)
    graph.output("token", token, ir.DataType.INT64, ["R"])
    graph.output("confidence", measured, ir.DataType.FLOAT, ["R"])
    if emitted is not None:
        index = graph.op("Unsqueeze", [emitted, graph.constant([1])])
        chosen = choice.log_probabilities_of(index)
        nll = graph.op("Neg", [graph.op("Squeeze", [chosen, graph.constant([1])])])
        graph.output("nll", nll, ir.DataType.FLOAT, ["R"])
    graph.output("logits", logits, ir.DataType.FLOAT, ["R", vocabulary])


class _Choice:
    """The best two of logits [R, V], and logarithms of probabilities."""

    def __init__(self, graph: Graph, logits: ir.Value) -> None:
        self.graph = graph
        self.log_probabilities = graph.op("LogSoftmax", [logits], axis=-1)  # [R, V]
        # [R, 2]
        _, self.top = graph.ops("TopK", [logits, graph.constant([2])], 2, axis=-1, largest=1, sorted=1)

    def log_probabilities_of(self, index: ir.Value) -> ir.Value:
        """int64 [R, n] -> float32 [R, n]."""
        return self.graph.op("GatherElements", [self.log_probabilities, index], axis=1)


class _OwnChoice(_Choice):
    """By one pass of our own operator over the logits."""

    def __init__(self, graph: Graph, dialect: KernelDialect, logits: ir.Value) -> None:
        self.graph, self._logits = graph, logits
        self.top, log_sum = dialect.best_two(logits)
        self._log_sum = graph.op("Unsqueeze", [log_sum, graph.constant([1])])

    def log_probabilities_of(self, index: ir.Value) -> ir.Value:
        found = self.graph.op("GatherElements", [self._logits, index], axis=1)
        return self.graph.op("Sub", [found, self._log_sum])


def exit_rows(head: Head) -> str:
    """The name of the weight of a head that knows some tokens only."""
    return f"{head.weight}.exit_rows"


def _normed(graph: Graph, dialect: Dialect, hidden: ir.Value, head: Head) -> ir.Value:
    """float32 [R, d] -> the head's input, in the compute type."""
    if head.adapter is not None:
        hidden = _adapted(graph, dialect, hidden, head.adapter)
    normed = dialect.norm(hidden, head.norm)
    if head.scale != 1.0:
        normed = graph.op("Mul", [normed, graph.constant(np.float32(head.scale))])
    return graph.to_compute(normed)


def _weights(graph: Graph, head: Head, packed: bool, tokens: np.ndarray | None) -> list[ir.Value]:
    """The head's weight [classes, d], and where it has a class for other tokens, a bias."""
    if tokens is None:
        return [graph.weight(head.weight) if packed else graph.unpacked_weight(head.weight)]
    if head.other is None:
        return [graph.selected_weight(head.weight, tokens, exit_rows(head))]
    assert head.other.bias is not None
    bias = np.concatenate([np.zeros(len(tokens), np.float32), graph.read(head.other.bias)])
    weight = graph.selected_weight(head.weight, tokens, exit_rows(head), [head.other.weight])
    return [weight, graph.table(f"{exit_rows(head)}.bias", bias)]


def _in_whole_vocabulary(graph: Graph, logits: ir.Value, tokens: np.ndarray, classes: int, vocabulary: int) -> ir.Value:
    """[R, classes] -> [R, V]: what reads logits need not know which tokens the head knows."""
    place = np.full(vocabulary, classes, np.int64)
    place[tokens] = np.arange(len(tokens))
    rows = graph.op("Shape", [logits], start=0, end=1)
    shape = graph.op("Concat", [rows, graph.constant([1])], axis=0)
    unknown = graph.op("Expand", [graph.constant(np.array([UNKNOWN])), shape])
    extended = graph.op("Concat", [logits, unknown], axis=1)
    return graph.op("Gather", [extended, graph.table("exit_vocabulary.place", place, ir.DataType.INT64)], axis=1)


def _adapted(graph: Graph, dialect: Dialect, hidden: ir.Value, adapter: Adapter) -> ir.Value:
    """float32 [R, d] -> the same."""
    inner = fp32_linear(graph, dialect.norm(hidden, adapter.norm), adapter.down)
    outer = fp32_linear(graph, activate(graph, inner, "silu"), adapter.up)
    return graph.op("Add", [hidden, outer])


def _confidence(graph: Graph, choice: _Choice, measure: ConfidenceMeasure, vocabulary: int) -> ir.Value:
    """[R] in [0, 1], higher is more confident."""
    if measure == "entropy":
        log_probabilities = choice.log_probabilities
        terms = graph.op("Mul", [graph.op("Exp", [log_probabilities]), log_probabilities])
        negative = graph.op("ReduceSum", [terms, graph.constant([1])], keepdims=0)
        scaled = graph.op("Div", [negative, graph.constant(np.float32(np.log(vocabulary)))])
        return _clip(graph, graph.op("Add", [scaled, graph.constant(np.float32(1))]))
    best_two = graph.op("Exp", [choice.log_probabilities_of(choice.top)])
    best = graph.op("Gather", [best_two, graph.constant(np.int64(0))], axis=1)
    if measure == "max-prob":
        return _clip(graph, best)
    second = graph.op("Gather", [best_two, graph.constant(np.int64(1))], axis=1)
    return _clip(graph, graph.op("Sub", [best, second]))


def _clip(graph: Graph, x: ir.Value) -> ir.Value:
    """Rounding may step over the ends of [0, 1]; the contract does not."""
    return graph.op("Clip", [x, graph.constant(np.float32(0)), graph.constant(np.float32(1))])
