"""The page docs/benchmarks.md, from the JSON of `freeexport bench` and tools.peers.compare: nothing is written by hand.

    python -m tools.benchmarks_page docs/benchmarks/*.json                  writes docs/benchmarks.md
    python -m tools.benchmarks_page docs/benchmarks/*.json --check          fails where the page differs from them

A section a file, in the order given, named as the file is without a leading number. Run from the root.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from freeexport.measure.bench import SCHEMA, bench_sheet, facts_lines
from freeexport.measure.table import markdown

PAGE = Path("docs/benchmarks.md")
WIDTH = 120
HEADER = """# Benchmarks

Made from docs/benchmarks/*.json by `python -m tools.benchmarks_page`; do not edit. [How they are measured, and what the
columns mean](benchmarking.md).
"""


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=PAGE, show_default=True)
@click.option("--check", is_flag=True, help="Write nothing; fail where the page differs.")
def main(files: tuple[Path, ...], out: Path, check: bool) -> None:
    text = page((path.stem, read(path)) for path in files)
    if not check:
        out.write_text(text, encoding="utf-8")
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        raise click.ClickException(f"{out} is not what the figures say; run python -m tools.benchmarks_page again")


def read(path: Path) -> dict[str, Any]:
    """The figures of a run. Raises ClickException where they are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known, _ = found["schema"] == SCHEMA, found["settings"]["idle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} holds no figures of freeexport bench ({type(error).__name__})") from None
    if not known:
        raise click.ClickException(f"{path} is of schema {found['schema']}, not {SCHEMA}; measure again")
    return dict(found)


def page(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The page's text, of runs and their names."""
    return "\n".join([HEADER, *(_section(name, found) for name, found in runs)])


def _section(name: str, found: Mapping[str, Any]) -> str:
    title = re.sub(r"^\d+-", "", name).replace("-", " ").replace("_", " ")
    lines = [f"## {title}", "", markdown(bench_sheet(found))]
    if found["failed"]:
        lines += ["", *(_item(f"{peer}: not run: {reason}") for peer, reason in found["failed"].items())]
    return "\n".join([*lines, "", *(_item(text) for text in facts_lines(found)), ""])


def _item(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    main()
