"""Generates docs/api.md, docs/options.md and runtime/options/option_keywords.py from the code.

python -m tools.pages              writes them
python -m tools.pages --check      fails if one differs

Run from the root of the repository.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import click

from freeexport.system.output import write_whole
from runtime.options.checks import Real, Whole
from runtime.options.generation_options import GenerationOptions, SpeechOptions
from runtime.options.session_options import SessionOptions
from tools.api_page import api

OPTIONS = """# Options

Generated from the options in `runtime/` by `python -m tools.pages`; do not edit.
"""
SECTIONS = {
    "`Session(...)`": SessionOptions,
    "`generate`, `stream`, `agenerate`, `astream`": GenerationOptions,
    "Speech": SpeechOptions,
}
KEYWORDS = '''"""Types of the keyword arguments that are options, for type checkers and editors.

Generated from the options in runtime/ by `python -m tools.pages`; do not edit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from runtime.options.generation_options import Drafts, DraftSource, Mode
from runtime.text.sampler import LogitsProcessor


class SessionKeywords(TypedDict, total=False):
    """Options of a session, explained in SessionOptions."""

{session}

class GenerationKeywords(TypedDict, total=False):
    """Options of a request, explained in GenerationOptions and SpeechOptions.

    Setting `cancel` ends the request after its next token.
    """

    cancel: threading.Event | None
{request}'''


@dataclass(frozen=True)
class Option:
    """A declared option.

    Attributes:
        name: Name of the field.
        type: Source text of its type.
        default: Default value.
        range: Range of values, or "".
        text: Description.
    """

    name: str
    type: str
    default: Any
    range: str
    text: str

    @property
    def row(self) -> str:
        values = f"`{self.type}`" + (f", {self.range}" if self.range else "")
        cells = [f"`{self.name}`", f"`{self.default!r}`", values, self.text]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def declared(kind: type[Any]) -> list[Option]:
    """Return the options that a dataclass itself declares, in order."""
    defaults = {field.name: field.default for field in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    found: list[Option] = []
    for node, following in pairwise(body):
        if not isinstance(node, ast.AnnAssign):
            continue
        name = ast.unparse(node.target)
        annotation: Any = node.annotation
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
            annotation = annotation.slice.elts[0]  # type: ignore[attr-defined]
        text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else ""
        checks = getattr(hints[name], "__metadata__", ())
        ranges = [str(check) for check in checks if isinstance(check, (Real, Whole))]
        found.append(
            Option(
                name,
                type=ast.unparse(annotation).replace("'", '"'),
                default=defaults[name],
                range=", ".join(ranges),
                text=" ".join(text.split()),
            )
        )
    return found


def options() -> str:
    """Return the page of options, with a section per dataclass and a row per option."""
    sections = [OPTIONS]
    for name, kind in SECTIONS.items():
        head = [f"## {name}", "", "| option | default | values | |", "|---|---|---|---|"]
        sections.append("\n".join([*head, *(option.row for option in declared(kind))]) + "\n")
    return "\n".join(sections)


def keywords() -> str:
    """Return the module with the TypedDicts of session and request options."""

    def lines(kind: type[Any]) -> str:
        return "".join(f"    {option.name}: {option.type}\n" for option in declared(kind))

    request = lines(GenerationOptions) + lines(SpeechOptions)
    return KEYWORDS.format(session=lines(SessionOptions), request=request)


def write_pages(pages: Mapping[Path, str], check: bool, command: str) -> None:
    """Write generated pages, or only `check` that they are current.

    Raises:
        ClickException: If a page is not. The message names the command that writes it.
    """
    for page, text in pages.items():
        if not check:
            write_whole(page, text)
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            raise click.ClickException(f"{page} is not what it is made from; run {command} again")


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; fail where a page differs.")
def main(check: bool) -> None:
    pages = {
        Path("docs/api.md"): api(),
        Path("docs/options.md"): options(),
        Path("runtime/options/option_keywords.py"): keywords(),
    }
    write_pages(pages, check, "python -m tools.pages")


if __name__ == "__main__":
    main()
