"""How large the project is: lines and files by room, tests, documentation, verbs and options, import circles.

python -m tools.size [ROOT]
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGES = ("freeexport", "graphs", "runtime", "tools")
GENERATED = {"benchmarks.md", "options.md"}

# Runs with ROOT as the working directory, so that another checkout's command line is counted by its own code.
COUNT_OPTIONS = """
import click
from freeexport.cli import main

def below(command, path):
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from below(command.get_command(context, name), [*path, name])
    else:
        options = [one for one in command.params if isinstance(one, click.Option) and not getattr(one, "hidden", False)]
        yield " ".join(path), len(options)

for verb, count in below(main, []):
    print(verb.replace(" ", "-"), count)
"""


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, imports inside functions included (Tarjan's algorithm)."""
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
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
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack, groups = list[str](), list[list[str]]()

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return groups


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    rooms: dict[str, list[int]] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root / package).parts
            rooms.setdefault(f"{package}/{parts[0]}/" if len(parts) > 1 else f"{package}/*.py", []).append(lines(path))
    for room, counts in rooms.items():
        print(f"{room:32} {sum(counts):6} lines {len(counts):4} files")
    python = [count for counts in rooms.values() for count in counts]
    print(f"{'Python':32} {sum(python):6} lines {len(python):4} files")
    tests = [lines(path) for path in (root / "tests").rglob("*.py")]
    print(f"{'tests':32} {sum(tests):6} lines {len(tests):4} files")
    pages = [lines(path) for path in (root / "docs").rglob("*.md") if path.name not in GENERATED]
    print(f"{'docs, written by hand':32} {sum(pages):6} lines {len(pages):4} files")
    print(f"{'README.md':32} {lines(root / 'README.md'):6} lines")
    counted = subprocess.run(
        [sys.executable, "-c", COUNT_OPTIONS], cwd=root, capture_output=True, text=True, check=True
    )
    verbs = [row.split() for row in counted.stdout.splitlines()]
    print(
        f"verbs {len({verb.partition('-')[0] for verb, _ in verbs})}, options {sum(int(n) for _, n in verbs)}:", end=" "
    )
    print(", ".join(f"{verb} {count}" for verb, count in verbs))
    groups = circles(root)
    print(f"import circles {len(groups)}", *(f"\n    {', '.join(group)}" for group in groups))


if __name__ == "__main__":
    main()
