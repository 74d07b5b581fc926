"""Whether ONNX Runtime's CUDA provider has a kernel for each node of a bundle: its operator, types and attributes.

    python -m tools.gpu.operators BUNDLE
    python -m tools.gpu.operators --dump     # a new table, where onnxruntime-gpu is installed and its libraries load

The table, tools/gpu/operators.json, is what the provider of one version registers; VALUES are those of attributes that
it registers and then takes. A node without a kernel would run on the CPU, its inputs and outputs copied between.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

TABLE = Path(__file__).with_name("operators.json")
OPSETS = {"": 24, "com.microsoft": 1}  # of the graphs (graphs/graph.py)
# From messages of ONNX Runtime 1.31.1: matmul_nbits.cc, attention.cc and tensorscatter.cc of its CUDA provider.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "com.microsoft|MatMulNBits": {"bits": (2, 4, 8), "block_size": (16, 32, 64, 128, 256)},
    "|Attention": {"softmax_precision": (0, 1, 10, 16)},
    "|TensorScatter": {"mode": (b"linear", b"circular")},
}
Known = Mapping[str, Any]  # an operator's entry in the table, see `dump`


def load_table(path: Path = TABLE) -> dict[str, Any]:
    """The kernels that a version of ONNX Runtime registers for CUDA. ValueError for another opset."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table["opset"] != OPSETS[""]:
        raise ValueError(f"the table is of opset {table['opset']}, the graphs are of {OPSETS['']}; run --dump")
    return table


def check_graph(model: onnx.ModelProto, name: str, table: Mapping[str, Any]) -> list[str]:
    """The nodes without a kernel in a graph called `name`, each with the problem."""
    graph = model.graph
    types = {value.name: _type_name(value.type.tensor_type.elem_type) for value in graph.input}
    types.update({tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer})
    found = [
        f"{name}: {imported.domain or 'ai.onnx'} graph: opset {imported.version} is not in the table"
        for imported in model.opset_import
        if OPSETS.get(imported.domain) != imported.version
    ]
    for node in graph.node:
        operator = f"{node.domain}|{node.op_type}"
        known = table["operators"].get(operator)
        problem = _problem(node, operator, known, types) if known else "no kernel is registered"
        if problem:
            found.append(f"{name}: {node.op_type} {node.name or node.output[0]}: {problem}")
        if known:
            types.update(_output_types(node, known, types))
    return found


def _problem(node: onnx.NodeProto, operator: str, known: Known, types: Mapping[str, str]) -> str:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    unknown = sorted(attributes.keys() - set(known["attributes"]))
    if unknown:
        return f"attribute {unknown[0]} is not in its schema"
    extra = [name for name in list(node.input)[len(known["inputs"]) :] if name]
    if extra and not known["variadic"]:
        return f"input {extra[0]} is more than its schema has"
    for name, allowed in VALUES.get(operator, {}).items():
        if name in attributes and attributes[name] not in allowed:
            return f"{name} = {attributes[name]} is refused"
    if not known["kernels"]:
        return "no kernel is registered for this opset"
    bound = _bound(node, known, types)
    fitting = (all(bound[p] in allowed for p, allowed in kernel.items() if p in bound) for kernel in known["kernels"])
    if not any(fitting):
        return f"no kernel is registered for {', '.join(f'{name} {type_}' for name, type_ in sorted(bound.items()))}"
    return ""


def _bound(node: onnx.NodeProto, known: Known, types: Mapping[str, str]) -> dict[str, str]:
    """The type of each type parameter, and of each input and output by its formal name, that a node has."""
    found: dict[str, str] = {}
    for number, value in enumerate(node.input):
        if value and known["inputs"]:
            formal, parameter = known["inputs"][min(number, len(known["inputs"]) - 1)]
            found[parameter] = found[formal] = types.get(value, "unknown")
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            found[known["outputs"][0][1]] = _type_name(attribute.i)
    return found


