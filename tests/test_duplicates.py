"""No block of ten lines stands twice in the product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 10


def code(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without indentation; not blank ones, comments and imports."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.strip()
        if bare and not bare.startswith(("#", "import ", "from ")):
            yield number, bare


def duplicates(paths: Iterable[Path]) -> list[list[str]]:
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        lines = list(code(path))
        for start in range(len(lines) - LENGTH + 1):
            block = tuple(line for _, line in lines[start : start + LENGTH])
            places[block].append(f"{path}:{lines[start][0]}")
    return [found for found in places.values() if len(found) > 1]


def test_no_block_of_ten_lines_stands_twice() -> None:
    packages = (ROOT / name for name in ("runtime", "graphs", "freeexport", "tools"))
    assert duplicates(sorted(path for package in packages for path in package.rglob("*.py"))) == []


def test_a_block_that_stands_twice_is_found(tmp_path: Path) -> None:
    block = "\n".join(f"value_{n} = {n}" for n in range(LENGTH))
    (tmp_path / "one.py").write_text(f"import os\n{block}\n")
    (tmp_path / "two.py").write_text(f"\n\nif True:\n    {block}\nlast = 1\n")
    assert duplicates(sorted(tmp_path.iterdir())) == [[f"{tmp_path}/one.py:2", f"{tmp_path}/two.py:4"]]
