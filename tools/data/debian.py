"""Summarization, text restoration, translation and field extraction from the index of Debian's packages.

    python -m tools.data.debian summarization data/summarization
    python -m tools.data.debian restoration data/restoration
    python -m tools.data.debian extraction data/extraction
    python -m tools.data.debian translation data/translation

- summarization: the long description -> the one-line synopsis ("summarize: ...").
- restoration: a sentence in lower case without punctuation -> the sentence.
- extraction: a package's record -> the fields that matter, as JSON.
- translation: a paragraph in German -> the English one ("translate German to English: ...").

A family of descriptions (tools/data/debian_index.py) is in one split as a whole; one too large to be held out goes
to train.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tools.data.debian_index import Description, families, read_descriptions, read_index
from tools.data.splits import SHARES, Line, normalised, run, shuffled, split_of, write_data_set

LARGEST_HELD_OUT = 0.005  # of all examples, in one family
SHORTEST_BODY, SHORTEST_SYNOPSIS = 20, 3  # words
MOST_DEPENDENCIES = 12
# Characters; shorter sentences have little to restore, longer ones are mostly lists.
_SENTENCE = re.compile(r".{60,260}?[.!?](?= |$)")
SENTENCES = (60, 400)  # characters of a text to translate
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# What ends the input, so that a decoder-only model knows where the answer begins.
RESTORE_SEPARATOR, EXTRACT_SEPARATOR = "\n=> ", "\nJSON: "
# In the order of the record; some are there to be passed over.
SHOWN = (
    *("Package", "Source", "Version", "Installed-Size", "Architecture", "Provides"),
    *("Depends", "Description", "Homepage", "Section", "Priority", "Size"),
)


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


def translations(german: Mapping[str, Description], english: Mapping[str, Description]) -> Iterator[Pair]:
    """German paragraph -> English paragraph at the same place of descriptions with as many, each German one once."""
    seen = set()
    for md5, text in german.items():
        if md5 not in english or len(english[md5].paragraphs) != len(text.paragraphs):
            continue
        for source, target in zip(text.paragraphs, english[md5].paragraphs, strict=True):
            source, target = " ".join(source.split()), " ".join(target.split())
            key, lengths = normalised(source), sorted((len(source), len(target)))
            # Lists are not sentences; a text of another length, or the same one, is no translation.
            if key in seen or not SENTENCES[0] <= len(source) <= SENTENCES[1] or target[-1:] not in (".", "!", "?"):
                continue
            if key != normalised(target) and lengths[1] <= 2 * lengths[0]:
                seen.add(key)
                yield Pair(md5, f"translate German to English: {source}", target)


def extractions(packages: Iterable[Mapping[str, str]], english: Mapping[str, Description]) -> Iterator[Pair]:
    """Record of a Packages file -> JSON, one a description."""
    seen = set()
    for fields in packages:
        md5, target = fields.get("Description-md5"), extracted(fields)
        if md5 in english and target is not None and md5 not in seen:
            seen.add(md5)
            record = "\n".join(f"{name}: {fields[name]}" for name in SHOWN if name in fields)
            yield Pair(md5, record + EXTRACT_SEPARATOR, target)


def extracted(fields: Mapping[str, str]) -> str | None:
    """Name, upstream version, section, home page, summary and dependencies as one line of JSON.

    Only the first alternative's name of a dependency is kept. None for a record without dependencies or with very
    many.
    """
    depends = [part.split("|")[0].split()[0].split(":")[0] for part in fields.get("Depends", "").split(",") if part]
    if not 0 < len(depends) <= MOST_DEPENDENCIES or "Description" not in fields:
        return None
    upstream = re.match(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$", fields["Version"])
    found = {
        "name": fields["Package"],
        "version": upstream.group(1) if upstream else fields["Version"],
        "section": fields.get("Section"),
        "homepage": fields.get("Homepage"),
        "summary": fields["Description"],
        "depends": depends,
    }
    return json.dumps(found, ensure_ascii=False)


def split_pairs(pairs: Sequence[Pair], family: Mapping[str, str]) -> dict[str, list[Line]]:
    """The pairs as examples, a family in one split."""
    sizes = Counter(family[pair.md5] for pair in pairs)
    splits: dict[str, list[Line]] = {name: [] for name in SHARES}
    for pair in pairs:
        name = family[pair.md5]
        split = "train" if sizes[name] > LARGEST_HELD_OUT * len(pairs) else split_of(name)
        splits[split].append(Line(pair.input, pair.target, (name, normalised(pair.input))))
    return splits


# fmt: off
@click.command(context_settings={"show_default": True})
@click.argument("task", type=click.Choice(["summarization", "restoration", "extraction", "translation"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--index", type=click.Path(path_type=Path), default=Path("build/debian-index"),
              help="Where the downloaded index is kept; fetched (about 25 MB) unless it is there.")
@click.option("--train", type=click.IntRange(1), help="Most lines of train (all).")
@click.option("--held-out", type=click.IntRange(1), help="Most lines of each other split (all).")
@click.option("--seed", default=0, help="Of the order; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(task: str, out: Path, index: Path, train: int | None, held_out: int | None, seed: int,
            overwrite: bool) -> None:
    # fmt: on
    """Write a data set made of Debian's package index to the directory OUT, in four splits."""
    english, packages = read_index(index)
    pairs = {
        "summarization": lambda: summaries(english),
        "restoration": lambda: restorations(english),
        "extraction": lambda: extractions(packages, english),
        "translation": lambda: translations(read_descriptions(index, "de"), english),
    }[task]()
    splits = {
        name: shuffled(examples, seed, lambda example: example.input)[: train if name == "train" else held_out]
        for name, examples in split_pairs(list(pairs), families(english, packages)).items()
    }
    about = {
        "task": task,
        "source": "index of Debian packages, section main",
        "licence": "that of each package's Debian packaging",
        "seed": seed,
    }
    write_data_set(out, splits, about, overwrite)


if __name__ == "__main__":
    run(command)
