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

# A room is a folder or file at the top of a package. Every room may import those in EVERYWHERE.
EVERYWHERE = {"runtime": {"errors", "json_file", "products"}, "graphs": {"errors"}, "freeexport": set[str]()}
ALLOWED: dict[str, dict[str, str]] = {
    "runtime": {
        "errors": "",
        "json_file": "",
        "products": "",
        "kernels": "",
        "bundle": "",
        "hub": "bundle",
        "audio": "",
        "text": "",
        "machine": "bundle",
        "checks": "text",
        "session_options": "checks machine",
        "options": "checks session_options text",
        "option_keywords": "options text",
        "result": "options",
        "metrics": "result",
        "adaptation": "bundle",
        "engines": "kernels bundle machine session_options",
        "cuda": "engines bundle machine session_options",
        "tensorrt": "cuda engines bundle machine session_options",
        "decoding": "kernels engines adaptation text bundle options result",
        "thresholds": "decoding adaptation bundle machine options session_options",
        "batching": "decoding engines adaptation bundle",
        "alignment": "engines bundle text",
        "words": "text result",
        "speech_rules": "bundle text",
        "speech": "speech_rules words audio bundle text options result",
        "languages": "bundle",
        "model": "languages thresholds decoding engines adaptation text bundle machine options session_options metrics",
        "generation": "model languages speech decoding adaptation engines text machine bundle options result",
        "sequence": "generation decoding result metrics",
        "scheduler": "sequence batching decoding engines adaptation",
        "stream": "scheduler sequence text result",
        "requests": "stream scheduler sequence generation model languages speech text options option_keywords result",
        "placement": "tensorrt cuda batching decoding engines bundle machine session_options",
        "session": "placement hub alignment speech requests stream scheduler model thresholds decoding engines "
        "adaptation text bundle machine options session_options option_keywords result metrics",
        "pretrained": "session model options",
    },
    "freeexport": {
        "system": "",
        "serving": "",
        "task_metrics": "",
        "checkpoints": "system",
        "costs": "checkpoints task_metrics system",
        "training": "costs checkpoints task_metrics system",
        "calibrate": "training costs checkpoints task_metrics system",
        "verification": "calibrate training costs checkpoints system",
        "conversion": "verification calibrate training costs checkpoints system",
        "evaluate": "calibrate costs checkpoints task_metrics system",
        "fit": "evaluate conversion verification calibrate training costs checkpoints task_metrics system",
        "demo": "conversion evaluate checkpoints task_metrics system",
        "commands": (
            "fit evaluate calibrate costs checkpoints conversion verification task_metrics serving system training"
        ),
        "cli": "system",
        "__main__": "cli",
    },
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
    below = {name: set(names.split()) for name, names in ALLOWED[package].items()}
    assert set(TopologicalSorter(below).static_order()) == set(below)


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


def test_no_block_of_ten_lines_stands_twice() -> None:
    packages = (ROOT / name for name in (*PACKAGES, "tools"))
    assert duplicates(sorted(path for package in packages for path in package.rglob("*.py"))) == []


def test_a_block_that_stands_twice_is_found(tmp_path: Path) -> None:
    block = "\n".join(f"value_{n} = {n}" for n in range(BLOCK))
    (tmp_path / "one.py").write_text(f"import os\n{block}\n")
    (tmp_path / "two.py").write_text(f"\n\nif True:\n    {block}\nlast = 1\n")
    assert duplicates(sorted(tmp_path.iterdir())) == [[f"{tmp_path}/one.py:2", f"{tmp_path}/two.py:4"]]
