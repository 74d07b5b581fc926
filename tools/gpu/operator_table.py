"""The table of what ONNX Runtime registers for CUDA, made where onnxruntime-gpu is installed and its libraries load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("operators.json")
SOURCE = (
    "onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def() and get_all_operator_schema(), which "
    "ONNX Runtime's docs/OperatorKernels.md is made from"
)
PROVIDER = "CUDAExecutionProvider"
OPEN_END = 2**31 - 1
# The opset of the graphs (graphs/graph.py).
OPSET = 24
DOMAINS = {"": OPSET, "com.microsoft": 1}


def _plain(type_: str) -> str:
    return type_.removeprefix("tensor(").removesuffix(")")


def dump() -> dict[str, Any]:
    """The table of the ONNX Runtime that is installed: for each operator of OPSET the names and type parameters of its
    inputs and outputs, its attributes, and of each kernel the types that it takes for type parameters or inputs."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = [kernel for kernel in state.get_all_opkernel_def() if kernel.provider == PROVIDER]
    if not kernels:
        raise SystemExit(
            "error: this ONNX Runtime shows no CUDA kernels; install onnxruntime-gpu and its CUDA libraries"
        )
    schemas: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        key = schema.domain, schema.name
        newest = schemas[key].since_version if key in schemas else 0
        if newest < schema.since_version <= DOMAINS.get(schema.domain, 0):
            schemas[key] = schema
    return {
        "onnxruntime": onnxruntime.__version__,
        "cuda": getattr(build_and_package_info, "cuda_version", ""),
        "source": SOURCE,
        "opset": OPSET,
        "operators": {
            f"{domain}|{name}": _entry(schema, [k for k in kernels if (k.domain, k.op_name) == (domain, name)])
            for (domain, name), schema in sorted(schemas.items())
            if any((kernel.domain, kernel.op_name) == (domain, name) for kernel in kernels)
        },
    }


def _entry(schema: Any, kernels: list[Any]) -> dict[str, Any]:
    since = schema.since_version
    found = {
        json.dumps({name: sorted(map(_plain, types)) for name, types in sorted(kernel.type_constraints.items())})
        for kernel in kernels
        if _serves(*kernel.version_range, since)
    }
    return {
        "since": since,
        "inputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.inputs],
        "variadic": any("Variadic" in str(formal.option) for formal in schema.inputs),
        "outputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.outputs],
        "attributes": sorted(schema.attributes),
        "kernels": [json.loads(kernel) for kernel in sorted(found)],
    }


def _serves(start: int, end: int, since: int) -> bool:
    """Whether a kernel is for an operator as it is since a version: one without an end is for the version that it
    names alone (KernelRegistry::VerifyKernelDef)."""
    return start == since or (start < since <= end and end != OPEN_END)


def write(content: Mapping[str, Any], path: Path) -> None:
    """A line an operator, so that changes can be read."""
    head = {key: value for key, value in content.items() if key != "operators"}
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in content["operators"].items()]
    text = json.dumps(head)[:-1] + ', "operators": {\n' + ",\n".join(lines) + "\n}}\n"
    json.loads(text)
    path.write_text(text, encoding="utf-8")
