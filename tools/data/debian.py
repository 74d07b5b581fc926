"""Builds data sets for several tasks from the index of Debian packages.

    python -m tools.data.debian extraction data/extraction

- summarization: long description -> one-line synopsis ("summarize: ...").
- restoration: sentence in lower case without punctuation -> sentence.
- extraction: record of a package -> its main fields as JSON.
- fields: the same as `name: value;`, without characters that T5's vocabulary lacks.
- appstream: record of a package with its long description -> component of AppStream's catalog, XML.
- translation: paragraph in German -> paragraph in English ("translate German to English: ...").

A family of descriptions (tools/data/debian_index.py) is in one split. A family that is too large to
be held out is either in train or left out.
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
    INDEX,
    PackageDescription,
    package_families,
    read_descriptions,
    read_index,
    snapshot,
    sources,
    splits_of,
    stem,
)
from tools.data.splits import (
    OVERWRITE,
    SHARES,
    Line,
    check_version,
    fresh,
    normalised,
    run_tool,
    shuffled,
    write_data_set,
)

LARGEST_HELD_OUT = 0.005  # largest share of all examples of a held-out family
# Fewest words of a long description and a synopsis.
SHORTEST_BODY = 20
SHORTEST_SYNOPSIS = 3
MOST_DEPENDENCIES = 12
# Shorter sentences have little to restore, and longer ones are mostly lists.
_SENTENCE = re.compile(r".{60,260}?[.!?](?= |$)")
SENTENCES = (60, 400)  # characters of a text to translate
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# End of the input, which marks the start of the answer for a decoder-only model.
RESTORE_SEPARATOR = "\n=> "
EXTRACT_SEPARATORS = {"extraction": "\nJSON: ", "fields": "\nFields: ", "appstream": "\nXML:\n"}
# Fields in the order of the record. Some are distractors.
SHOWN = (
    *("Package", "Source", "Version", "Installed-Size", "Architecture", "Provides"),
    *("Depends", "Description", "Homepage", "Section", "Priority", "Size"),
)
DESCRIBED = (120, 700)  # characters of the long description of a component
_LISTED = re.compile(r"(^| )[*+•-] ")
_NOT_IN_T5 = re.compile(r"[{}<>~^`\\]|[^\x00-\x7f]")
# Debian sections of main categories in the Desktop Menu Specification. Other sections are Utility.
_CATEGORIES = {
    "AudioVideo": "sound video",
    "Development": "cli-mono debug devel golang gnustep haskell interpreters introspection java "
    "javascript libdevel libs lisp ocaml perl php python ruby rust vcs",
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
    """An input and its target, from the description with an md5."""

    md5: str
    input: str
    target: str


def summaries(english: Mapping[str, PackageDescription]) -> Iterator[Pair]:
    """Yield pairs of long description and synopsis, each long description once."""
    seen = set()
    for md5, text in english.items():
        body = " ".join(text.paragraphs)
        if len(body.split()) < SHORTEST_BODY or len(text.synopsis.split()) < SHORTEST_SYNOPSIS:
            continue
        key = normalised(body)
        if key not in seen:
            seen.add(key)
            yield Pair(md5, f"summarize: {body}", text.synopsis)


def restorations(english: Mapping[str, PackageDescription]) -> Iterator[Pair]:
    """Yield pairs of stripped sentence and sentence, each stripped sentence once.

    Sentences begin with a capital letter.
    """
    seen = {""}
    for md5, text in english.items():
        for paragraph in text.paragraphs:
            for found in _SENTENCE.findall(" ".join(paragraph.split())):
                sentence = found.strip()
                # Lower case, with spaces for punctuation except inside names and options.
                key = " ".join(_PUNCTUATION.sub(" ", sentence.lower()).split())
                if sentence[:1].isupper() and key not in seen:
                    seen.add(key)
                    yield Pair(md5, key + RESTORE_SEPARATOR, sentence)


def translations(
    german: Mapping[str, PackageDescription], english: Mapping[str, PackageDescription]
) -> Iterator[Pair]:
    """Yield pairs of German and English paragraphs, each German paragraph once.

    Paragraphs are paired by place if both descriptions have equally many.
    """
    seen = set()
    for md5, text in german.items():
        if md5 not in english or len(english[md5].paragraphs) != len(text.paragraphs):
            continue
        for source, target in zip(text.paragraphs, english[md5].paragraphs, strict=True):
            source = " ".join(source.split())
            target = " ".join(target.split())
            key = normalised(source)
            lengths = sorted((len(source), len(target)))
            # Skip lists, and pairs whose texts are equal or differ too much in length.
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
    english: Mapping[str, PackageDescription],
    task: str = "extraction",
) -> Iterator[Pair]:
    """Yield pairs of a record in a Packages file and its target, one per description.

    Args:
        packages: Records.
        english: Descriptions by md5.
        task: "extraction", "fields" or "appstream".
    """
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
    """Extract the main fields of a record, as one line of JSON or as plain text.

    The fields are name, upstream version, section, home page, summary and dependencies. Of each
    dependency only the name of the first alternative is kept.

    Returns:
        None if the record has no dependencies or more than MOST_DEPENDENCIES, or if plain text has
        characters that T5 lacks.
    """
    depends = [
        part.split("|")[0].split()[0].split(":")[0]
        for part in fields.get("Depends", "").split(",")
        if part
    ]
    if not 0 < len(depends) <= MOST_DEPENDENCIES or "Description" not in fields:
        return None
    record = {
        "name": fields["Package"],
        "version": upstream_version(fields),
        "section": fields.get("Section"),
        "homepage": fields.get("Homepage"),
        "summary": fields["Description"],
        "depends": depends,
    }
    if not plain:
        return json.dumps(record, ensure_ascii=False)
    text = "; ".join(
        f"{name}: {value}"
        for name, value in (record | {"depends": ", ".join(depends)}).items()
        if value
    )
    return None if _NOT_IN_T5.search(text) else " ".join(text.split())


def component(fields: Mapping[str, str], description: PackageDescription) -> str | None:
    """Build a component of an AppStream catalog as indented XML.

    Its id begins with the reversed host of the home page. None if the record has no home page, or
    if its long description has lists or a length outside of DESCRIBED.
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
    name = fields["Package"]
    section = fields.get("Section", "")
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
    """Return the version of a record without epoch and Debian revision."""
    upstream = re.match(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$", fields["Version"])
    return upstream.group(1) if upstream else fields["Version"]


def split_pairs(
    pairs: Sequence[Pair], family: Mapping[str, str], split: Mapping[str, str]
) -> dict[str, list[Line]]:
    """Assign pairs to splits.

    Pairs without a split, and held-out pairs of families above LARGEST_HELD_OUT, are left out.
    """
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


@click.command(context_settings={"show_default": True})
@click.argument(
    "task", type=click.Choice(["summarization", "restoration", "translation", *EXTRACT_SEPARATORS])
)
@click.argument("out", type=click.Path(path_type=Path))
@INDEX
@click.option("--train", type=click.IntRange(1), help="Most lines of train (all).")
@click.option("--held-out", type=click.IntRange(1), help="Most lines of each other split (all).")
@click.option(
    "--test-version",
    type=click.IntRange(1),
    default=1,
    help="Leave out of test what measurements of earlier versions read.",
)
@click.option("--seed", default=0, help="Of the order; the splits do not depend on it.")
@OVERWRITE
def command(
    task: str,
    out: Path,
    index: Path,
    train: int | None,
    held_out: int | None,
    test_version: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Write a data set from Debian's package index to the directory OUT, in four splits."""
    check_version(test_version, seed)
    english, packages = read_index(index)
    source = sources(english, packages)
    family = package_families(english, source)
    pairs = {
        "summarization": lambda: summaries(english),
        "restoration": lambda: restorations(english),
        "translation": lambda: translations(read_descriptions(index, "de"), english),
    }.get(task, lambda: extractions(packages, english, task))()
    splits = {
        name: shuffled(examples, seed, lambda example: str(example.input))
        for name, examples in split_pairs(list(pairs), family, splits_of(source, family)).items()
    }
    splits["test"] = fresh(splits["test"], test_version)
    splits = {
        name: lines[: train if name == "train" else held_out] for name, lines in splits.items()
    }
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
    run_tool(command)