def _output_types(node: onnx.NodeProto, known: Known, types: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    bound = _bound(node, known, types)
    for number, value in enumerate(node.output):
        if value:
            _, parameter = known["outputs"][min(number, len(known["outputs"]) - 1)]
            # An output that no input decides has its one type in all kernels, or what the schema calls it.
            only = {type_ for kernel in known["kernels"] for type_ in kernel.get(parameter, [])}
            yield value, bound.get(parameter) or (only.pop() if len(only) == 1 else parameter)


def _type_name(number: int) -> str:
    """A type's name in ONNX Runtime: float, float16, int64."""
    return onnx.TensorProto.DataType.Name(number).lower()


def _plain(type_: str) -> str:
    return type_.removeprefix("tensor(").removesuffix(")")


def dump() -> dict[str, Any]:
    """The table of the ONNX Runtime that is installed: for each operator the names and type parameters of its inputs
    and outputs, its attributes, and of each kernel the types that it takes for type parameters or inputs."""
    import onnxruntime
    from onnxruntime.capi import build_and_package_info
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = [kernel for kernel in state.get_all_opkernel_def() if kernel.provider == "CUDAExecutionProvider"]
    if not kernels:
        raise SystemExit("error: this ONNX Runtime shows no CUDA kernels; install onnxruntime-gpu and its libraries")
    schemas: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        key = schema.domain, schema.name
        newest = schemas[key].since_version if key in schemas else 0
        if newest < schema.since_version <= OPSETS.get(schema.domain, 0):
            schemas[key] = schema
    own = {key: [kernel for kernel in kernels if (kernel.domain, kernel.op_name) == key] for key in schemas}
    return {
        "onnxruntime": onnxruntime.__version__,
        "cuda": getattr(build_and_package_info, "cuda_version", ""),
        "source": "get_all_opkernel_def() and get_all_operator_schema() of onnxruntime_pybind11_state",
        "opset": OPSETS[""],
        "operators": {"|".join(key): _entry(schemas[key], own[key]) for key in sorted(schemas) if own[key]},
    }


def _entry(schema: Any, kernels: list[Any]) -> dict[str, Any]:
    since, found = schema.since_version, set()
    for kernel in kernels:
        start, end = kernel.version_range
        # A kernel without an end is for the version that it names alone (KernelRegistry::VerifyKernelDef).
        if start == since or (start < since <= end and end != 2**31 - 1):
            taken = {name: sorted(map(_plain, types)) for name, types in sorted(kernel.type_constraints.items())}
            found.add(json.dumps(taken))
    return {
        "since": since,
        "inputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.inputs],
        "variadic": any("Variadic" in str(formal.option) for formal in schema.inputs),
        "outputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.outputs],
        "attributes": sorted(schema.attributes),
        "kernels": [json.loads(kernel) for kernel in sorted(found)],
    }


def write(content: Mapping[str, Any], path: Path = TABLE) -> None:
    """A line an operator, so that changes can be read."""
    head = {key: value for key, value in content.items() if key != "operators"}
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in content["operators"].items()]
    text = json.dumps(head)[:-1] + ', "operators": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def check_bundle(bundle: Path, table: Mapping[str, Any]) -> list[str]:
    """Nodes without a kernel in all graphs of a directory."""
    graphs = sorted(bundle.glob("*.onnx"))
    return [
        each for path in graphs for each in check_graph(onnx.load(path, load_external_data=False), path.stem, table)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--dump", action="store_true", help=f"write {TABLE.name} from the installed onnxruntime-gpu")
    arguments = parser.parse_args()
    if arguments.dump:
        write(dump())
    if arguments.bundle is None:
        return 0 if arguments.dump else parser.error("give a bundle, or --dump")
    if not list(arguments.bundle.glob("*.onnx")):
        print(f"error: {arguments.bundle} has no graphs; give a bundle of freeexport convert", file=sys.stderr)
        return 1
    table = load_table()
    findings = check_bundle(arguments.bundle, table)
    print(*findings, f"{len(findings)} nodes without a CUDA kernel in ONNX Runtime {table['onnxruntime']}", sep="\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
