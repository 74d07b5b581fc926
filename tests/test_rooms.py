"""Who may import whom: data flows one way, from a checkpoint to a session (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "graphs", "freeexport")

# A room is a folder of a package, or a file at its top. Every room may import the files named "everywhere".
EVERYWHERE = {"runtime": {"errors", "json_file"}, "graphs": {"errors"}, "freeexport": set[str]()}
ALLOWED: dict[str, dict[str, str]] = {
    "runtime": {
        "errors": "",
        "json_file": "",
        "kernels": "",
        "bundle": "",
        "text": "",
        "machine": "bundle",
        "options": "machine text",
        "result": "options",
        "metrics": "result",
        "adaptation": "bundle",
        "engines": "kernels bundle machine options",
        "cuda": "engines bundle machine options",
        "tensorrt": "cuda engines bundle machine options",
        "decoding": "engines adaptation text options result",
        "thresholds": "adaptation bundle options",
        "batching": "decoding engines adaptation bundle",
        "sequence": "thresholds decoding engines adaptation text machine bundle options result metrics",
        "scheduler": "sequence batching decoding engines adaptation",
        "stream": "scheduler sequence text result",
        "session": "stream scheduler batching sequence thresholds decoding tensorrt cuda engines adaptation text "
        "bundle machine options result metrics",
    },
    "freeexport": {
        "system": "",
        "serving": "",
        "metrics": "",
        "checkpoints": "system",
        "training": "checkpoints metrics system",
        "measure": "training checkpoints metrics system",
        "verification": "measure training checkpoints system",
        "conversion": "verification measure training checkpoints system",
        "demo": "conversion measure checkpoints metrics system",
        "commands": "measure checkpoints conversion verification metrics serving system training",
        "cli": "system",
        "__main__": "cli",
    },
}
# Which package may import which other.
BELOW = {"runtime": set[str](), "graphs": {"runtime"}, "freeexport": {"runtime", "graphs"}}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, those for type checkers and inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from freeexport import cli` names the module only here.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> tuple[str, str]:
    package, _, rest = dotted.partition(".")
    return package, rest.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_direction_of_the_data(package: str) -> None:
    wrong = list[str]()
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        here = room(name)[1]
        for target in imports(path):
            other, there = room(target)
            if other not in PACKAGES or here == "__init__":
                continue
            if other != package:
                allowed = other in BELOW[package]
            elif package not in ALLOWED or there in (here, ""):
                allowed = True
            else:
                allowed = there in EVERYWHERE[package] or there in ALLOWED[package][here].split()
                allowed = allowed or there in ("__version__", "INTERRUPTED")
            if not allowed:
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ALLOWED)
def test_rooms_have_no_circle(package: str) -> None:
    seen = set[str]()
    for name, below in ALLOWED[package].items():
        assert set(below.split()) - set(ALLOWED[package]) == set()
        seen.add(name)
    order = list[str]()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in order:
            for other in ALLOWED[package][name].split():
                visit(other, (*path, name))
            order.append(name)

    for name in ALLOWED[package]:
        visit(name, ())
    assert set(order) == seen
