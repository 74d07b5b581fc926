"""Translation, summarization, text restoration and field extraction from the index of Debian's packages.

    python -m tools.data.debian summarization data/summarization
    python -m tools.data.debian restoration data/restoration
    python -m tools.data.debian extraction data/extraction
    python -m tools.data.debian translation-de data/en-de
    python -m tools.data.debian translation-fr data/en-fr

- summarization: the long description -> the one-line synopsis ("summarize: ...").
- restoration: a sentence in lower case without punctuation -> the sentence.
- extraction: a package's record -> the fields that matter, as JSON.
- translation: synopses and paragraphs, English -> German or French ("translate English to German: ...").

A family of descriptions (tools/data/debian_index.py) is in one split as a whole; one too large to be held out goes
to train. What many packages say alike occurs once in a translation set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tools.data.apt import fetch_index
from tools.data.debian_index import Description, descriptions, families, sources, stanzas
from tools.data.splits import Example, limited, normalised, report, run, split_of, write_data_set

LANGUAGES = {"de": "German", "fr": "French"}
LARGEST_HELD_OUT = 0.005  # of all examples, in one family
SHORTEST_BODY, SHORTEST_SYNOPSIS, SHORTEST_PARAGRAPH = 20, 3, 4  # words


# Characters; shorter sentences have little to restore, longer ones are mostly lists.
SHORTEST, LONGEST = 60, 260
_SENTENCE = re.compile(rf".{{{SHORTEST},{LONGEST}}}?[.!?](?= |$)")
_PUNCTUATION = re.compile(r"[^\w\s'+#/-]")
# What ends the input, so that a decoder-only model knows where the answer begins.
RESTORE_SEPARATOR = "\n=> "
MOST_DEPENDENCIES = 12
# In the order of the record; some are there to be passed over.
SHOWN = (
    "Package",
    "Source",
    "Version",
    "Installed-Size",
    "Architecture",
    "Provides",
    "Depends",
    "Description",
    "Homepage",
    "Section",
    "Priority",
    "Size",
)
# What ends the input, so that a decoder-only model knows where the answer begins.
EXTRACT_SEPARATOR = "\nJSON: "
_UPSTREAM = re.compile(r"^(?:\d+:)?(.+?)(?:-[^-]*)?$")


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
        if len(text.body.split()) < SHORTEST_BODY or len(text.synopsis.split()) < SHORTEST_SYNOPSIS:
            continue
        key = normalised(text.body)
        if key not in seen:
            seen.add(key)
            yield Pair(md5, f"summarize: {text.body}", text.synopsis)


def restorations(english: Mapping[str, Description]) -> Iterator[Pair]:
    """Stripped sentence -> sentence, each stripped sentence once."""
    seen = set()
    for md5, text in english.items():
        for paragraph in text.paragraphs:
            for sentence in sentences(paragraph):
                key = stripped(sentence)
                if key not in seen:
                    seen.add(key)
                    yield Pair(md5, key + RESTORE_SEPARATOR, sentence)


def extractions(lines: Iterable[str], english: Mapping[str, Description]) -> Iterator[Pair]:
    """Record of a Packages file -> JSON, one a description."""
    seen = set()
    for fields in stanzas(lines):
        md5, target = fields.get("Description-md5"), extracted(fields)
        if md5 in english and target is not None and md5 not in seen:
            seen.add(md5)
            yield Pair(md5, record(fields) + EXTRACT_SEPARATOR, target)


def translations(english: Mapping[str, Description], other: Mapping[str, Description], language: str) -> Iterator[Pair]:
    """English -> translation, synopses and paragraphs, each English text once; what is left in English is left out."""
    seen = set()
    for md5, translated in other.items():
        if md5 not in english:
            continue
        text = english[md5]
        pairs = [(text.synopsis, translated.synopsis)]
        if len(text.paragraphs) == len(translated.paragraphs):
            both = zip(text.paragraphs, translated.paragraphs, strict=True)
            pairs += [(before, after) for before, after in both if len(before.split()) >= SHORTEST_PARAGRAPH]
        for before, after in pairs:
            key = normalised(before)
            if key not in seen and key != normalised(after):
                seen.add(key)
                yield Pair(md5, f"translate English to {LANGUAGES[language]}: {before}", after)


def stripped(text: str) -> str:
    """`text` in lower case, its punctuation except that inside names and options replaced by single spaces."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph that begin with a capital letter and change when they are stripped."""
    for found in _SENTENCE.findall(" ".join(paragraph.split())):
        sentence = found.strip()
        if sentence[:1].isupper() and stripped(sentence) not in ("", sentence):
            yield sentence


