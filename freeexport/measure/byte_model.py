"""Bytes that decoding reads: of layers and heads, as a model of costs, and against memory bandwidth."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from freeexport.system.child import run_child
from graphs.step_costs import StepCosts
from runtime.bundle.bundle import Bundle
from runtime.errors import OptionError

if TYPE_CHECKING:
    import onnx

    from runtime.bundle.manifest import Manifest

# More than any cache holds; the best of several passes counts, as the machine was then disturbed least.
BUFFER, PASSES = 1 << 30, 8


def measured(manifest: Manifest) -> StepCosts:
    """Milliseconds, from what `convert` timed at the bundle's own exit layer. Raises OptionError where it did not."""
    costs = manifest.costs
    if costs is None:
        raise OptionError("the bundle holds no measured costs; convert it again without --verify none")
    # A shallow step with its head has the exit's own layers too; one without has neither.
    own, both = manifest.exit_layers, costs.head
    layer = (costs.shallow_without_head + costs.deep[1] - both) / (manifest.layers - own)
    growth = {size: seconds / costs.deep[1] for size, seconds in costs.deep.items()}
    return StepCosts(1e3 * layer, 1e3 * max(0.0, both - own * layer), growth, measured=True)


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of weights that a call reads: for every token, and by the head, where it runs."""

    layers: int
    head: int


def bandwidth_of(threads: int) -> float:
    """Bytes a second that `threads` threads read together, measured in a process of its own."""
    # numpy's matrix library must not add threads of its own.
    alone = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return float(run_child("freeexport.measure.byte_model", str(threads), variables=alone))


def measure_bandwidth(threads: int, size: int = BUFFER, passes: int = PASSES) -> float:
    """Bytes a second that `threads` threads read together from `size` bytes; the best of `passes`."""
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    # Either may be faster, by the instructions that numpy has for it here.
    readers = (np.sum, np.max, lambda part: np.dot(part.view(np.float64), part.view(np.float64)))
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            for reader in readers:
                began = perf_counter()
                list(pool.map(reader, parts))
                best = max(best, sum(part.nbytes for part in parts) / (perf_counter() - began))
    return best


def engine_bytes(graph: Path) -> EngineBytes:
    """Weights of an engine by who reads them. What depends on the input `head_rows`, or on `exit_lengths` where the
    exit has layers of its own, is the head. Of a table that rows are gathered from, only a row is read: it counts as
    nothing."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    sizes = {tensor.name: _tensor_bytes(tensor) for tensor in model.graph.initializer}
    head = _reached(model.graph.node, {"head_rows", "exit_lengths"})
    total: dict[bool, int] = defaultdict(int)
    for name, size in sizes.items():
        readers = [(number, node) for number, node in enumerate(model.graph.node) if name in node.input]
        # A tensor that layers and head share is read by both.
        for in_head in {number in head for number, node in readers if not _gathers(node, name)}:
            total[in_head] += size
    return EngineBytes(total[False], total[True])


def token_bytes(bundle: Bundle, context: float, encoder_tokens: float, exits: bool, passes: float) -> int:
    """Bytes that a token touches at `context` valid positions, on average: the shallow layers, their head where tokens
    may exit, and its share of `passes` deep passes a token with their head; keys and values of these layers, for an
    encoder-decoder also those of `encoder_tokens` in cross-attention."""
    manifest = bundle.manifest
    shallow, deep = (engine_bytes(bundle.engine(name)) for name in ("shallow", "deep"))
    own = manifest.exit_layers
    position = manifest.kv_bytes_per_token / (manifest.layers + own) * (context + encoder_tokens)
    read = shallow.layers + len(manifest.shallow_layers) * position
    read += shallow.head + own * position if exits else 0
    return round(read + passes * (deep.layers + deep.head + len(manifest.deep_layers) * position))


def _reached(nodes: Iterable[onnx.NodeProto], sources: set[str]) -> set[int]:
    """Numbers of the nodes that what `sources` name goes into, directly or through others. Nodes are in order."""
    names, found = set(sources), set()
    for number, node in enumerate(nodes):
        if names.intersection(node.input):
            found.add(number)
            names.update(node.output)
    return found


def _gathers(node: onnx.NodeProto, name: str) -> bool:
    if node.op_type == "PackedRows":
        return name in node.input[1:]
    return node.op_type.startswith("Gather") and name in (node.input[0], *node.input[2:])


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    known = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in known:
        return int(known["length"])
    count = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return -(-count // 2)
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


if __name__ == "__main__":
    print(measure_bandwidth(int(sys.argv[1])))
