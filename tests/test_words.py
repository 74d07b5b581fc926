"""Lines of Markdown have at most 120 characters."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
PAGES = [
    pytest.param(page, id=page.name)
    for page in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("**/*.md")),
        ROOT / "freeexport" / "data" / "g2p" / "MODEL_CARD.md",
    )
]


def long_lines(page: Path) -> list[str]:
    """Return the lines of a page that are too long. Rows of tables may have any length."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    return [
        f"{page.name}:{number} has {len(line)}"
        for number, line in lines
        if len(line) > WIDTH and not line.lstrip().startswith("|")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_markdown_lines_are_short(page: Path) -> None:
    assert long_lines(page) == []


def test_long_lines_are_found_outside_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a" * 120 + "\n" + "b" * 121 + "\n| " + "c" * 200 + " |\n", encoding="utf-8")
    assert long_lines(page) == ["page.md:2 has 121"]
