"""Tables of rows for a terminal, Markdown, HTML and CSV, and the facts that every measurement records."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

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

    @property
    def width(self) -> int:
        columns = zip(*((name.rstrip("#") for name in self.columns), *self.rows), strict=True)
        return sum(max(map(len, column)) for column in columns) + _BETWEEN * (len(self.columns) - 1)

    def only(self, kept: Sequence[int]) -> Sheet:
        """The columns of these numbers."""
        rows = tuple(tuple(row[number] for number in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[number] for number in kept), rows=rows)

    def within(self, spare: Sequence[str], width: int = TERMINAL) -> Sheet:
        """Drop columns of `spare` (without `#`), in that order, until lines have at most `width` characters."""
        shown = self
        for name in spare:
            if shown.width > width:
                shown = shown.only([n for n, column in enumerate(shown.columns) if column.rstrip("#") != name])
        return shown


def sheet(
    title: str,
    columns: Mapping[str, Callable[[RowT], str]],
    rows: Iterable[RowT],
    keep: Collection[str] | None = None,
) -> Sheet:
    """Build a sheet: `columns` maps names to what shows a row. With `keep`, columns without text are dropped, and, of
    several rows, those with the same text in each become facts, except those that `keep` names (without `#`)."""
    made = Sheet(title, tuple(columns), tuple(tuple(show(row) for show in columns.values()) for row in rows))
    if keep is None:
        return made
    kept, facts = [], []
    for number, name in enumerate(columns):
        values, plain = {row[number] for row in made.rows}, name.rstrip("#")
        if values == {""}:
            continue
        if len(made.rows) > 1 and len(values) == 1 and plain not in keep:
            facts.append((plain, made.rows[0][number]))
        else:
            kept.append(number)
    return replace(made.only(kept), facts=tuple(facts))


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
    half = "" if low is None or high is None else f"±{(high - low) / 2:.{digits}f}"
    return f"{value:.{digits}f}{half}"


def environment() -> dict[str, Any]:
    """Describe when and on what a measurement was made, for JSON."""
    import onnxruntime

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
