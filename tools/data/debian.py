"""Summarization, text restoration, translation and extraction from the index of Debian's packages.

    python -m tools.data.debian extraction data/extraction

- summarization: the long description -> the one-line synopsis ("summarize: ...").
- restoration: a sentence in lower case without punctuation -> the sentence.
- extraction: a package's record -> the fields that matter, as JSON.
- fields: the same in an order of `name: value;`, without characters that T5's vocabulary lacks.
- appstream: a package's record with its long description -> a component of AppStream's catalog in XML.
- translation: a paragraph in German -> the English one ("translate German to English: ...").

A family of descriptions (tools/data/debian_index.py) is in one split; one too large to be held out is in train or in
none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import click

from tools.data.debian_index import (
    Description,
    families,
    read_descriptions,
    read_index,
    snapshot,
    sources,
    splits_of,
    stem,
)
from tools.data.splits import (
    SHARES,
    Line,
    check_version,
    fresh,
    normalised,
    run,
    shuffled,
    write_data_set,
)

LARGEST_HELD_OUT = 0.005  # of all examples, in one family
SHORTEST_BODY, SHORTEST_SYNOPSIS = 20, 3  # words
MOST_DEPENDENCIES = 12
# Characters; shorter sentences have little to restore, longer ones are mostly lists.
_SENTENCE = re.compile(r".{60,260}?[.!?](?= |$)")
SENTENCES = (60, 400)  # characters of a text to translate
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# What ends the input, so that a decoder-only model knows where the answer begins.
RESTORE_SEPARATOR = "\n=> "
EXTRACT_SEPARATORS = {"extraction": "\nJSON: ", "fields": "\nFields: ", "appstream": "\nXML:\n"}
# In the order of the record; some are there to be passed over.
SHOWN = (
    *("Package", "Source", "Version", "Installed-Size", "Architecture", "Provides"),
    *("Depends", "Description", "Homepage", "Section", "Priority", "Size"),
)
DESCRIBED = (120, 700)  # characters of the long description of a component
_LISTED = re.compile(r"(^| )[*+•-] ")
_NOT_IN_T5 = re.compile(r"[{}<>~^`\\]|[^\x00-\x7f]")
# Main categories of the Desktop Menu Specification by sections of Debian; that of all others is Utility.
_CATEGORIES = {
    "AudioVideo": "sound video",
    "Development": "cli-mono debug devel golang gnustep haskell interpreters introspection java javascript libdevel "
    "libs lisp ocaml perl php python ruby rust vcs",
    "Education": "education",
    "Game": "games",
    "Graphics": "graphics",
    "Network": "comm hamradio httpd mail net news web zope",
    "Office": "editors tex text",
    "Science": "electronics gnu-r math science",
    "System": "admin database embedded kernel otherosfs shells",
}
CATEGORY = {
    section: category for category, sections in _CATEGORIES.items() for section in sections.split()
}


@dataclass(frozen=True)
class Pair:
    """A text and what is to be made of it, from the description with that md5."""

    md5: str
    input: str
    target: str


def summaries(english: Mapping[str, Description]) -> Iterator[Pair]:
    """Long description -> synopsis, each long description once."""
    seen = set()
    for md5, text in english.items():
        body = " ".join(text.paragraphs)
        if len(body.split()) < SHORTEST_BODY or len(text.synopsis.split()) < SHORTEST_SYNOPSIS:
            continue
        key = normalised(body)
        if key not in seen:
            seen.add(key)
            yield Pair(md5, f"summarize: {body}", text.synopsis)


def restorations(english: Mapping[str, Description]) -> Iterator[Pair]:
    """Stripped sentence -> sentence that begins with a capital letter, each stripped sentence once."""
    seen = {""}
    for md5, text in english.items():
        for paragraph in text.paragraphs:
            for found in _SENTENCE.findall(" ".join(paragraph.split())):
                sentence = found.strip()
                # In lower case; punctuation except that inside names and options is replaced by single spaces.
                key = " ".join(_PUNCTUATION.sub(" ", sentence.lower()).split())
                if sentence[:1].isupper() and key not in seen:
                    seen.add(key)
                    yield Pair(md5, key + RESTORE_SEPARATOR, sentence)


def translations(
    german: Mapping[str, Description], english: Mapping[str, Description]
) -> Iterator[Pair]:
    """German paragraph -> English paragraph at the same place of descriptions with as many, each German one once."""
    seen = set()
    for md5, text in german.items():
        if md5 not in english or len(english[md5].paragraphs) != len(text.paragraphs):
            continue
        for source, target in zip(text.paragraphs, english[md5].paragraphs, strict=True):
            source, target = " ".join(source.split()), " ".join(target.split())
            key, lengths = normalised(source), sorted((len(source), len(target)))
            # Lists are not sentences; a text of another length, or the same one, is no translation.
            if (
                key in seen
                or not SENTENCES[0] <= len(source) <= SENTENCES[1]
                or target[-1:] not in (".", "!", "?")
            ):
                continue
            if key != normalised(target) and lengths[1] <= 2 * lengths[0]:
                seen.add(key)
                yield Pair(md5, f"translate German to English: {source}", target)


def extractions(
    packages: Iterable[Mapping[str, str]],
    english: Mapping[str, Description],
    task: str = "extraction",
) -> Iterator[Pair]:
    """Record of a Packages file -> what the task makes of it, one a description."""
    seen = set()
    for fields in packages:
        md5 = fields.get("Description-md5", "")
        if md5 in english and md5 not in seen:
            record = dict(fields)
            if task == "appstream":
                paragraphs = [" ".join(text.split()) for text in english[md5].paragraphs]
                record["Description"] = "\n ".join((fields.get("Description", ""), *paragraphs))
            target = (
                component(fields, english[md5])
                if task == "appstream"
                else extracted(fields, task == "fields")
            )
            if target is not None:
                seen.add(md5)
                lines = "\n".join(f"{name}: {record[name]}" for name in SHOWN if name in record)
                yield Pair(md5, lines + EXTRACT_SEPARATORS[task], target)


def extracted(fields: Mapping[str, str], plain: bool = False) -> str | None:
    """Name, upstream version, section, home page, summary and dependencies as one line of JSON, or in plain text.

    Only the first alternative's name of a dependency is kept. None for a record without dependencies or with very
    many, and for plain text of characters that T5 does not know.
    """
    depends = [
        part.split("|")[0].split()[0].split(":")[0]
        for part in fields.get("Depends", "").split(",")
        if part
    ]
    if not 0 < len(depends) <= MOST_DEPENDENCIES or "Description" not in fields:
        return None
    found = {
        "name": fields["Package"],
        "version": upstream_version(fields),
        "section": fields.get("Section"),
        "homepage": fields.get("Homepage"),
        "summary": fields["Description"],
        "depends": depends,
    }
    if not plain:
        return json.dumps(found, ensure_ascii=False)
    text = "; ".join(
        f"{name}: {value}"
        for name, value in (found | {"depends": ", ".join(depends)}).items()
        if value
    )
    return None if _NOT_IN_T5.search(text) else " ".join(text.split())


def component(fields: Mapping[str, str], description: Description) -> str | None:
    """A generic component of an AppStream catalog, indented; its id begins with the home page's host, reversed.

    None for a record without a home page, and for a long description with lists, a short or a very long one.
    """
    length = sum(map(len, description.paragraphs))
    host = re.match(r"\w+://(?:www\.)?([\w.-]+)", fields.get("Homepage", ""))
    listed = any(map(_LISTED.search, description.paragraphs))
    if (
        host is None
        or listed
        or not DESCRIBED[0] <= length <= DESCRIBED[1]
        or "Description" not in fields
    ):
        return None
    name, section = fields["Package"], fields.get("Section", "")
    root = ElementTree.Element("component", type="font" if section == "fonts" else "generic")

    def add(
        parent: ElementTree.Element, tag: str, text: str = "", **attributes: str
    ) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag, attributes)
        element.text = text or None
        return element

    add(
        root, "id", ".".join((*reversed(host[1].split(".")), re.sub(r"[^A-Za-z0-9_.-]", "_", name)))
    )
    add(root, "pkgname", name)
    add(root, "name", stem(name))
    add(root, "summary", fields["Description"])
    text = add(root, "description")
    for paragraph in description.paragraphs:
        add(text, "p", " ".join(paragraph.split()))
    add(add(root, "categories"), "category", CATEGORY.get(section, "Utility"))
    add(root, "url", fields["Homepage"], type="homepage")
    add(add(root, "releases"), "release", version=upstream_version(fields))
    ElementTree.indent(root, " ")
    return ElementTree.tostring(root, encoding="unicode")


def upstream_version(fields: Mapping[str, str]) -> str:
    """A record's version without the epoch and Debian's revision."""
    upstream = re.match(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$", fields["Version"])
    return upstream.group(1) if upstream else fields["Version"]


def split_pairs(
    pairs: Sequence[Pair], family: Mapping[str, str], split: Mapping[str, str]
) -> dict[str, list[Line]]:
    """The pairs as examples, in the split of their md5; without those that have none, and held-out large families."""
    sizes = Counter(family[pair.md5] for pair in pairs)
    splits: dict[str, list[Line]] = {name: [] for name in SHARES}
    for pair in pairs:
        name = family[pair.md5]
        chosen = split.get(pair.md5)
        if chosen is not None and (
            chosen == "train" or sizes[name] <= LARGEST_HELD_OUT * len(pairs)
        ):
            splits[chosen].append(Line(pair.input, pair.target, (name, normalised(pair.input))))
    return splits


# fmt: off
@click.command(context_settings={"show_default": True})
@click.argument("task", type=click.Choice(["summarization", "restoration", "translation", *EXTRACT_SEPARATORS]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--index", type=click.Path(path_type=Path), default=Path("build/debian-index"),
              help="Where the downloaded index is kept; fetched (about 25 MB) unless it is there.")
@click.option("--train", type=click.IntRange(1), help="Most lines of train (all).")
@click.option("--held-out", type=click.IntRange(1), help="Most lines of each other split (all).")
@click.option("--test-version", type=click.IntRange(1), default=1,
              help="Leave out of test what measurements of earlier versions read.")
@click.option("--seed", default=0, help="Of the order; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(task: str, out: Path, index: Path, train: int | None, held_out: int | None, test_version: int, seed: int,
            overwrite: bool) -> None:
    # fmt: on
    """Write a data set made of Debian's package index to the directory OUT, in four splits."""
    check_version(test_version, seed)
    english, packages = read_index(index)
    source = sources(english, packages)
    family = families(english, source)
    pairs = {
        "summarization": lambda: summaries(english),
        "restoration": lambda: restorations(english),
        "translation": lambda: translations(read_descriptions(index, "de"), english),
    }.get(task, lambda: extractions(packages, english, task))()
    splits = {
        name: shuffled(examples, seed, lambda example: example.input)
        for name, examples in split_pairs(list(pairs), family, splits_of(source, family)).items()
    }
    splits["test"] = fresh(splits["test"], test_version)
    splits = {name: lines[: train if name == "train" else held_out] for name, lines in splits.items()}
    about = {
        "task": task,
        "source": "index of Debian packages, section main",
        "licence": "that of each package's Debian packaging",
        "seed": seed,
        "test_version": test_version,
        "snapshot": snapshot(index),
    }
    write_data_set(out, splits, about, overwrite)


if __name__ == "__main__":
    run(command)
