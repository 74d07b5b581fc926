"""Measures the rows of the README's table, and writes the pages of results.

    python -m tools.results measure --output DIR            all rows without a committed result
    python -m tools.results measure --output DIR --plan     list rows and estimated times only
    python -m tools.results measure --output DIR records-int8 --trial 3
    python -m tools.results pages                           docs/results/index.md and README table

Measure on an idle machine with two cores. The same command continues an interrupted run.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from freeexport.system.progress import duration
from tools.data.splits import run_tool
from tools.pages import write_pages
from tools.results.measure import RESULTS, ROOT, measure_row, result_file
from tools.results.pages import index, readme
from tools.results.rows import ROWS


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command("measure")
@click.argument("names", nargs=-1, metavar="[ROW]...", type=click.Choice(list(ROWS)))
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="Data, bundles and outputs."
)
@click.option("--plan", is_flag=True, help="Print the rows and the time they take; do nothing.")
@click.option(
    "--trial",
    type=click.IntRange(1),
    help="Decode this many calibration lines, and record nothing.",
)
def measure_rows(names: tuple[str, ...], output: Path, plan: bool, trial: int | None) -> None:
    """Measure ROWs on their test lines. Default: all rows without a committed result."""
    rows = [ROWS[name] for name in names or ROWS]
    missing = [row for row in rows if trial is not None or not result_file(row).is_file()]
    for row in rows:
        state = f"at most {duration(row.estimate)}" if row in missing else "has a result"
        click.echo(f"{row.name}: {row.lines} lines, {', '.join(row.methods)}: {state}")
    click.echo(
        f"together at most {duration(sum(row.estimate for row in missing))}, conversions left out"
    )
    if plan:
        return
    for row in missing:
        start = time.perf_counter()
        report = measure_row(row, output.resolve(), trial=trial)["evaluation"]
        for one in report["rows"]:
            click.echo(
                f"{row.name}, {one['setting']}: {one['request_speed']:.2f}x a request, "
                f"same {one['same']:.0%}"
            )
        click.echo(f"{row.name}: {duration(time.perf_counter() - start)}")


@main.command("pages")
@click.option("--check", is_flag=True, help="Write nothing; fail where a page differs.")
def make_pages(check: bool) -> None:
    """Write docs/results/index.md and the README's table from docs/results/*.json."""
    found = {RESULTS / "index.md": index(RESULTS), ROOT / "README.md": readme(ROOT, RESULTS)}
    write_pages(found, check, "python -m tools.results pages")


if __name__ == "__main__":
    run_tool(main)
