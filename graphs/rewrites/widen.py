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
# What gives no numbers of the kind that it reads.
_OTHERS = frozenset(("Cast", "Shape", "Less", "LessOrEqual", "Greater"))


class Widen(ir.passes.InPlacePass):
    """Before: values of `half`, the type that the graph computes in between its fp32 islands.
    After: weights stay as they are stored, and all else is fp32.

    `rounds`: what an operator gave in `half` is rounded to it, so that the graph gives what a device gives that
    computes in `half` and adds up in fp32.
    """

    def __init__(self, half: ir.DataType, rounds: bool = False) -> None:
        self._half, self._rounds = half, rounds

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        rounded = list(self._results(graph)) if self._rounds else []
        for node in list(graph):
            if node.op_type == "Cast" and node.attributes.get_int("to") == self._half:
                node.attributes["to"] = ir.AttrInt64("to", FLOAT)
        for value in graph.initializers.values():
            if value.dtype == self._half:
                self._widen(graph, value)
        for value in (*graph.inputs, *graph.outputs):
            if value.dtype == self._half and not value.is_initializer():
                value.dtype = FLOAT
        for value in rounded:
            self._round(graph, value)
        graph.sort()
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == self._half and not value.is_initializer():
                raise ir.passes.PostconditionError(f"{value.name} is still {self._half.name}")

    def _results(self, graph: ir.Graph) -> Iterator[ir.Value]:
        """Values that operators give in `half`: those that read it, and casts to it."""
        known = {value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == self._half}
        for node in graph:
            given = node.op_type not in _OTHERS and any(value in known for value in node.inputs)
            if given or (node.op_type == "Cast" and node.attributes.get_int("to") == self._half):
                known.update(node.outputs)
                yield from node.outputs

    def _widen(self, graph: ir.Graph, value: ir.Value) -> None:
        uses = list(value.uses())
        cast = ir.node("Cast", [value], attributes={"to": int(FLOAT)})
        cast.outputs[0].name = f"{value.name}.widened"
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        graph.append(cast)

    def _round(self, graph: ir.Graph, value: ir.Value) -> None:
        uses = list(value.uses())
        narrow = ir.node("Cast", [value], attributes={"to": int(self._half)})
        wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": int(FLOAT)})
        narrow.outputs[0].name, wide.outputs[0].name = f"{value.name}.narrow", f"{value.name}.rounded"
        for node, index in uses:
            node.replace_input_with(index, wide.outputs[0])
        graph.extend([narrow, wide])
        if value.is_graph_output():
            graph.outputs[graph.outputs.index(value)] = wide.outputs[0]
            wide.outputs[0].dtype, wide.outputs[0].shape = FLOAT, value.shape
            value.name, wide.outputs[0].name = f"{value.name}.exact", value.name


@contextmanager
def fp32_copy(bundle: Bundle, rounds: bool) -> Iterator[Bundle]:
    """The graphs of a bundle, widened from half precision to fp32, and the weights that it has; gone at the end.

    `rounds`: see graphs.rewrites.widen.Widen. A bundle that computes in fp32 is its own copy.
    """
    manifest = bundle.manifest
    if manifest.float_type == "fp32":
        yield bundle
        return
    beside = bundle.path.resolve().parent
    place = beside if os.access(beside, os.W_OK) else None
    with TemporaryDirectory(prefix=f".{bundle.path.name}.fp32-", dir=place) as name:
        directory = Path(name)
        change = Widen(HALVES[manifest.float_type], rounds)
        graphs, files = engine_files(manifest), dict(manifest.files)
        for file in files:
            if file in graphs:
                model = ir.load(bundle.path / file)
                change(model)
                ir.save(model, directory / file)
                files[file] = File((directory / file).stat().st_size, sha256_of(directory / file))
            else:
                _link(bundle.path / file, directory / file)
        widened = replace(manifest, compute="fp32", files=files)
        (directory / MANIFEST).write_text(widened.to_json(), encoding="utf-8")
        yield Bundle.open(directory)


def _link(source: Path, target: Path) -> None:
    """ONNX Runtime follows no symbolic links out of a graph's folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)