def record(fields: Mapping[str, str]) -> str:
    """The fields that are shown, a line each."""
    return "\n".join(f"{name}: {fields[name]}" for name in SHOWN if name in fields)


def extracted(fields: Mapping[str, str]) -> str | None:
    """Name, upstream version, section, home page, summary and dependencies as one line of JSON.

    Of a dependency only the first alternative's name is kept. None for a record without dependencies or with very
    many.
    """
    depends = [part.split("|")[0].split()[0].split(":")[0] for part in fields.get("Depends", "").split(",") if part]
    if not 0 < len(depends) <= MOST_DEPENDENCIES or "Description" not in fields:
        return None
    upstream = _UPSTREAM.match(fields["Version"])
    found = {
        "name": fields["Package"],
        "version": upstream.group(1) if upstream else fields["Version"],
        "section": fields.get("Section"),
        "homepage": fields.get("Homepage"),
        "summary": fields["Description"],
        "depends": depends,
    }
    return json.dumps(found, ensure_ascii=False)


def split_pairs(pairs: Sequence[Pair], family: Mapping[str, str]) -> dict[str, list[Example]]:
    """The pairs as examples, a family in one split."""
    sizes = Counter(family[pair.md5] for pair in pairs)
    splits: dict[str, list[Example]] = {name: [] for name in ("train", "validation", "calibration", "test")}
    for pair in pairs:
        name = family[pair.md5]
        split = "train" if sizes[name] > LARGEST_HELD_OUT * len(pairs) else split_of(name)
        splits[split].append(Example(pair.input, pair.target, (name, normalised(pair.input))))
    return splits


def pairs_of(task: str, index: Path) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of a task and the family of each md5, from the directory that `fetch_index` made."""

    def read(language: str) -> dict[str, Description]:
        with (index / f"Translation-{language}").open(encoding="utf-8", errors="replace") as file:
            return descriptions(file, language)

    english = read("en")
    with (index / "Packages").open(encoding="utf-8", errors="replace") as file:
        family = families(english, sources(file))
    if task == "summarization":
        return list(summaries(english)), family
    if task == "restoration":
        return list(restorations(english)), family
    if task == "extraction":
        with (index / "Packages").open(encoding="utf-8", errors="replace") as file:
            return list(extractions(file, english)), family
    language = task.removeprefix("translation-")
    return list(translations(english, read(language), language)), family


@click.command(context_settings={"show_default": True})
@click.argument(
    "task",
    type=click.Choice(
        ["summarization", "restoration", "extraction", *(f"translation-{language}" for language in LANGUAGES)]
    ),
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    default=Path("build/debian-index"),
    help="Where the downloaded index is kept; fetched (about 25 MB) unless it is there.",
)
@click.option("--train", type=click.IntRange(1), help="Most lines of train (all).")
@click.option("--held-out", type=click.IntRange(1), help="Most lines of each other split (all).")
@click.option("--seed", default=0, help="Of the order; the splits do not depend on it.")
@click.option("--overwrite", is_flag=True, help="Replace a data set at OUT.")
def command(
    task: str, out: Path, index: Path, train: int | None, held_out: int | None, seed: int, overwrite: bool
) -> None:
    """Write a data set made of Debian's package index to the directory OUT, in four splits.

    \b
    Example:
      python -m tools.data.debian translation-de data/en-de
    """
    if not index.is_dir():
        click.echo("fetching the package index", err=True)
        fetch_index(index, ["en", *LANGUAGES])
    pairs, family = pairs_of(task, index)
    about = {
        "task": task,
        "source": "index of Debian packages, section main",
        "licence": "that of each package's Debian packaging; translations: Debian Description Translation Project",
        "seed": seed,
    }
    report(out, write_data_set(out, limited(split_pairs(pairs, family), train, held_out, seed), about, overwrite))


if __name__ == "__main__":
    run(command)
