"""A public class name means one thing: no two modules define the same one."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "graphs", "freeexport", "tools")


def class_names(path: Path) -> Iterator[str]:
    """Yield the names of the public classes of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def repeated(paths: Iterable[Path]) -> dict[str, list[Path]]:
    modules = defaultdict[str, list[Path]](list)
    for path in paths:
        for name in class_names(path):
            modules[name].append(path)
    return {name: found for name, found in modules.items() if len(found) > 1}


def test_class_names_are_unique_across_modules() -> None:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = repeated(paths)
    assert not found, found


def test_repeated_class_names_are_found_and_private_ones_ignored(tmp_path: Path) -> None:
    for name, other in (("one", "One"), ("two", "Two")):
        (tmp_path / f"{name}.py").write_text(f"class Same: ...\nclass _Own: ...\nclass {other}: ...\n")
    paths = sorted(tmp_path.iterdir())
    assert repeated(paths) == {"Same": paths}
