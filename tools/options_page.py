"""The page docs/options.md, from the docstrings and defaults of the options' dataclasses.

python -m tools.options_page              writes docs/options.md
python -m tools.options_page --check      fails where the page differs
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import click

from runtime.options import GenerationOptions, SessionOptions, documented

PAGE = Path("docs/options.md")
HEADER = """# Options

Made from `runtime/options.py` by `python -m tools.options_page`; do not edit.
"""


def page() -> str:
    """A section for each dataclass, with a row for each field."""
    sections = [HEADER]
    options = {"`Session(...)`": SessionOptions, "`generate`, `stream`, `agenerate`, `astream`": GenerationOptions}
    for name, dataclass in options.items():
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
@click.option("--check", is_flag=True, help="Write nothing; fail where the page differs.")
def main(check: bool) -> None:
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
        raise click.ClickException(f"{PAGE} differs from runtime/options.py; run python -m tools.options_page again")


if __name__ == "__main__":
    main()
