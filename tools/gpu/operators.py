"""Check that ONNX Runtime's CUDA provider has a kernel for every node of a bundle.

    python -m tools.gpu.operators BUNDLE
    python -m tools.gpu.operators --dump     # update the table; needs a working onnxruntime-gpu

Checks operators, types and attributes. The table, tools/gpu/operators.json, lists the kernels that
the provider of one version registers. VALUES lists the attribute values that these kernels accept.
A node without a kernel would run on the CPU, with copies of its inputs and outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import onnx
from google.protobuf.message import DecodeError

from runtime.errors import EngineError, OptionError, one_line
from tools.data.splits import run_tool

TABLE = Path(__file__).with_name("operators.json")
OPSETS = {"": 24, "com.microsoft": 1}  # as in graphs/graph.py
# From matmul_nbits.cc, attention.cc and tensorscatter.cc of ONNX Runtime 1.31.1's CUDA provider.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "com.microsoft|MatMulNBits": {"bits": (2, 4, 8), "block_size": (16, 32, 64, 128, 256)},
    "|Attention": {"softmax_precision": (0, 1, 10, 16)},
    "|TensorScatter": {"mode": (b"linear", b"circular")},
}
Known = Mapping[str, Any]  # an operator's entry in the table, see `dump`


def load_table(path: Path = TABLE) -> dict[str, Any]:
    """Load the table of CUDA kernels."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if table["opset"] != OPSETS[""]:
        raise OptionError(
            f"the table is for opset {table['opset']}, and graphs have {OPSETS['']}; run --dump"
        )
    return table


def check_graph(model: onnx.ModelProto, name: str, table: Mapping[str, Any]) -> list[str]:
    """Return the nodes of the graph `name` that have no kernel, each with the reason."""
    graph = model.graph
    types = {value.name: _type_name(value.type.tensor_type.elem_type) for value in graph.input}
    types.update({tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer})
    unsupported = []
    for opset in model.opset_import:
        if OPSETS.get(opset.domain) != opset.version:
            domain = opset.domain or "ai.onnx"
            unsupported.append(f"{name}: {domain} graph: opset {opset.version} is not in the table")
    for node in graph.node:
        operator = f"{node.domain}|{node.op_type}"
        known = table["operators"].get(operator)
        problem = _problem(node, operator, known, types) if known else "no kernel is registered"
        if problem:
            unsupported.append(f"{name}: {node.op_type} {node.name or node.output[0]}: {problem}")
        if known:
            types.update(_output_types(node, known, types))
    return unsupported


def _problem(node: onnx.NodeProto, operator: str, known: Known, types: Mapping[str, str]) -> str:
    attributes = {
        attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute
    }
    unknown = sorted(attributes.keys() - set(known["attributes"]))
    if unknown:
        return f"attribute {unknown[0]} is not in its schema"
    extra = [name for name in list(node.input)[len(known["inputs"]) :] if name]
    if extra and not known["variadic"]:
        return f"input {extra[0]} is not in its schema"
    for name, allowed in VALUES.get(operator, {}).items():
        if name in attributes and attributes[name] not in allowed:
            return f"{name} = {attributes[name]} is not supported"
    if not known["kernels"]:
        return "no kernel is registered for this opset"
    bound = _bound(node, known, types)
    for kernel in known["kernels"]:
        if all(bound[name] in allowed for name, allowed in kernel.items() if name in bound):
            return ""
    types_found = ", ".join(f"{name} {type_}" for name, type_ in sorted(bound.items()))
    return f"no kernel is registered for {types_found}"


def _bound(node: onnx.NodeProto, known: Known, types: Mapping[str, str]) -> dict[str, str]:
    """Return a node's type for each type parameter, and for each input and output by its formal
    name.
    """
    bounds: dict[str, str] = {}
    for number, value in enumerate(node.input):
        if value and known["inputs"]:
            formal, parameter = known["inputs"][min(number, len(known["inputs"]) - 1)]
            bounds[parameter] = bounds[formal] = types.get(value, "unknown")
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            bounds[known["outputs"][0][1]] = _type_name(attribute.i)
    return bounds


