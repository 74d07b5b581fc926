"""Builds data sets for several tasks from the index of Debian packages.

    python -m tools.data.debian extraction data/extraction

- restoration: sentence in lower case without punctuation -> sentence.
- extraction: record of a package -> its main fields as JSON.
- fields: the same as `name: value;`, without characters that T5's vocabulary lacks.

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

import click

from freeexport.system.output import check_output
from tools.data.debian_index import (
    INDEX,
    PackageDescription,
    package_families,
    read_index,
    snapshot,
    sources,
    splits_of,
)
from tools.data.splits import (
    MARKER,
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

MAX_HELD_OUT = 0.005  # largest share of all examples of a held-out family
MAX_DEPENDENCIES = 12
# Shorter sentences have little to restore, and longer ones are mostly lists.
_SENTENCE = re.compile(r".{60,260}?[.!?](?= |$)")
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# End of the input, which marks the start of the answer for a decoder-only model.
RESTORE_SEPARATOR = "\n=> "
EXTRACT_SEPARATORS = {"extraction": "\nJSON: ", "fields": "\nFields: "}
# Fields in the order of the record. Some are distractors.
SHOWN = (
    *("Package", "Source", "Version", "Installed-Size", "Architecture", "Provides"),
    *("Depends", "Description", "Homepage", "Section", "Priority", "Size"),
)
_NOT_IN_T5 = re.compile(r"[{}<>~^`\\]|[^\x00-\x7f]")


@dataclass(frozen=True)
class Pair:
    """An input and its target, from the description with an md5."""

    md5: str
    input: str
    target: str


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


def extractions(
    packages: Iterable[Mapping[str, str]],
    english: Mapping[str, PackageDescription],
    task: str = "extraction",
) -> Iterator[Pair]:
    """Yield pairs of a record in a Packages file and its target, one per description.

    Args:
        packages: Records.
        english: Descriptions by md5.
        task: "extraction" or "fields".
    """
    seen = set()
    for fields in packages:
        md5 = fields.get("Description-md5", "")
        if md5 in english and md5 not in seen:
            target = extracted(fields, task == "fields")
            if target is not None:
                seen.add(md5)
                lines = "\n".join(f"{name}: {fields[name]}" for name in SHOWN if name in fields)
                yield Pair(md5, lines + EXTRACT_SEPARATORS[task], target)


def extracted(fields: Mapping[str, str], plain: bool = False) -> str | None:
    """Extract the main fields of a record, as one line of JSON or as plain text.

    The fields are name, upstream version, section, home page, summary and dependencies. Of each
    dependency only the name of the first alternative is kept.

    Returns:
        None if the record has no dependencies or more than MAX_DEPENDENCIES, or if plain text has
        characters that T5 lacks.
    """
    depends = [
        part.split("|")[0].split()[0].split(":")[0]
        for part in fields.get("Depends", "").split(",")
        if part
    ]
    if not 0 < len(depends) <= MAX_DEPENDENCIES or "Description" not in fields:
        return None
    # Without the epoch and Debian's revision.
    upstream = re.match(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$", fields["Version"])
    record = {
        "name": fields["Package"],
        "version": upstream.group(1) if upstream else fields["Version"],
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


def split_pairs(
    pairs: Sequence[Pair], family: Mapping[str, str], split: Mapping[str, str]
) -> dict[str, list[Line]]:
    """Assign pairs to splits.

    Pairs without a split, and held-out pairs of families above MAX_HELD_OUT, are left out.
    """
    sizes = Counter(family[pair.md5] for pair in pairs)
    splits: dict[str, list[Line]] = {name: [] for name in SHARES}
    for pair in pairs:
        name = family[pair.md5]
        chosen = split.get(pair.md5)
        if chosen is not None and (chosen == "train" or sizes[name] <= MAX_HELD_OUT * len(pairs)):
            splits[chosen].append(Line(pair.input, pair.target, (name, normalised(pair.input))))
    return splits


@click.command(context_settings={"show_default": True})
@click.argument("task", type=click.Choice(["restoration", *EXTRACT_SEPARATORS]))
@click.argument("out", type=click.Path(path_type=Path))
@INDEX
@click.option("--train", type=click.IntRange(1), help="Lines of train (all).")
@click.option("--held-out", type=click.IntRange(1), help="Lines of each other split (all).")
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
    check_output(out, MARKER, overwrite)
    english, packages = read_index(index)
    source = sources(english, packages)
    family = package_families(english, source)
    restores = task == "restoration"
    pairs = restorations(english) if restores else extractions(packages, english, task)
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
