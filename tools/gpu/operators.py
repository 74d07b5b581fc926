"""Whether ONNX Runtime's CUDA provider has a kernel for each node of a bundle: its operator, types and attributes.

    python -m tools.gpu.operators BUNDLE
    python -m tools.gpu.operators --dump     # a new table, where onnxruntime-gpu is installed and its libraries load

The table, tools/gpu/operators.json, is what the provider of one version registers; RULES are what it registers and then
refuses to run. A node without a kernel would run on the CPU, with its inputs and outputs copied between.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

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


@dataclass(frozen=True)
class Rule:
    """Rules that the kernel of `operator` refuses when it is made or run: `refused` gives what of a node's attributes
    and inputs it is, or nothing. `source` says where ONNX Runtime says so."""

    operator: str
    refused: Callable[[Mapping[str, Any], list[str]], str]
    source: str


def _bits(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    bits, block = attributes.get("bits", 4), attributes.get("block_size")
    if bits not in (2, 4, 8):
        return f"bits = {bits}"
    if len(inputs) > 4 and inputs[4]:
        return "g_idx, whose check cannot be captured in a CUDA graph"
    return "" if block in (16, 32, 64, 128, 256) else f"block_size = {block}"


def _softmax_precision(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    precision = attributes.get("softmax_precision", 0)
    return "" if precision in (0, 1, 10, 16) else f"softmax_precision = {precision}"


def _grouped_query(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    if len(inputs) > 10 and inputs[10] and (attributes.get("smooth_softmax") or (len(inputs) > 11 and inputs[11])):
        return "attention_bias with smooth softmax or head_sink"
    return ""


def _mode(attributes: Mapping[str, Any], inputs: list[str]) -> str:
    mode = attributes.get("mode", b"linear")
    return "" if mode in (b"linear", b"circular") else f"mode {mode!r}"


RULES = (
    Rule("com.microsoft|MatMulNBits", _bits, "contrib_ops/cuda/quantization/matmul_nbits.cc, its messages in 1.31.1"),
    Rule("|Attention", _softmax_precision, "providers/cuda/llm/attention.cc, its messages in 1.31.1"),
    Rule(
        "com.microsoft|GroupQueryAttention",
        _grouped_query,
        "contrib_ops/cuda/bert/group_query_attention.cc, its messages in 1.31.1 and pull request 29525",
    ),
    Rule("|TensorScatter", _mode, "providers/cuda/llm/tensorscatter.cc, its messages in 1.31.1"),
)


@dataclass(frozen=True)
class Finding:
    """A node that the provider cannot run, and why."""

    graph: str
    node: str
    operator: str
    problem: str

    def __str__(self) -> str:
        return f"{self.graph}: {self.operator} {self.node}: {self.problem}"


class Table:
    """The kernels that a version of ONNX Runtime registers for CUDA; see `dump` for the form. ValueError for another
    opset."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        if content["opset"] != OPSET:
            raise ValueError(f"the table is of opset {content['opset']}, the graphs are of {OPSET}; run --dump")
        self.version: str = content["onnxruntime"]
        self._operators: Mapping[str, Any] = content["operators"]

    @classmethod
    def load(cls, path: Path = TABLE) -> Table:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def check(self, model: onnx.ModelProto, name: str) -> list[Finding]:
        """Nodes without a kernel in a graph called `name`."""
        return list(self._findings(model, name))

    def _findings(self, model: onnx.ModelProto, name: str) -> Iterator[Finding]:
        graph = model.graph
        types = {value.name: _type_name(value.type.tensor_type.elem_type) for value in graph.input}
        types.update({tensor.name: _type_name(tensor.data_type) for tensor in graph.initializer})
        for imported in model.opset_import:
            if DOMAINS.get(imported.domain) != imported.version:
                yield Finding(
                    name, "graph", imported.domain or "ai.onnx", f"opset {imported.version} is not in the table"
                )
        for node in graph.node:
            operator = f"{node.domain}|{node.op_type}"
            known = self._operators.get(operator)
            problem = "no kernel is registered" if known is None else _node_problem(node, operator, known, types)
            if problem:
                yield Finding(name, node.name or node.output[0], node.op_type, problem)
            types.update(_output_types(node, known, types))


def _node_problem(node: onnx.NodeProto, operator: str, known: Mapping[str, Any], types: Mapping[str, str]) -> str:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    unknown = sorted(attributes.keys() - set(known["attributes"]))
    if unknown:
        return f"attribute {unknown[0]} is not in its schema"
    extra = [name for name in list(node.input)[len(known["inputs"]) :] if name]
    if extra and not known["variadic"]:
        return f"input {extra[0]} is more than its schema has"
    for rule in RULES:
        if rule.operator == operator and (refused := rule.refused(attributes, list(node.input))):
            return f"{refused} is refused ({rule.source})"
    bound = _bound(node, known, types)
    if not known["kernels"]:
        return "no kernel is registered for this opset"
    if not any(_fits(kernel, bound) for kernel in known["kernels"]):
        asked = ", ".join(f"{parameter} {type_}" for parameter, type_ in sorted(bound.items()))
        return f"no kernel is registered for {asked}"
    return ""


def _fits(kernel: Mapping[str, list[str]], bound: Mapping[str, str]) -> bool:
    return all(bound[parameter] in allowed for parameter, allowed in kernel.items() if parameter in bound)


def _bound(node: onnx.NodeProto, known: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, str]:
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


def _output_types(
    node: onnx.NodeProto, known: Mapping[str, Any] | None, types: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    if known is None:
        return
    bound = _bound(node, known, types)
    for number, value in enumerate(node.output):
        if value:
            _, parameter = known["outputs"][min(number, len(known["outputs"]) - 1)]
            yield value, bound.get(parameter) or _only_type(known["kernels"], parameter)


def _only_type(kernels: list[dict[str, list[str]]], parameter: str) -> str:
    """The type of an output that no input decides: its one type in all kernels, or what the schema calls it."""
    allowed = {type_ for kernel in kernels for type_ in kernel.get(parameter, [])}
    return allowed.pop() if len(allowed) == 1 else parameter


def _type_name(number: int) -> str:
    """As ONNX Runtime calls them: float, float16, int64."""
    return onnx.TensorProto.DataType.Name(number).lower()


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


def check_bundle(bundle: Path, table: Table | None = None) -> list[Finding]:
    """Nodes without a kernel in all graphs of a directory."""
    table = table or Table.load()
    findings: list[Finding] = []
    for path in sorted(bundle.glob("*.onnx")):
        findings += table.check(onnx.load(path, load_external_data=False), path.stem)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--dump", action="store_true", help=f"write {TABLE.name} from the installed onnxruntime-gpu")
    arguments = parser.parse_args()
    if arguments.dump:
        write(dump(), TABLE)
    if arguments.bundle is None:
        return 0 if arguments.dump else parser.error("give a bundle, or --dump")
    if not list(arguments.bundle.glob("*.onnx")):
        print(f"error: {arguments.bundle} has no graphs; give a bundle of freeexport convert", file=sys.stderr)
        return 1
    table = Table.load()
    findings = check_bundle(arguments.bundle, table)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} nodes without a CUDA kernel in ONNX Runtime {table.version}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
