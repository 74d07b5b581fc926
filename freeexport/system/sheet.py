"""Tables for terminals, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from freeexport.system import page

if TYPE_CHECKING:
    from rich.table import Table

RowT = TypeVar("RowT")
TERMINAL = 80
_BETWEEN = 2  # characters between columns


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        columns: Names of the columns. A trailing `#` is not shown, and aligns a column right.
        rows: One text per column.
        facts: Names and values of columns that were dropped because all rows have the same value.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def width(self) -> int:
        """Characters of a line."""
        columns = zip(*((name.rstrip("#") for name in self.columns), *self.rows), strict=True)
        return sum(max(map(len, column)) for column in columns) + _BETWEEN * (len(self.columns) - 1)

    def only(self, kept: Sequence[int]) -> Sheet:
        """Return a table of the columns with these numbers."""
        rows = tuple(tuple(row[number] for number in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[number] for number in kept), rows=rows)

    def hides(self, whole: Sheet) -> set[str]:
        """Return the names of columns of `whole` that are not in this table."""
        return {name.rstrip("#") for name in set(whole.columns) - set(self.columns)}

    def within(self, spare: Sequence[str], width: int = TERMINAL) -> Sheet:
        """Drop columns until lines have at most `width` characters.

        Args:
            spare: Names of columns that may be dropped, without `#`, in the order of dropping.
            width: Most characters of a line.
        """
        shown = self
        for name in spare:
            if shown.width > width:
                shown = shown.only(
                    [n for n, column in enumerate(shown.columns) if column.rstrip("#") != name]
                )
        return shown


def sheet(
    title: str,
    columns: Mapping[str, Callable[[RowT], str]],
    rows: Iterable[RowT],
    keep: Collection[str] | None = None,
) -> Sheet:
    """Build a table.

    Args:
        columns: Functions that format a row, by name of the column.
        rows: Rows of any type.
        keep: If given, empty columns are dropped. With several rows, columns with one text in all
            rows become facts, except for the columns in `keep` (without `#`).
    """
    made = Sheet(
        title, tuple(columns), tuple(tuple(show(row) for show in columns.values()) for row in rows)
    )
    if keep is None:
        return made
    kept = []
    facts = []
    for number, name in enumerate(columns):
        values = {row[number] for row in made.rows}
        plain = name.rstrip("#")
        if values == {""}:
            continue
        if len(made.rows) > 1 and len(values) == 1 and plain not in keep:
            facts.append((plain, made.rows[0][number]))
        else:
            kept.append(number)
    return replace(made.only(kept), facts=tuple(facts))


def terminal(shown: Sheet) -> Table:
    """Convert a table for rich."""
    return page.table(shown.title, shown.columns, shown.rows)


def markdown(shown: Sheet) -> str:
    """Format a table as Markdown, without its title and facts."""
    lines = ["| " + " | ".join(name.rstrip("#") for name in shown.columns) + " |"]
    lines.append(
        "|" + "|".join("--:" if name.endswith("#") else ":--" for name in shown.columns) + "|"
    )
    lines.extend(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in shown.rows
    )
    return "\n".join(lines)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as CSV. Nested values get their own columns, named by their path."""
    flat = [dict(_flat(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield before + name, value


def plus_minus(value: float, low: float | None, high: float | None, digits: int = 1) -> str:
    """Format a value and half the width of its interval, such as 99.5±0.8."""
    half = "" if low is None or high is None else f"±{(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{half}"
