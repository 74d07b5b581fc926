"""The byte model: decoding takes as long as the bytes of weights, keys and values that its engine calls read.

It predicts speeds from what was decoded, not from how long that took: a measured speed far below says that something
else costs time, one above that weights stayed in the processor's cache. Before there is a bundle it predicts from a
checkpoint's shapes, and on a busy machine it stands in for times.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from freeexport.system.machine import kernel_instructions
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import ExitInput
from runtime.errors import BundleError
from runtime.result import GenerationResult

if TYPE_CHECKING:
    from graphs.description import Description, Linear
    from graphs.weights import Weights

# Bytes that could be read in the time that an engine call takes beside reading.
CALL_BYTES = 1_000_000
# What a further row of a call costs, as a share of the first one's weights, by the instructions of our kernels and the
# precision (docs/precision.md, rows: 8 of them against 1); the last for those without a figure.
_ROW_SHARES = {("amx", "int8"): 0.05, ("amx", "int4"): 0.07, ("avx512-vnni", "int8"): 0.13}
_ROW_SHARES |= {("avx512-vnni", "int4"): 0.25, ("avx2", "int8"): 0.24, ("avx2", "int4"): 0.13}
_OTHER_ROW_SHARE = 0.13
# Rows of deep passes whose costs are kept; between them costs are straight.
_SIZES = (1, 16)


class EngineBytes(NamedTuple):
    """Bytes of weights that a call of an engine reads: by its layers for every token, and where they run, by the exit's
    own layers and the head."""

    layers: float
    own: float
    head: float


def engine_bytes(path: Path) -> EngineBytes:
    """Weights of an engine by who reads them. What depends on the input `head_rows` is the head, and what depends on
    `exit_lengths` alone the exit's own layers. Of a table that rows are gathered from, only a row is read: it counts
    as nothing. Raises BundleError where the file is no graph."""
    import onnx_ir as ir

    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's and onnx_ir's own
        raise BundleError(
            f"{path} is no ONNX graph ({type(error).__name__}); convert the checkpoint again"
        ) from None
    of_head: set[str | None] = {"head_rows"}
    of_own: set[str | None] = {"exit_lengths"}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph:
        inputs = {value.name for value in node.inputs if value is not None}
        part = "head" if inputs & of_head else "own" if inputs & of_own else "layers"
        for depends, of_part in (("head", of_head), ("own", of_own)):
            if part == depends:
                of_part.update(value.name for value in node.outputs)
        for place, value in enumerate(node.inputs):
            if node.op_type == "PackedRows":
                one_row = place > 0
            else:
                one_row = node.op_type.startswith("Gather") and place != 1
            if (
                value is not None
                and value.name
                and value.name in graph.initializers
                and not one_row
            ):
                readers[value.name].add(part)
    # A tensor that layers and head share is read by both.
    sizes = {
        name: value.const_value.nbytes
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    return EngineBytes(
        *(
            sum(sizes[name] for name, by in readers.items() if part in by)
            for part in EngineBytes._fields
        )
    )


def decoder_bytes(bundle: Bundle) -> tuple[EngineBytes, EngineBytes]:
    """Weights of the shallow and the deep engine; those of an engine of the exit are the shallow one's."""
    shallow, deep = (engine_bytes(bundle.engine(name)) for name in ("shallow", "deep"))
    if bundle.manifest.exit_engine:
        exit = engine_bytes(bundle.engine("exit"))
        shallow = EngineBytes(shallow.layers, exit.layers, exit.head)
    return shallow, deep


def token_bytes(
    bundle: Bundle, context: float, encoder_tokens: float, exits: bool, passes: float
) -> int:
    """Bytes that a token touches at `context` valid positions, on average: the shallow layers, their head where tokens
    may exit, and its share of `passes` deep passes a token with their head; keys and values of these layers, for an
    encoder-decoder also those of `encoder_tokens` in cross-attention."""
    manifest = bundle.manifest
    shallow, deep = decoder_bytes(bundle)
    own = manifest.exit_layers
    position = manifest.kv_bytes_per_token / (manifest.layers + own) * (context + encoder_tokens)
    read = shallow.layers + len(manifest.shallow_layers) * position
    read += shallow.own + shallow.head if exits else 0
    read += (
        own * position if exits or not manifest.packed else 0
    )  # in the standard dialect they always run
    return round(read + passes * (deep.layers + deep.head + len(manifest.deep_layers) * position))


