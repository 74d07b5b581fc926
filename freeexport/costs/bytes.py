"""Byte model: estimates decoding time from the bytes that engine calls read.

The bytes are those of weights, keys and values. If decoding is much slower than predicted,
something else costs time. If it is faster, weights stayed in the processor's cache. The model also
predicts from a checkpoint's shapes before a bundle exists, and replaces timings on a busy machine.
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
from graphs.exit_head import EXIT_LAYERS, EXIT_MAP
from runtime.bundle.bundle import Bundle
from runtime.bundle.costs import Costs
from runtime.bundle.manifest import FEATURE_STATES, ExitInput
from runtime.errors import BundleError
from runtime.result import GenerationResult

if TYPE_CHECKING:
    from graphs.description import Description, Linear
    from graphs.weights import Weights

# Overhead of an engine call, in bytes that could be read meanwhile.
CALL_BYTES = 1_000_000
# Cost of each further row of a call as a share of the first row's weights, by kernel instructions
# and precision. Measured with 8 rows against 1 (docs/precision.md).
_ROW_SHARES = {("amx", "int8"): 0.05, ("amx", "int4"): 0.07, ("avx512-vnni", "int8"): 0.13}
_ROW_SHARES |= {("avx512-vnni", "int4"): 0.25, ("avx2", "int8"): 0.24, ("avx2", "int4"): 0.13}
_ROW_SHARES |= {("avx512-bf16", "int8"): 0.13, ("avx512-bf16", "int4"): 0.25}
# Used for combinations that were not measured.
_OTHER_ROW_SHARE = 0.13
# Rows of deep passes with recorded costs. `Costs` interpolates between them.
_SIZES = (1, 16)


class EngineBytes(NamedTuple):
    """Bytes of weights that a call of an engine reads.

    Attributes:
        layers: Layers that run for every token.
        own: The exit's own layers.
        head: The head.
    """

    layers: float
    own: float
    head: float


def engine_bytes(path: Path) -> EngineBytes:
    """Return the bytes of an engine's weights by the part that reads them.

    Nodes that depend on the input `head_rows` are the head, except the exit's own layers, whose
    weights have names of their own. Tables from which rows are gathered count as 0, because a call
    reads only single rows of them.
    """
    import onnx_ir as ir

    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's and onnx_ir's own
        raise BundleError(
            f"{path} is no ONNX graph ({type(error).__name__}); convert the checkpoint again"
        ) from None
    of_head: set[str | None] = {"head_rows"}
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph:
        inputs = {value.name for value in node.inputs if value is not None}
        part = "layers"
        if inputs & of_head:
            part = "head"
            of_head.update(value.name for value in node.outputs)
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
                own = value.name.startswith((EXIT_LAYERS, EXIT_MAP))
                readers[value.name].add("own" if own else part)
    # A tensor that the layers and the head share is read by both.
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
    """Return the bytes of the shallow and the deep engine.

    The weights of a separate exit engine count as the shallow engine's.
    """
    shallow, deep = (engine_bytes(bundle.engine(name)) for name in ("shallow", "deep"))
    if bundle.manifest.exit_engine:
        exit = engine_bytes(bundle.engine("exit"))
        shallow = EngineBytes(shallow.layers, exit.layers + exit.own, exit.head)
    return shallow, deep


@dataclass(frozen=True)
class Calls:
    """Engine calls of a request after its prompt.

    Attributes:
        prompt: Tokens of the prompt.
        tokens: Tokens that these calls decided.
        steps: Calls of the shallow engine.
        heads: Calls among them that also run its head.
        own: The shallow calls run the exit's own layers.
        further: Rows of the shallow calls beyond one each.
        passes: Deep passes by their number of rows.
        drafts: By source, accepted and compared tokens at each position of its drafts.
    """

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
        """Read the JSON form of `dataclasses.asdict`."""
        return cls(
            **{**found, "passes": {int(rows): count for rows, count in found["passes"].items()}}
        )


def calls_of(result: GenerationResult) -> Calls:
    """Derive the calls of a result from its statistics.

    Rows after the first rejected draft of the exit count as calls with the head.
    """
    stats = result.stats
    prompt = stats.prompt_tokens
    tokens = stats.candidates
    passes = dict(stats.sync_sizes)
    if stats.mode == "shallow":
        return Calls(prompt, tokens, tokens, heads=tokens, own=True, further=0, passes=passes)
    rows = sum(size * count for size, count in passes.items())
    if stats.mode == "free":  # no pass may follow the last tokens
        rows = tokens + sum(drafts.proposed - drafts.accepted for drafts in stats.drafts.values())
    # Drafts from text are read in one call. Drafts after the last token of a request are not read.
    further = min(
        rows, sum(drafts.proposed for source, drafts in stats.drafts.items() if source != "exit")
    )
    steps = rows - further
    heads = 0
    if stats.mode == "rollback":
        heads = steps
    elif stats.mode in ("free", "lossless"):
        of_exit = stats.drafts.get("exit")
        rejected = of_exit.proposed - of_exit.accepted if of_exit is not None else 0
        heads = sum(one is not None for one in result.confidence[stats.predicted :]) + rejected
    by_position = {source: counts.by_position for source, counts in stats.drafts.items()}
    return Calls(
        prompt,
        tokens,
        steps,
        heads=min(steps, heads),
        own=stats.reads_exit,
        further=further,
        passes=passes,
        drafts=by_position,
    )


class ByteModel:
    """Bytes that calls of a bundle's engines read."""

    def __init__(self, bundle: Bundle, instructions: str) -> None:
        self._manifest = manifest = bundle.manifest
        self._shallow, self._deep = decoder_bytes(bundle)
        self._position = manifest.kv_bytes_per_token / (manifest.layers + manifest.exit_layers)
        self.row_share = row_share(manifest.precision, instructions)

    def token(self, requests: Iterable[Calls]) -> float:
        """Return the mean bytes per token."""
        read = 0.0
        tokens = 0
        for calls in requests:
            read += self._read(calls)
            tokens += calls.tokens
        return read / max(1, tokens)

    def _read(self, calls: Calls) -> float:
        manifest = self._manifest
        shallow = self._shallow
        deep = self._deep
        row = self.row_share
        # On average half of the tokens are valid. Cross-attention reads as many bytes per position
        # of the prompt.
        position = self._position * (calls.prompt + calls.tokens / 2)
        weights = shallow.layers
        layers = len(manifest.shallow_layers)
        if manifest.exit_engine:
            # The exit engine runs only for predictions. It then also computes earlier rows that
            # are missing, or were computed without features.
            again = sum(count * (k - 1) for k, count in calls.passes.items()) if calls.heads else 0
            each = shallow.own + manifest.exit_layers * position + CALL_BYTES
            exits = calls.heads * each + again * row * shallow.own
        else:
            exits = 0.0
        if not manifest.exit_engine and (calls.own or not manifest.packed):
            weights = weights + shallow.own
            layers = layers + manifest.exit_layers
        steps = sum(calls.passes.values()) if manifest.exit_embeds else calls.steps
        read = steps * (weights + layers * position + CALL_BYTES) + calls.further * row * weights
        read += exits + calls.heads * shallow.head
        weights = deep.layers + deep.head
        beside = len(manifest.deep_layers) * position + CALL_BYTES
        return read + sum(
            count * (weights * (1 + row * (k - 1)) + beside) for k, count in calls.passes.items()
        )


