"""A graph of a bundle as a TensorRT network: strongly typed, through TensorRT's own ONNX parser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphs.errors import BuildError
from runtime.tensorrt.plan import Profile


def parse(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and its parser. BuildError lists what the parser refuses, with its nodes."""
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        refused = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(
            f"TensorRT {trt.__version__} cannot parse {graph.name}: {'; '.join(refused) or 'no reason given'}; "
            "convert with --target tensorrt, or use a newer TensorRT"
        )
    # The network refers to weights that the parser holds.
    return network, parser


def _parser_error(error: Any) -> str:
    where = f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'})"
    return f"{where}: {' '.join(error.desc().split())[:300]}"


def dimensions(graph: Path) -> dict[str, list[int | str]]:
    """The shape of each input of an ONNX file, dimensions by name where they are free."""
    inputs = ir.load(graph).graph.inputs
    return {str(value.name): [_dimension(size) for size in value.shape or ()] for value in inputs}


def _dimension(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)


def add_profiles(builder: Any, config: Any, shapes: dict[str, list[int | str]], profiles: Sequence[Profile]) -> None:
    """Tell TensorRT the least, usual and greatest shape of every input in each profile, in order."""
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, shape in shapes.items():
            sizes = [profile.ranges[size] if isinstance(size, str) else (size,) * 3 for size in shape]
            added.set_shape(name, *([size[which] for size in sizes] for which in range(3)))
        config.add_optimization_profile(added)
