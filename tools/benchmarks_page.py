"""The page docs/benchmarks.md, from the JSON of `freeexport bench` and tools.peers.compare: nothing is written by hand.

    python -m tools.benchmarks_page docs/benchmarks/*.json                  writes docs/benchmarks.md
    python -m tools.benchmarks_page docs/benchmarks/*.json --check          fails where the page differs from them

A section a file, in the order given, named as the file is without a leading number. Run from the root.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import click

from freeexport.measure.bench import SCHEMA, bench_sheet, facts_lines
from freeexport.measure.table import markdown

PAGE = Path("docs/benchmarks.md")
HEADER = """# Benchmarks

Made from docs/benchmarks/*.json by `python -m tools.benchmarks_page`; do not edit. [How they are measured, and what the
columns mean](benchmarking.md).
"""


def read(path: Path) -> dict[str, Any]:
    """The figures of a run. Raises ClickException where they are none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known, _ = found["schema"] == SCHEMA, found["settings"]["idle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} holds no figures of freeexport bench ({type(error).__name__})") from None
    if not known:
        raise click.ClickException(f"{path} is of schema {found['schema']}, not {SCHEMA}; measure again")
    return found


def section(path: Path) -> str:
    """A heading, the table, and what the figures depend on."""
    found = read(path)
    title = re.sub(r"^\d+-", "", path.stem).replace("-", " ").replace("_", " ")
    notes = [[f"{peer}: not run: {reason}" for peer, reason in found["failed"].items()], facts_lines(found)]
    lines = [f"## {title}", "", markdown(bench_sheet(found)), ""]
    for items in filter(None, notes):
        filled = (textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False) for text in items)
        lines += [*filled, ""]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=PAGE, show_default=True)
@click.option("--check", is_flag=True, help="Write nothing; fail where the page differs.")
def main(files: tuple[Path, ...], out: Path, check: bool) -> None:
    text = "\n".join([HEADER, *map(section, files)])
    if not check:
        out.write_text(text, encoding="utf-8")
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        raise click.ClickException(f"{out} is not what the figures say; run python -m tools.benchmarks_page again")


if __name__ == "__main__":
    main()
