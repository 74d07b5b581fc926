"""The page docs/options.md, from the docstrings and defaults of the options' dataclasses.

python -m tools.options_page              writes docs/options.md
python -m tools.options_page --check      fails where the page differs
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from runtime.options import GenerationOptions, SessionOptions, documented

PAGE = Path("docs/options.md")
HEADER = """# Options

Made from `runtime/options.py` by `python -m tools.options_page`; do not edit.
"""
# Fields whose meaning is that of transformers' GenerationConfig have no text of their own.
ELSEWHERE = "as in transformers"


def table(name: str, options: type[Any]) -> str:
    """A section: a row for each field, with its default."""
    texts = documented(options)
    rows = ["| option | default | |", "|---|---|---|"]
    for field in fields(options):
        default = "" if field.default is MISSING else repr(field.default)
        text = re.sub(r"\s*Default [^.]*\.$", "", texts.get(field.name, ELSEWHERE)).replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{default}` | {text} |")
    return f"## {name}\n\n" + "\n".join(rows) + "\n"


def page() -> str:
    sections = {"`Session(...)`": SessionOptions, "`generate`, `stream`, `agenerate`, `astream`": GenerationOptions}
    return "\n".join([HEADER, *(table(name, options) for name, options in sections.items())])


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; fail where the page differs.")
def main(check: bool) -> None:
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        raise click.ClickException(f"{PAGE} differs from runtime/options.py; run python -m tools.options_page again")


if __name__ == "__main__":
    main()
