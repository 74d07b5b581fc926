"""Tables of rows for a terminal, Markdown, HTML and CSV, and the facts that every measurement records."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import onnxruntime

from freeexport import __version__
from freeexport.system import page
from freeexport.system.machine import detect_machine

if TYPE_CHECKING:
    from rich.table import Table

RowT = TypeVar("RowT")
TERMINAL = 80
_BETWEEN = 2  # characters between columns


@dataclass(frozen=True)
class Sheet:
    """Text under columns; those whose name ends in `#` are aligned to the right, without the `#`. `facts`: names and
    values that hold for every row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, str], ...] = ()

    def compact(self, keep: Iterable[str] = ()) -> Sheet:
        """Drop columns without text, and, of several rows, those with the same text in each: they become facts.
        Columns named in `keep` (without `#`) stay where they have text."""
        values = [{row[number] for row in self.rows} for number in range(len(self.columns))]
        kept, facts = [], list(self.facts)
        for number, name in enumerate(self.columns):
            plain = name.rstrip("#")
            constant = len(self.rows) > 1 and len(values[number]) == 1 and plain not in keep
            if constant and values[number] != {""}:
                facts.append((plain, self.rows[0][number]))
            if not constant and values[number] != {""}:
                kept.append(number)
        return replace(self._only(kept), facts=tuple(facts))

    def within(self, width: int, spare: Sequence[str]) -> Sheet:
        """Drop columns of `spare` (without `#`), in that order, until lines have at most `width` characters."""
        sheet = self
        for name in spare:
            if sheet.width <= width:
                break
            columns = range(len(sheet.columns))
            sheet = sheet._only([number for number in columns if sheet.columns[number].rstrip("#") != name])
        return sheet

    @property
    def width(self) -> int:
        columns = zip(*((name.rstrip("#") for name in self.columns), *self.rows), strict=True)
        return sum(max(map(len, column)) for column in columns) + _BETWEEN * (len(self.columns) - 1)

    def _only(self, kept: Sequence[int]) -> Sheet:
        rows = tuple(tuple(row[number] for number in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[number] for number in kept), rows=rows)


def sheet(title: str, columns: Mapping[str, Callable[[RowT], str]], rows: Iterable[RowT]) -> Sheet:
    """Build a sheet: `columns` maps names to what shows a row."""
    return Sheet(title, tuple(columns), tuple(tuple(show(row) for show in columns.values()) for row in rows))


def terminal(shown: Sheet) -> Table:
    return page.table(shown.title, shown.columns, shown.rows)


def markdown(shown: Sheet) -> str:
    lines = ["| " + " | ".join(name.rstrip("#") for name in shown.columns) + " |"]
    lines.append("|" + "|".join("--:" if name.endswith("#") else ":--" for name in shown.columns) + "|")
    lines.extend("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in shown.rows)
    return "\n".join(lines)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a line for each row; what is nested gets columns of its own, named by the path to it."""
    flat = [dict(_flat(row)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
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
    """Show a value and half the width of its interval, as 99.5±0.8."""
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f}±{(high - low) / 2:.{digits}f}"


def environment() -> dict[str, Any]:
    """Describe when and on what a measurement was made, for JSON."""
    machine = detect_machine()
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "processor": machine.cpu,
            "features": list(machine.features),
            "cores": machine.cores,
            "memory": machine.memory,
        },
        "versions": {
            "freeexport": __version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }


def about(environment: Mapping[str, Any], threads: int) -> list[tuple[str, str]]:
    """Describe an `environment` to people."""
    machine, versions = environment["machine"], environment["versions"]
    return [
        ("processor", f"{machine['processor']} ({' '.join(machine['features'])}), {threads} thread(s)"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]
