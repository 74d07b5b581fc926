"""Measures the rows of the README's table, and writes the pages of results.

    python -m tools.results measure --output DIR              rows without a published result
    python -m tools.results measure --output DIR records-int8
    python -m tools.results pages                             README table and docs/results

Measure on an idle machine with two cores. The same command continues an interrupted run.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from freeexport.system.progress import duration
from tools.data.splits import run_tool
from tools.pages import write_pages
from tools.results.measure import measure_row
from tools.results.pages import pages
from tools.results.published import RESULTS, ROOT, read_lines
from tools.results.rows import ROWS


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("measure")
@click.argument("names", nargs=-1, metavar="[ROW]...", type=click.Choice(list(ROWS)))
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Data, bundles and reports."
)
def measure_rows(names: tuple[str, ...], output: Path) -> None:
    """Measure ROWs on their test lines, in a checkout without changes.

    A named row replaces its published result. Default: all rows without a result on their lines.
    """
    published = {(line["result"], line["test_lines"]) for line in read_lines(ROOT / RESULTS)}
    missing = [row.name for row in ROWS.values() if (row.name, row.data.split) not in published]
    for name in names or missing:
        start = time.perf_counter()
        for one in measure_row(ROWS[name], output.resolve())["rows"]:
            click.echo(
                f"{name}, {one['setting']}: {one['request_speed']:.2f}x a request, "
                f"same {one['same']:.0%}"
            )
        click.echo(f"{name}: {duration(time.perf_counter() - start)}")


@main.command("pages")
@click.option("--check", is_flag=True, help="Write nothing; fail where a page differs.")
def make_pages(check: bool) -> None:
    """Write the tables of the README and of docs/results from docs/results/results.jsonl."""
    write_pages(pages(ROOT), check, "python -m tools.results pages")


if __name__ == "__main__":
    run_tool(main)
