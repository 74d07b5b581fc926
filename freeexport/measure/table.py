"""Tables for terminals, Markdown, HTML and CSV, and a description of the environment."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from freeexport import __version__
from freeexport.system import page
from freeexport.system.machine import detect_machine, kernel_instructions
from runtime import kernels

if TYPE_CHECKING:
    from rich.table import Table

RowT = TypeVar("RowT")
TERMINAL = 80
_BETWEEN = 2  # characters between columns


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Attributes:
        title: Title of the table.
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
        title: Title of the table.
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


def environment() -> dict[str, Any]:
    """Return the time, machine, versions and commit of a measurement, for JSON."""
    import onnxruntime

    machine = detect_machine()
    instructions = kernel_instructions()
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "processor": machine.cpu,
            "features": list(machine.features),
            "kernels": instructions,
            "cores": machine.cores,
            "memory": machine.memory,
        },
        "versions": {
            "freeexport": __version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
            **({"kernels": str(kernels.VERSION)} if instructions else {}),
        },
        "commit": commit_of(Path(__file__).resolve().parents[2]),
    }


def commit_of(root: Path) -> str | None:
    """Return the commit of the git checkout at `root`.

    Ends in "-dirty" if tracked files have changes. None if `root` is not a checkout, such as the
    directory of an installed package.
    """
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def about(environment: Mapping[str, Any], threads: int) -> list[tuple[str, str]]:
    """Return names and texts that describe an `environment`."""
    machine = environment["machine"]
    versions = environment["versions"]
    return [
        (
            "processor",
            f"{machine['processor']} ({' '.join(machine['features'])}), {threads} thread(s)",
        ),
        ("kernels", machine["kernels"] or "none for this machine"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
    ]


# Symbols in addition to colours, for accessibility.
_SIGNS = {"good": "✓", "neutral": "?", "bad": "✗", "": ""}
_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: {{ about }}</title>
<style>
body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}\
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}
.number{text-align:right}.about,figcaption{color:#555}svg,img{max-width:100%;height:auto}
.chosen{background:#e8f0ff;font-weight:bold}
.exited{color:#0072b2;text-decoration:underline;text-underline-offset:.2em}
.example{border-top:1px solid #ddd;padding:.6em 0}.example p{margin:.3em 0}
.output{display:grid;grid-template-columns:14em 1fr;gap:1em}.label{color:#555}
.tokens{white-space:pre-wrap;font-family:monospace}
.verdict{font-size:1.2em;padding:.6em .9em;border-left:.4em solid;border-radius:.2em}\
.verdict p{margin:.2em 0}
.good{background:#e3f4ec;border-color:#009e73}.neutral{background:#fdf3d8;border-color:#e69f00}
.bad{background:#fbe6dc;border-color:#d55e00}
</style>
<h1>{{ title }}</h1><p class="about">{{ about }}</p>
{% for verdict in verdicts %}<div class="verdict {{ verdict.level }}"><p>{{ signs[verdict.level] }}
<b>{{ verdict.text[:1].upper() + verdict.text[1:] }}.</b></p>
{%- if verdict.next_step %}<p>Next: {{ verdict.next_step }}.</p>{% endif %}</div>{% endfor %}
{% for note in notes %}<p><b>Note:</b> {{ note }}.</p>{% endfor %}
{% for picture, text in figures %}<figure>{{ picture }}\
<figcaption>{{ text }}</figcaption></figure>{% endfor %}
{% for sheet in sheets %}{% set names = sheet.columns %}<h2>{{ sheet.title }}</h2>
<table class="numbers"><tr>\
{% for name in names %}<th{% if name.endswith('#') %} class="number"{% endif %}>
{{- name.rstrip('#') }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr{% if row[-1] == 'chosen' %} class="chosen"{% endif %}>
{%- for cell in row %}<td{% if names[loop.index0].endswith('#') %} class="number"{% endif %}>
{{- cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endfor %}
{% if examples %}<h2>Outputs</h2>
<p>Tokens that <span class="exited">exited, blue and underlined,</span> took the shallow decoder \
alone; the others took
every layer.</p>{% endif %}
{% for example in examples %}<div class="example">
<p class="output"><span class="label">input, line {{ example.line }}</span>\
<span>{{ example.input }}</span></p>
<p class="output"><span class="label">reference</span><span>{{ example.reference }}</span></p>
{% for name, pieces in example.outputs %}<p class="output"><span class="label">{{ name }}</span>\
<span class="tokens">
{%- for text, exited in pieces %}{% if exited %}\
<span class="exited">{{ text }}</span>{% else %}{{ text }}
{%- endif %}{% endfor %}</span></p>
{% endfor %}</div>
{% endfor %}
<h2>How it was measured</h2>
<table>\
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
</html>
"""


def render(title: str, about: str, **parts: Any) -> str:
    """Render an HTML page.

    Args:
        title: Title of the page.
        about: Line below the title.
        **parts: `verdicts`, `notes`, `figures` (HTML and caption), `sheets`, `examples` and
            `facts`.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_TEMPLATE)
    return template.render(title=title, about=about, signs=_SIGNS, **parts)