def row_share(precision: str, instructions: str) -> float:
    """Return the cost of a further row of a call as a share of the first row's."""
    return _ROW_SHARES.get(
        (instructions, {"mixed": "int4"}.get(precision, precision)), _OTHER_ROW_SHARE
    )


def costs_by_bytes(
    shallow: EngineBytes, deep: EngineBytes, row: float, calls: tuple[int, int] = (1, 0)
) -> Costs:
    """Return costs in bytes, without keys and values.

    Args:
        shallow: Weights of the shallow engine.
        deep: Weights of the deep engine.
        row: See `row_share`.
        calls: Engine calls per step of the shallow layers, and of the exit in addition.
    """
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
    """Return the costs of a bundle's engines in bytes.

    None for a GPU bundle, or if onnx_ir is not installed.
    """
    manifest = bundle.manifest
    if manifest.target != "cpu" or find_spec("onnx_ir") is None:
        return None
    row = row_share(manifest.precision, kernel_instructions())
    calls = 0 if manifest.exit_embeds else 1, 1 if manifest.exit_engine else 0
    return costs_by_bytes(*decoder_bytes(bundle), row, calls)


def known_costs(bundle: Bundle, *measured: Costs | None) -> Costs | None:
    """Return the first costs measured on an idle machine, or else costs in bytes.

    Timings of a busy machine do not allow predictions.
    """
    trusted = (one for one in measured if one is not None and one.trusted)
    return next(trusted, None) or bundle_costs(bundle)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of 8-bit weights that a token reads.

    Attributes:
        layer: One decoder layer.
        head: The head.
        map: A linear map [d, d] before the exit's own layers.
        row: Cost of a further row of a call as a share of the first row's.
    """

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
        """Return the costs of a model with an exit.

        Args:
            share: Size of the exit vocabulary as a share of the vocabulary.
            reads: Input of the exit's own layers.
        """
        states = FEATURE_STATES[reads]
        of_exit = own * self.layer + ((1 + states) * self.map if own else 0.0)
        shallow = EngineBytes(exit_layer * self.layer, of_exit, share * self.head)
        deep = EngineBytes((layers - exit_layer) * self.layer, 0, self.head)
        return costs_by_bytes(shallow, deep, self.row, (min(1, exit_layer), min(1, states)))


def step_bytes(description: Description, weights: Weights) -> StepBytes:
    """Return the bytes that a token reads, with the row share of this processor.

    Counts matrices only, because they dominate decoding.
    """
    read: list[Linear | None] = []
    layers = description.decoder.layers
    for layer in layers:
        own = layer.attention
        cross = layer.cross
        mlp = layer.mlp
        read += [own.query, own.key, own.value, own.output, mlp.up, mlp.down, mlp.gate]
        # Keys and values of cross-attention are computed once per request.
        read += [cross.query, cross.output] if cross else []
    total = sum(math.prod(weights.shape(linear.weight)) for linear in read if linear is not None)
    head = math.prod(weights.shape(description.decoder.head.weight))
    row = row_share("int8", kernel_instructions())
    return StepBytes(total / len(layers), head, description.hidden_size**2, row)
