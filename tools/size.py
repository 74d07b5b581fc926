"""Prints the size of the project: lines and files, verbs and options, and an import cycle if any.

python -m tools.size [ROOT]
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("freeexport", "graphs", "runtime", "tools")
GENERATED = {"benchmarks.md", "options.md"}

# Runs in ROOT, so that the command line of another checkout is counted by its own code.
COUNT_OPTIONS = """
import click
from freeexport.cli import main

def below(command, path):
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from below(command.get_command(context, name), [*path, name])
    else:
        options = [one for one in command.params if isinstance(one, click.Option) \
and not getattr(one, "hidden", False)]
        yield "-".join(path), len(options)

for verb, count in below(main, []):
    print(verb, count)
"""


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def circle(root: Path) -> list[str]:
    """Return the modules of an import cycle, including imports in functions. Empty without one."""
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= targets & set(modules) or {node.module}
        graph[name] = (found & set(modules)) - {name, name.rpartition(".")[0]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    rooms: dict[str, list[int]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root / package).parts
            rooms[f"{package}/{parts[0]}/" if len(parts) > 1 else f"{package}/*.py"].append(
                lines(path)
            )
    rooms["Python"] = [count for counts in list(rooms.values()) for count in counts]
    rooms["tests"] = [lines(path) for path in (root / "tests").rglob("*.py")]
    pages = [path for path in (root / "docs").rglob("*.md") if path.name not in GENERATED]
    rooms["docs, written by hand"] = [lines(path) for path in pages]
    rooms["README.md"] = [lines(root / "README.md")]
    for room, counts in rooms.items():
        print(f"{room:32} {sum(counts):6} lines {len(counts):4} files")
    command = [sys.executable, "-c", COUNT_OPTIONS]
    counted = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    verbs = {row.partition("-")[0].partition(" ")[0] for row in counted}
    print(
        f"verbs {len(verbs)}, options {sum(int(row.split()[1]) for row in counted)}: "
        f"{', '.join(counted)}"
    )
    print("import circle:", " imports ".join(circle(root)) or "none")


if __name__ == "__main__":
    main()
