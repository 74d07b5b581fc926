"""Definitions of computing terms, from the Free On-line Dictionary of Computing as Debian packages it.

    python -m tools.data.foldoc data/foldoc

A line is {"input": "define: compiler", "target": the first paragraph of the entry}. Headwords that share a definition
are in one split. Entries that only refer to another ("See ...") are left out.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from tools.data.apt import fetch_package
from tools.data.splits import Example, by_split, limited, normalised, report, run, write_data_set

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SHORTEST = 5  # words
_SEE = re.compile(r"(<[^>]*> )?(See|Same as|Do you mean)\b")


def number(text: str) -> int:
    """A number as dictd writes it: digits to the base 64, the highest first."""
    value = 0
    for digit in text:
        value = value * 64 + _DIGITS.index(digit)
    return value


def entries(index: Iterable[str], dictionary: bytes) -> Iterator[tuple[str, str]]:
    """Headword and entry of each line of a dictd index; the dictionary's own notes ("00-database-...") are left out."""
    for line in index:
        headword, offset, length = line.rstrip("\n").split("\t")
        if not headword.startswith("00-database"):
            start = number(offset)
            yield headword, dictionary[start : start + number(length)].decode("utf-8", errors="replace")


def definition(entry: str) -> str:
    """The first paragraph below the headwords, on one line, without cross-reference marks, addresses and dates."""
    paragraphs = re.split(r"\n\s*\n", entry.strip("\n"))
    for paragraph in paragraphs:
        if not paragraph.startswith(" "):  # headwords
            continue
        text = " ".join(paragraph.split())
        text = re.sub(r"\(?\{?\(?(https?|ftp)://[^\s})]*\)*\}?\)?", "", text)
        text = re.sub(r"[{}]|__|\(\d{4}-\d\d-\d\d\)", "", text)
        text = " ".join(re.sub(r"\s+([.,;:])", r"\1", text).split())
        if text:
            return text
    return ""


def examples(found: Iterable[tuple[str, str]]) -> Iterator[Example]:
    """One example a headword, the first entry of it."""
    seen = set()
    for headword, entry in found:
        text, key = definition(entry), normalised(headword)
        if key not in seen and len(text.split()) >= _SHORTEST and not _SEE.match(text):
            seen.add(key)
            yield Example(f"define: {headword}", text, (normalised(text), f"define: {key}"))


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, help="Of the order; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(out: Path, seed: int, overwrite: bool) -> None:
    """Write computing terms and their definitions to the directory OUT, in four splits.

    \b
    Example:
      python -m tools.data.foldoc data/foldoc
    """
    with tempfile.TemporaryDirectory() as directory:
        dictd = fetch_package("dict-foldoc", Path(directory)) / "usr/share/dictd"
        index = (dictd / "foldoc.index").read_text(encoding="utf-8").splitlines()
        dictionary = gzip.decompress((dictd / "foldoc.dict.dz").read_bytes())
    splits = by_split(examples(entries(index, dictionary)), lambda example: example.keys[0])
    about = {
        "task": "definition",
        "source": "The Free On-line Dictionary of Computing, http://www.foldoc.org/, Editor Denis Howe (dict-foldoc)",
        "licence": "GFDL-1.1-or-later, no invariant sections",
        "seed": seed,
    }
    report(out, write_data_set(out, limited(splits, None, None, seed), about, overwrite))


if __name__ == "__main__":
    run(command)
