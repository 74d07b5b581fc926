"""Checks imports between rooms, and duplicate code.

Data flows in one direction, from a checkpoint to a session (docs/architecture.md).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "graphs", "freeexport")
BLOCK = 10  # lines of a block that must not be duplicated

# A room is a folder or file at the top of a package. Each may import those before it.
ROOMS = {
    "runtime": """errors bundle machine text options result adaptation engines speech decoding requests
        session pretrained""",
    "freeexport": """system serving task_metrics checkpoints costs training calibrate verification conversion
        evaluate fit demo commands cli __main__""",
}
# Other packages that a package may import.
BELOW = {"runtime": set[str](), "graphs": {"runtime"}, "freeexport": {"runtime", "graphs"}}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, including imports for type checkers and inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from freeexport import cli` has the module only among its names.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> tuple[str, str]:
    package, _, rest = dotted.partition(".")
    return package, rest.partition(".")[0]


def is_below(package: str, other: str, here: str) -> bool:
    rooms = ROOMS.get(package, "").split()
    if here not in rooms or other not in rooms:  # graphs has no rooms, and a package has values of its own
        return True
    return rooms.index(other) <= rooms.index(here)


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_lower_rooms(package: str) -> None:
    wrong = list[str]()
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for target in imports(path):
            other, there = room(target)
            if other == package:
                allowed = is_below(package, there, room(name)[1])
            else:
                allowed = other not in PACKAGES or other in BELOW[package]
            if not allowed:
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_a_level(package: str) -> None:
    found = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(ROOMS[package].split())


@pytest.mark.parametrize("package", PACKAGES)
def test_files_have_no_circular_imports(package: str) -> None:
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / package).rglob("*.py")}
    below = {
        name: {target if target in files else target.rpartition(".")[0] for target in imports(path)} - {name}
        for name, path in files.items()
        if path.stem != "__init__"
    }
    assert list(TopologicalSorter(below).static_order())


def code(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines without indentation. Skips blank lines, comments and imports."""
    importing = False  # inside of the names of an import
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.strip()
        importing = not bare.endswith(")") if importing else bare.startswith("from ") and bare.endswith("(")
        if bare and not importing and not bare.startswith((")", "#", "import ", "from ")):
            yield number, bare


def duplicates(paths: Iterable[Path]) -> list[list[str]]:
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        lines = list(code(path))
        for start in range(len(lines) - BLOCK + 1):
            block = tuple(line for _, line in lines[start : start + BLOCK])
            places[block].append(f"{path}:{lines[start][0]}")
    return [found for found in places.values() if len(found) > 1]


def test_no_block_of_ten_lines_is_duplicated() -> None:
    packages = (ROOT / name for name in (*PACKAGES, "tools"))
    assert duplicates(sorted(path for package in packages for path in package.rglob("*.py"))) == []


def test_duplicated_block_is_found(tmp_path: Path) -> None:
    block = "\n".join(f"value_{n} = {n}" for n in range(BLOCK))
    (tmp_path / "one.py").write_text(f"import os\n{block}\n")
    (tmp_path / "two.py").write_text(f"\n\nif True:\n    {block}\nlast = 1\n")
    assert duplicates(sorted(tmp_path.iterdir())) == [[f"{tmp_path}/one.py:2", f"{tmp_path}/two.py:4"]]
