"""Generates docs/benchmarks.md from docs/benchmarks/*.json, and docs/options.md from the options' dataclasses.

python -m tools.pages              writes both
python -m tools.pages --check      fails where one differs

Benchmarks are the JSON of `freeexport bench` and tools.peers.compare, a section a file. Run from the root.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from freeexport.measure.bench import SCHEMA, bench_sheet, facts_lines
from freeexport.measure.table import markdown
from runtime.options import GenerationOptions, SessionOptions, documented

BENCHMARKS = """# Benchmarks

Made from docs/benchmarks/*.json by `python -m tools.pages`; do not edit. [How they are measured, and what the
columns mean](benchmarking.md).
"""
OPTIONS = """# Options

Made from `runtime/options.py` by `python -m tools.pages`; do not edit.
"""


def benchmarks() -> str:
    """A section for each file, in the order of their names."""
    return "\n".join([BENCHMARKS, *map(benchmark, sorted(Path("docs/benchmarks").glob("*.json")))])


def benchmark(path: Path) -> str:
    """A heading, the table, and what the figures depend on. Raises ClickException where the file holds no figures."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known, _ = found["schema"] == SCHEMA, found["settings"]["idle"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} holds no figures of freeexport bench ({type(error).__name__})") from None
    if not known:
        raise click.ClickException(f"{path} is of schema {found['schema']}, not {SCHEMA}; measure again")
    title = re.sub(r"^\d+-", "", path.stem).replace("-", " ").replace("_", " ")
    lines = [f"## {title}", "", markdown(bench_sheet(found)), ""]
    failed = [f"{peer}: not run: {reason}" for peer, reason in found["failed"].items()]
    for items in filter(None, (failed, facts_lines(found))):
        filled = (textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_on_hyphens=False) for text in items)
        lines += [*filled, ""]
    return "\n".join(lines)


def options() -> str:
    """A section for each dataclass, with a row for each field."""
    sections = [OPTIONS]
    described = {"`Session(...)`": SessionOptions, "`generate`, `stream`, `agenerate`, `astream`": GenerationOptions}
    for name, dataclass in described.items():
        texts = documented(dataclass)
        rows = [f"## {name}\n", "| option | default | |", "|---|---|---|"]
        for field in fields(dataclass):
            default = "" if field.default is MISSING else repr(field.default)
            # Fields that mean what they do in transformers' GenerationConfig have no text of their own.
            text = texts.get(field.name, "as in transformers")
            text = re.sub(r"\s*Default [^.]*\.$", "", text).replace("|", "\\|")
            rows.append(f"| `{field.name}` | `{default}` | {text} |")
        sections.append("\n".join(rows) + "\n")
    return "\n".join(sections)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; fail where a page differs.")
def main(check: bool) -> None:
    for page, text in {Path("docs/benchmarks.md"): benchmarks(), Path("docs/options.md"): options()}.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            raise click.ClickException(f"{page} is not what it is made from; run python -m tools.pages again")


if __name__ == "__main__":
    main()
