"""The words of the documentation and the help are the field's, and lines of Markdown are short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import click
import pytest
from command_line import invoke

from freeexport import cli

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
PRODUCT = ("runtime", "graphs", "freeexport", "tools")
PAGES = [
    pytest.param(page, id=page.name)
    for page in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "freeexport" / "data" / "g2p" / "MODEL_CARD.md",
    )
]

# A pattern that is not used, and what to write.
WORDS = {
    r"\brounded weights?\b": "quantized weights",
    r"\bweights? (that )?(are|is|were) rounded\b": "quantized weights",
    r"\brounded for a CPU\b": "quantized for a CPU",
    r"\bin company\b|\bcompany of\b": "batch size",
    r"\brows? that (was|were) asked\b": "a task whose shallow head ran",
    r"\bhiccups?\b": "a slow call",
    r"\bpasses? for nothing\b": "has no effect",
    r"\b(they|it) (have|has) won\b": "time saved",
    r"\blies what\b": "name the thing",
    r"\bwhat the memory gives\b": "of memory bandwidth",
    r"\bmend it\b": "fix it",
    r"\bgo(es)? with beams\b": "not supported with beam search",
    r"\b(decoder|engine|model|full|lossless) (says|said)\b": "the deep (shallow) prediction; equals full",
    r"\bsurer\b|\bsure of\b": "more confident",
    r"\bNever another than\b": "No fallback to another",
    r"\b(may be given )?several times\.": "May be repeated.",
    r"\bused, the first\b": "Use only the first N lines",
    r"\bdid not see\b": "not used for",
}
# Of docstrings in the product, besides.
IN_CODE = {
    r"\bwhat (it|they) (says?|said)\b": "its prediction, its record, its message",
    r"\bwhose word counts\b": "which setting takes precedence",
    r"\bof late:": "moving average",
}


def wrong(text: str, words: Mapping[str, str] = WORDS) -> list[str]:
    """The patterns found in a text, with what to write."""
    flat = " ".join(text.split())
    return [
        f"{found.group()!r}: write {better!r}" for word, better in words.items() if (found := re.search(word, flat))
    ]


def docstrings(*folders: str) -> dict[str, str]:
    """Every docstring in these folders, by place."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {place: text for path in paths for place, text in docstrings_of(path).items()}


@cache
def docstrings_of(path: Path) -> dict[str, str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    name = path.relative_to(ROOT)
    return {f"{name}:{getattr(node, 'lineno', 1)}": ast.get_docstring(node) or "" for node in nodes}


def helps() -> Iterator[tuple[str, str]]:
    """Every command's name and its help, as it is printed."""

    def below(command: click.Command, path: list[str]) -> Iterator[tuple[str, str]]:
        yield " ".join(["freeexport", *path]), invoke(*path, "--help").output
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from below(inner, [*path, name])

    yield from below(cli.main, [])


def long_lines(page: Path) -> list[str]:
    """Lines of a page that are too long; tables are as wide as they must be."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    return [f"{page.name}:{n} has {len(line)}" for n, line in lines if len(line) > WIDTH and line.lstrip()[0] != "|"]


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_markdown_are_short(page: Path) -> None:
    assert long_lines(page) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_documentation_uses_the_words_of_the_field(page: Path) -> None:
    assert wrong(page.read_text(encoding="utf-8")) == []


def test_the_help_of_every_verb_uses_the_words_of_the_field() -> None:
    found = dict(helps())
    assert {"freeexport convert"} <= set(found)
    assert {name: words for name, text in found.items() if (words := wrong(text))} == {}


def test_docstrings_of_the_product_use_the_words_of_the_field() -> None:
    found = docstrings(*PRODUCT)
    assert len(found) > 1000
    words = {**WORDS, **IN_CODE}
    assert {place: said for place, text in found.items() if (said := wrong(text, words))} == {}


def test_docstrings_begin_with_a_verb_or_the_noun_that_they_describe() -> None:
    vague = re.compile(r"(Of|What|Whose|As many|The same|Told|Those|That|Which|Where|When)\b")
    assert [place for place, text in docstrings(*PRODUCT, "tests").items() if vague.match(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "Only for rounded\nweights.",
        "a hiccup of the machine",
        "what the deep decoder said",
        "Lossless says what full says",
    ],
)
def test_words_that_are_not_used_are_found(text: str) -> None:
    assert len(wrong(text)) == 1


def test_long_lines_are_found_outside_of_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a" * 120 + "\n" + "b" * 121 + "\n| " + "c" * 200 + " |\n", encoding="utf-8")
    assert long_lines(page) == ["page.md:2 has 121"]
