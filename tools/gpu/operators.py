"""Whether ONNX Runtime's CUDA provider has a kernel for each node of a bundle: its operator, types and attributes.

    python -m tools.gpu.operators BUNDLE
    python -m tools.gpu.operators --dump     # a new table, where onnxruntime-gpu is installed and its libraries load

The table, tools/gpu/operators.json, is what the provider of one version registers. What it registers and then refuses
to run is in tools/gpu/operator_rules.py. A node without a kernel would run on the CPU, with its inputs and outputs
copied between.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from tools.gpu.operator_rules import RULES
from tools.gpu.operator_table import DOMAINS, OPSET, TABLE, dump, write


@dataclass(frozen=True)
class Finding:
    """What the provider cannot run: a node of a graph, and why."""

    graph: str
    node: str
    operator: str
    problem: str

    def __str__(self) -> str:
        return f"{self.graph}: {self.operator} {self.node}: {self.problem}"


class Table:
    """What a version of ONNX Runtime registers for CUDA; see `dump` for the form. ValueError for another opset."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        if content["opset"] != OPSET:
            raise ValueError(f"the table is of opset {content['opset']}, the graphs are of {OPSET}; run --dump")
        self.version: str = content["onnxruntime"]
        self._operators: Mapping[str, Any] = content["operators"]

    @classmethod
    def load(cls, path: Path = TABLE) -> Table:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def check(self, model: onnx.ModelProto, name: str) -> list[Finding]:
        """What of a graph, called `name`, has no kernel."""
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


def check_bundle(bundle: Path, table: Table | None = None) -> list[Finding]:
    """What of all graphs in a directory has no kernel."""
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