@dataclass(frozen=True)
class Calls:
    """Engine calls of a request after its prompt of so many tokens: `steps` of the shallow decoder, `heads` of them
    with its head, `own` whether with the exit's own layers, and `further` rows that they read beyond one each;
    `passes[k]` of the deep one over k rows. `tokens` were decided by them. `drafts`: by source, tokens accepted at each
    position of its drafts, and compared there."""

    prompt: int
    tokens: int
    steps: int
    heads: int
    own: bool
    further: int
    passes: dict[int, int]
    drafts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Calls:
        """Read what JSON kept of one."""
        return cls(
            **{**found, "passes": {int(rows): count for rows, count in found["passes"].items()}}
        )


def calls_of(result: GenerationResult, lookup: bool = False) -> Calls:
    """The calls of a result by its statistics. `lookup`: it drafted from text alone.

    A row behind the first draft of the exit that was rejected counts as one with the head.
    """
    stats = result.stats
    prompt, tokens, passes = stats.prompt_tokens, stats.candidates, dict(stats.sync_sizes)
    rows = sum(size * count for size, count in passes.items())
    if stats.mode in ("free", "shallow"):  # the last tokens may wait for a pass that never comes
        return Calls(prompt, tokens, tokens, tokens, True, 0, passes)
    # Drafts from text are read in one call; behind the last token of a request none is.
    further = min(
        rows, sum(drafts.proposed for source, drafts in stats.drafts.items() if source != "exit")
    )
    steps, heads = rows - further, 0
    if stats.mode == "rollback":
        heads = steps
    elif stats.mode == "lossless":
        of_exit = stats.drafts.get("exit")
        rejected = of_exit.proposed - of_exit.accepted if of_exit is not None else 0
        heads = sum(one is not None for one in result.confidence[stats.predicted :]) + rejected
    own = stats.mode != "full" and not lookup
    by_position = {source: counts.by_position for source, counts in stats.drafts.items()}
    return Calls(prompt, tokens, steps, min(steps, heads), own, further, passes, by_position)


class ByteModel:
    """Bytes that the calls of a bundle's engines read. `instructions` of our kernels, as `runtime.kernels`
    names them."""

    def __init__(self, bundle: Bundle, instructions: str) -> None:
        self._manifest = manifest = bundle.manifest
        self._shallow, self._deep = decoder_bytes(bundle)
        self._position = manifest.kv_bytes_per_token / (manifest.layers + manifest.exit_layers)
        self.row_share = row_share(manifest.precision, instructions)

    def token(self, requests: Iterable[Calls]) -> float:
        """Bytes of a token, on average."""
        read, tokens = 0.0, 0
        for calls in requests:
            read += self._read(calls)
            tokens += calls.tokens
        return read / max(1, tokens)

    def _read(self, calls: Calls) -> float:
        manifest, shallow, deep, row = self._manifest, self._shallow, self._deep, self.row_share
        # Half of the tokens are there on average; cross-attention reads as many bytes a position of the prompt.
        position = self._position * (calls.prompt + calls.tokens / 2)
        weights, layers = shallow.layers, len(manifest.shallow_layers)
        if manifest.exit_engine:
            # It is asked for predictions only, and then reads the rows before that it has not, or not with features.
            again = sum(count * (k - 1) for k, count in calls.passes.items()) if calls.heads else 0
            each = shallow.own + manifest.exit_layers * position + CALL_BYTES
            exits = calls.heads * each + again * row * shallow.own
        else:
            exits = 0.0
        if not manifest.exit_engine and (calls.own or not manifest.packed):
            weights, layers = weights + shallow.own, layers + manifest.exit_layers
        steps = sum(calls.passes.values()) if manifest.exit_embeds else calls.steps
        read = steps * (weights + layers * position + CALL_BYTES) + calls.further * row * weights
        read += exits + calls.heads * shallow.head
        weights, beside = deep.layers + deep.head, len(manifest.deep_layers) * position + CALL_BYTES
        return read + sum(
            count * (weights * (1 + row * (k - 1)) + beside) for k, count in calls.passes.items()
        )