def _output_types(
    node: onnx.NodeProto, known: Known, types: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    bound = _bound(node, known, types)
    for number, value in enumerate(node.output):
        if value:
            _, parameter = known["outputs"][min(number, len(known["outputs"]) - 1)]
            # The type of an output that no input determines: the only one in all kernels, or the
            # type in the schema.
            only = {type_ for kernel in known["kernels"] for type_ in kernel.get(parameter, [])}
            yield value, bound.get(parameter) or (only.pop() if len(only) == 1 else parameter)


def _type_name(number: int) -> str:
    """Return a type's name in ONNX Runtime, such as float, float16 or int64."""
    return onnx.TensorProto.DataType.Name(number).lower()


def _plain(type_: str) -> str:
    return type_.removeprefix("tensor(").removesuffix(")")


def dump() -> dict[str, Any]:
    """Return the table of the installed ONNX Runtime.

    For each operator it has names and type parameters of inputs and outputs, attributes, and for
    each kernel the types of its type parameters or inputs.
    """
    import onnxruntime
    from onnxruntime.capi import build_and_package_info
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kernels = [
        kernel
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CUDAExecutionProvider"
    ]
    if not kernels:
        raise EngineError(
            "this ONNX Runtime shows no CUDA kernels; install onnxruntime-gpu and its libraries"
        )
    schemas: dict[tuple[str, str], Any] = {}
    for schema in state.get_all_operator_schema():
        key = schema.domain, schema.name
        newest = schemas[key].since_version if key in schemas else 0
        if newest < schema.since_version <= OPSETS.get(schema.domain, 0):
            schemas[key] = schema
    by_operator = {
        key: [kernel for kernel in kernels if (kernel.domain, kernel.op_name) == key]
        for key in schemas
    }
    return {
        "onnxruntime": onnxruntime.__version__,
        "cuda": getattr(build_and_package_info, "cuda_version", ""),
        "source": (
            "get_all_opkernel_def() and get_all_operator_schema() of onnxruntime_pybind11_state"
        ),
        "opset": OPSETS[""],
        "operators": {
            "|".join(key): _entry(schemas[key], by_operator[key])
            for key in sorted(schemas)
            if by_operator[key]
        },
    }


def _entry(schema: Any, kernels: list[Any]) -> dict[str, Any]:
    since = schema.since_version
    unique = set()
    for kernel in kernels:
        start, end = kernel.version_range
        # A kernel without an end supports its start version only (KernelRegistry::VerifyKernelDef).
        if start == since or (start < since <= end and end != 2**31 - 1):
            constraints = sorted(kernel.type_constraints.items())
            types_by_name = {name: sorted(map(_plain, types)) for name, types in constraints}
            unique.add(json.dumps(types_by_name))
    return {
        "since": since,
        "inputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.inputs],
        "variadic": any("Variadic" in str(formal.option) for formal in schema.inputs),
        "outputs": [[formal.name, _plain(formal.typeStr)] for formal in schema.outputs],
        "attributes": sorted(schema.attributes),
        "kernels": [json.loads(kernel) for kernel in sorted(unique)],
    }


def write_table(content: Mapping[str, Any], path: Path = TABLE) -> None:
    """Write a table with one line per operator, for readable diffs."""
    head = {key: value for key, value in content.items() if key != "operators"}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in content["operators"].items()
    ]
    text = json.dumps(head)[:-1] + ', "operators": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text, encoding="utf-8")


def check_bundle(bundle: Path, table: Mapping[str, Any]) -> list[str]:
    """Return the nodes without a kernel in all graphs of a directory.

    Raises:
        OptionError: If it has no graphs, or one cannot be read.
    """
    graphs = sorted(bundle.glob("*.onnx"))
    if not graphs:
        raise OptionError(f"{bundle} has no graphs; give a bundle")
    problems = []
    for path in graphs:
        try:
            model = onnx.load(path, load_external_data=False)
        except (OSError, DecodeError) as error:
            raise OptionError(f"{path} cannot be read ({one_line(error)})") from None
        problems += check_graph(model, path.stem, table)
    return problems


@click.command(help=__doc__)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dump", "dumps", is_flag=True, help=f"Write {TABLE.name} from the installed onnxruntime-gpu."
)
def command(bundle: Path | None, dumps: bool) -> None:
    if bundle is None and not dumps:
        raise click.UsageError("give a bundle, or --dump")
    if dumps:
        write_table(dump())
    if bundle is not None:
        table = load_table()
        findings = check_bundle(bundle, table)
        for finding in findings:
            click.echo(finding)
        version = table["onnxruntime"]
        click.echo(f"{len(findings)} nodes without a CUDA kernel in ONNX Runtime {version}")
        if findings:
            raise SystemExit(1)


if __name__ == "__main__":
    run_tool(command)
