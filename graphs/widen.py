"""A graph that computes in half precision as one in fp32, and a bundle for a GPU as one that the CPU runs."""

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
# Operators that give no numbers of the kind that they read.
_OTHERS = frozenset(("Cast", "Shape", "Less", "LessOrEqual", "Greater"))


def widen(graph: ir.Graph, half: ir.DataType, rounds: bool = False) -> None:
    """Before: values of `half`, the type that the graph computes in between its fp32 islands.
    After: weights stay as they are stored, and all else is fp32.

    `rounds`: what an operator gave in `half` is rounded to it, so that the graph gives what a device gives that
    computes in `half` and adds up in fp32.
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
            wide.dtype, wide.shape = FLOAT, value.shape
            value.name, wide.name = f"{value.name}.exact", value.name
    graph.sort()


def _cast_uses(graph: ir.Graph, value: ir.Value, name: str, to: ir.DataType) -> ir.Value:
    """Let all that reads a value read it as another type."""
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": int(to)})
    cast.outputs[0].name = name
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    graph.append(cast)
    return cast.outputs[0]


def _results(graph: ir.Graph, half: ir.DataType) -> Iterator[ir.Value]:
    """Values that operators give in `half`: those that read it, and casts to it."""
    known = {value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == half}
    for node in graph:
        given = node.op_type not in _OTHERS and any(value in known for value in node.inputs)
        if given or (node.op_type == "Cast" and node.attributes.get_int("to") == half):
            known.update(node.outputs)
            yield from node.outputs


@contextmanager
def fp32_copy(bundle: Bundle, rounds: bool) -> Iterator[Bundle]:
    """The graphs of a bundle, widened from half precision to fp32, and the weights that it has; gone at the end.
    `rounds`: see `widen`. A bundle that computes in fp32 is its own copy."""
    manifest = bundle.manifest
    if manifest.float_type == "fp32":
        yield bundle
        return
    beside = bundle.path.resolve().parent
    place = beside if os.access(beside, os.W_OK) else None
    with TemporaryDirectory(prefix=f".{bundle.path.name}.fp32-", dir=place) as name:
        directory = Path(name)
        graphs, files = engine_files(manifest), dict(manifest.files)
        for file in files:
            source, target = bundle.path / file, directory / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in graphs:
                model = ir.load(source)
                widen(model.graph, HALVES[manifest.float_type], rounds)
                ir.save(model, target)
                files[file] = File(target.stat().st_size, sha256_of(target))
                continue
            try:  # ONNX Runtime follows no symbolic links out of a graph's folder
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy(source, target)
        widened = replace(manifest, compute="fp32", files=files)
        (directory / MANIFEST).write_text(widened.to_json(), encoding="utf-8")
        yield Bundle.open(directory)
