"""Widens half-precision graphs to fp32, so that the CPU can run bundles for a GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from runtime.bundle.bundle import Bundle, engine_files, sha256_of
from runtime.bundle.manifest import MANIFEST, File

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT
# Operators whose results do not have the type of their inputs.
_OTHERS = frozenset(("Cast", "Shape", "Less", "LessOrEqual", "Greater"))


def widen(graph: ir.Graph, half: ir.DataType, rounds: bool = False) -> None:
    """Widen a graph, in place, to compute in fp32. Stored weights keep their type.

    Args:
        graph: A graph that computes in `half` between its fp32 islands.
        half: The half-precision type.
        rounds: Round the results of operators to `half`. The graph then computes what a device
            computes that multiplies in `half` and accumulates in fp32.
    """
    rounded = list(_results(graph, half)) if rounds else []
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") == half:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    for value in graph.initializers.values():
        if value.dtype == half:
            _cast_uses(graph, value, f"{value.name}.widened", FLOAT)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == half and not value.is_initializer():
            value.dtype = FLOAT
    for value in rounded:
        narrow = _cast_uses(graph, value, f"{value.name}.narrow", half)
        wide = _cast_uses(graph, narrow, f"{value.name}.rounded", FLOAT)
        if value.is_graph_output():
            graph.outputs[graph.outputs.index(value)] = wide
            wide.dtype = FLOAT
            wide.shape = value.shape
            name = value.name
            value.name = f"{name}.exact"
            wide.name = name
    graph.sort()


def _cast_uses(graph: ir.Graph, value: ir.Value, name: str, to: ir.DataType) -> ir.Value:
    """Cast a value for all its readers."""
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": int(to)})
    cast.outputs[0].name = name
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    graph.append(cast)
    return cast.outputs[0]


def _results(graph: ir.Graph, half: ir.DataType) -> Iterator[ir.Value]:
    """Yield results in `half`: outputs of operators that read `half`, and of casts to it."""
    known = {
        value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == half
    }
    for node in graph:
        given = node.op_type not in _OTHERS and any(value in known for value in node.inputs)
        if given or (node.op_type == "Cast" and node.attributes.get_int("to") == half):
            known.update(node.outputs)
            yield from node.outputs


@contextmanager
def fp32_copy(bundle: Bundle, rounds: bool) -> Iterator[Bundle]:
    """Context manager: yields a temporary copy of a bundle, widened to fp32.

    It yields the bundle itself if that computes in fp32.

    Args:
        rounds: See `widen`.
    """
    manifest = bundle.manifest
    if manifest.float_type == "fp32":
        yield bundle
        return
    beside = bundle.path.resolve().parent
    place = beside if os.access(beside, os.W_OK) else None
    with TemporaryDirectory(prefix=f".{bundle.path.name}.fp32-", dir=place) as name:
        directory = Path(name)
        graphs = engine_files(manifest)
        files = dict(manifest.files)
        for file in files:
            source = bundle.path / file
            target = directory / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in graphs:
                model = ir.load(source)
                widen(model.graph, HALVES[manifest.float_type], rounds)
                ir.save(model, target)
                files[file] = File(target.stat().st_size, sha256_of(target))
                continue
            try:  # ONNX Runtime does not follow symbolic links out of a graph's folder
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy(source, target)
        widened = replace(manifest, compute="fp32", files=files)
        (directory / MANIFEST).write_text(widened.to_json(), encoding="utf-8")
        yield Bundle.open(directory)