def row_share(precision: str, instructions: str) -> float:
    """The cost of a further row by these instructions, as a share of the first."""
    return _ROW_SHARES.get(
        (instructions, {"mixed": "int4"}.get(precision, precision)), _OTHER_ROW_SHARE
    )


def costs_by_bytes(
    shallow: EngineBytes, deep: EngineBytes, row: float, calls: tuple[int, int] = (1, 0)
) -> Costs:
    """Costs in bytes, without keys and values. `row`: see `row_share`. `calls`: how many engine calls the shallow
    layers take, and the exit besides."""
    layers, exit = (count * CALL_BYTES for count in calls)
    without_head = shallow.layers + layers
    whole = deep.layers + deep.head
    return Costs(
        shallow=without_head + shallow.own + shallow.head + exit,
        shallow_without_head=without_head,
        deep={rows: whole * (1 + row * (rows - 1)) + CALL_BYTES for rows in _SIZES},
        measured=False,
    )


def bundle_costs(bundle: Bundle) -> Costs | None:
    """Costs by the bytes that the engines of a bundle for a CPU read here; None for a GPU, and where onnx_ir, which
    reads graphs, is not installed."""
    manifest = bundle.manifest
    if manifest.target != "cpu" or find_spec("onnx_ir") is None:
        return None
    row = row_share(manifest.precision, kernel_instructions())
    calls = 0 if manifest.exit_embeds else 1, 1 if manifest.exit_engine else 0
    return costs_by_bytes(*decoder_bytes(bundle), row, calls)


def known_costs(bundle: Bundle, *measured: Costs | None) -> Costs | None:
    """The first of the measured costs that were taken on an idle machine, else those by bytes: times beside other work
    say little."""
    trusted = (one for one in measured if one is not None and one.trusted)
    return next(trusted, None) or bundle_costs(bundle)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of weights in 8 bits that a token reads: in one decoder layer, in the head, and in a linear map [d, d]
    before the exit's own layers. `row`: the cost of a further row of a call, as a share of the first."""

    layer: float
    head: float
    map: float = 0.0
    row: float = _OTHER_ROW_SHARE

    def at(
        self,
        exit_layer: int,
        layers: int,
        own: int = 0,
        share: float = 1.0,
        reads: ExitInput = "state",
    ) -> Costs:
        """Costs of a model of `layers` layers that exits after `exit_layer`, through `own` layers of the exit's own
        and the `share` of the head that an exit vocabulary has. `reads`: the input of these layers."""
        inputs = 2 if reads == "feature" else 1
        of_exit = own * self.layer + (inputs * self.map if own else 0.0)
        shallow = EngineBytes(exit_layer * self.layer, of_exit, share * self.head)
        deep = EngineBytes((layers - exit_layer) * self.layer, 0, self.head)
        return costs_by_bytes(shallow, deep, self.row, (min(1, exit_layer), inputs - 1))


def step_bytes(description: Description, weights: Weights) -> StepBytes:
    """The bytes that a token reads on this processor: those of matrices, as decoding waits for little else."""
    read: list[Linear | None] = []
    layers = description.decoder.layers
    for layer in layers:
        own, cross, mlp = layer.attention, layer.cross, layer.mlp
        read += [own.query, own.key, own.value, own.output, mlp.up, mlp.down, mlp.gate]
        # Keys and values of cross-attention are computed once a request.
        read += [cross.query, cross.output] if cross else []
    total = sum(math.prod(weights.shape(linear.weight)) for linear in read if linear is not None)
    head = math.prod(weights.shape(description.decoder.head.weight))
    row = row_share("int8", kernel_instructions())
    return StepBytes(total / len(layers), head, description.hidden_size**2, row)
