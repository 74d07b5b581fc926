"""Builds chat prompts of eight kinds from Debian's package descriptions, FOLDOC and WordNet.

    python -m tools.data.prompts data/prompts

A line is {"input": [{"role": "user", "content": ...}], "kind": "summarize"}, without a target.
`freeexport train --self-distill` generates a model's own answers. Each kind has the same number of
lines in a split. A source text is in one split: a family of packages (tools/data/debian_index.py),
a term of FOLDOC or a noun of WordNet. Terms and nouns with the same name share a split.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, get_args

import click

from freeexport.system.output import check_output
from tools.data.debian import SHOWN
from tools.data.debian_index import (
    INDEX,
    PackageDescription,
    package_families,
    read_index,
    run_debian,
    snapshot,
    splits_of,
)
from tools.data.debian_index import sources as source_packages
from tools.data.splits import (
    MARKER,
    OVERWRITE,
    SHARES,
    Line,
    check_version,
    normalised,
    run_tool,
    shuffled,
    split_of,
    stable_hash,
    write_data_set,
)

PACKAGES = ("dict-foldoc", "wordnet-base")
# Minimum and maximum number of words of a text.
MIN_WORDS = 30
MAX_WORDS = 120
SELDOM = 2  # fewest occurrences of a noun
_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_SENTENCE = re.compile(r"[A-Z].{40,200}?[.!?](?= |$)")
_REFERENCE = re.compile(r"(<[^>]*> )?(See|Same as|Do you mean)\b")
# Classes of nouns (lexicographer files) whose members can be compared.
_COMPARABLE = {"04", "05", "06", "09", "10", "11", "13", "17", "18", "19", "20", "26", "27", "28"}

Origin = Literal["package", "foldoc", "wordnet"]

EXPLAIN = (
    "What is {name}?",
    "Explain {name} in simple terms.",
    "Explain what {name} means, with an example.",
    'What does the term "{name}" mean?',
    "Describe {name} in two or three sentences.",
    "Tell me about {name}.",
    "How would you explain {name} to a child?",
    "Why is {name} important?",
)
SUMMARIZE = (
    "Summarize the following text in one sentence.\n\n{text}",
    "{text}\n\nSummarize this in one or two sentences.",
    "Give me the main points of this text:\n\n{text}",
    "What is the following text about?\n\n{text}",
    "Write a short title and a summary for this text.\n\n{text}",
    "TL;DR please:\n\n{text}",
)
REWRITE = (
    "Rewrite this sentence in simpler words: {sentence}",
    "Make this more formal: {sentence}",
    "Rephrase the following sentence. {sentence}",
    "Rewrite this as a question: {sentence}",
    "Write this sentence in the past tense: {sentence}",
    "Make this sentence shorter: {sentence}",
    "Rewrite the following in a friendly tone.\n\n{sentence}",
    "Correct any mistakes in this sentence and explain them: {lower}",
)
CONTINUE = (
    "Continue this text:\n\n{start}",
    "Write the next paragraph.\n\n{start}",
    "Continue this story: {sentence}",
    "Write a short story about {name}.",
    "Write a short poem about {name}.",
    "Write a paragraph about {name}.",
    "Complete the following text in the same style.\n\n{start}",
    "Write an email to a friend about {name}.",
)
ANSWER = (
    "{text}\n\nQuestion: According to this text, what is {name}?",
    "Read the text and answer the question.\n\nText: {text}\n\n"
    "Question: Who would use {name}, and for what?",
    "{text}\n\nWhat does this text say about {name}?",
    "Answer from the text alone.\n\n{text}\n\nWhat is {name} used for?",
    "Here is a text.\n\n{text}\n\nName one advantage and one limit of {name}.",
    "{text}\n\nIs {name} easy to understand? Explain why.",
)
LIST = (
    "List five facts about {name}.",
    "Give me three examples of {name}.",
    "List the steps to learn about {name}.",
    "What are the advantages and disadvantages of {name}? Use bullet points.",
    "List ten words that are related to {name}.",
    "Name five things that people do with {name}.",
    "Give me five questions that I could ask about {name}.",
    "Make a numbered list of reasons to care about {name}.",
)
EXTRACT = (
    "Extract the name, the version, the section and the home page from this record.\n\n{record}",
    "{record}\n\nWrite the name, version and summary of this package as JSON.",
    "Which packages does this package depend on? List them.\n\n{record}",
    "List the technical terms in this text.\n\n{text}",
    "List all proper names that occur in this text.\n\n{text}",
    "Make a table of the fields and values in this record.\n\n{record}",
    "{text}\n\nExtract the most important keywords, separated by commas.",
)
COMPARE = (
    "Compare {name} and {other}.",
    "What is the difference between {name} and {other}?",
    "What do {name} and {other} have in common?",
    "Which is better, {name} or {other}? Explain your choice.",
    "Compare {name} and {other} in a table.",
    "How are {name} and {other} related?",
)


@dataclass(frozen=True)
class Subject:
    """A subject of prompts.

    Attributes:
        origin: Origin of the source.
        key: Key that determines the split.
        group: Subjects of one group can be compared. "" for none.
        sentence: A sentence about the subject.
        record: Record of the package.
    """

    origin: Origin
    key: str
    name: str
    group: str
    text: str = ""
    sentence: str = ""
    record: str = ""

    @property
    def fields(self) -> dict[str, str]:
        """Values of the template placeholders that this source can fill."""
        words = self.text.split()
        start = " ".join(words[: max(12, len(words) // 2)])
        lower = self.sentence.lower().translate(str.maketrans("", "", ",.;:!?"))
        known = {
            "name": self.name,
            "text": self.text,
            "sentence": self.sentence,
            "record": self.record,
        }
        return {
            name: value
            for name, value in (known | {"start": start, "lower": lower}).items()
            if value
        }


# Kinds whose prompts need only a name. Names of packages are not meaningful.
_OF_NAMES = ("explain", "list", "compare")
KINDS: Mapping[str, tuple[str, ...]] = {
    "explain": EXPLAIN,
    "summarize": SUMMARIZE,
    "rewrite": REWRITE,
    "continue": CONTINUE,
    "answer": ANSWER,
    "list": LIST,
    "extract": EXTRACT,
    "compare": COMPARE,
}


def packages(
    english: Mapping[str, PackageDescription], records: Sequence[Mapping[str, str]]
) -> Iterator[Subject]:
    """Yield a source per package description.

    Of a family in several splits, only the descriptions in the first split are kept.
    """
    package = source_packages(english, records)
    splits = splits_of(package, package_families(english, package), "package ")
    by_md5 = {
        fields["Description-md5"]: fields for fields in records if "Description-md5" in fields
    }
    for md5, text in english.items():
        if md5 not in splits:
            continue
        fields = by_md5.get(md5, {})
        shown = (
            f"{name}: {fields[name]}"
            for name in SHOWN
            if name in fields and len(fields[name]) < 200
        )
        body = " ".join(" ".join(text.paragraphs).split())
        section = fields.get("Section", "").rpartition("/")[2]
        keys = (f"package source {name}" for name in package[md5])
        key = next(key for key in keys if split_of(key) == splits[md5])
        yield _source("package", key, text.package, f"section {section}", body, "\n".join(shown))


def terms(index: Iterable[str], dictionary: bytes) -> Iterator[Subject]:
    """Yield the terms of FOLDOC. Entries that only refer to another are left out."""
    seen = set()
    for line in index:
        headword, offset, length = line.rstrip("\n").split("\t")
        entry = dictionary[_number(offset) :][: _number(length)].decode("utf-8", errors="replace")
        text = _definition(entry)
        if (
            headword.startswith("00-database")
            or len(text.split()) < 8
            or _REFERENCE.match(text)
            or text in seen
        ):
            continue
        seen.add(text)
        subject = re.match(r"<([^>]*)>", text)
        body = re.sub(r"^<[^>]*>\s*", "", text)
        written = entry.lstrip().partition("\n")[0].strip()
        name = written if normalised(written) == normalised(headword) else headword
        group = f"subject {subject.group(1)}" if subject else ""
        yield _source("foldoc", f"term {normalised(headword)}", name, group, body)


def nouns(data: Iterable[str], counts: Iterable[str]) -> Iterator[Subject]:
    """Yield the nouns of WordNet with at least SELDOM occurrences in its texts.

    Counts the first sense of each noun. The sentence is the first suitable example.
    """
    common = set()
    for line in counts:
        sense, number, count = line.split()
        lemma, _, rest = sense.partition("%")
        if rest.startswith("1:") and number == "1" and int(count) >= SELDOM:
            common.add(lemma)
    for line in data:
        facts, _, gloss = line.partition("|")
        fields = facts.split()
        if line.startswith(" ") or not fields:
            continue
        word = fields[4]
        if word in common and word.islower():
            common.remove(word)
            name = word.replace("_", " ")
            examples = [
                one
                for one in re.findall(r'"([^"]+)"', gloss)
                if len(one.split()) >= 5 and one[-1] not in "?!"
            ]
            sentence = f"{examples[0][0].upper()}{examples[0][1:].rstrip('.')}." if examples else ""
            group = f"class {fields[1]}" if fields[1] in _COMPARABLE else ""
            yield Subject("wordnet", f"term {normalised(name)}", name, group, sentence=sentence)


def _source(
    origin: Origin, key: str, name: str, group: str, body: str, record: str = ""
) -> Subject:
    words = body.split()
    text = body if MIN_WORDS <= len(words) <= MAX_WORDS else ""
    if len(words) > MAX_WORDS:
        # Keep the whole sentences that fit.
        cut = " ".join(words[:MAX_WORDS])
        text = cut[: cut.rfind(". ") + 1]
    sentence = _SENTENCE.search(body)
    return Subject(origin, key, name, group, text, sentence.group() if sentence else "", record)


def _number(text: str) -> int:
    """Parse a number of dictd: digits in base 64, the most significant first."""
    value = 0
    for digit in text:
        value = value * 64 + _DIGITS.index(digit)
    return value


def _definition(entry: str) -> str:
    """Return the text of an entry on one line, without reference marks, addresses and dates."""
    body = " ".join(line.strip() for line in entry.splitlines() if line.startswith(" "))
    body = re.sub(r"\(?\{?\(?(https?|ftp)://[^\s})]*\)*\}?\)?", "", body)
    body = re.sub(r"[{}]|__|\(\d{4}-\d\d-\d\d\)|\[[^\]]*\]", "", body)
    return re.sub(r"\s+([.,;:])", r"\1", " ".join(body.split())).replace("..", ".")


def prompts(
    kind: str, sources: Sequence[Subject], count: int, seed: int, taken: set[str]
) -> list[Line]:
    """Return up to `count` prompts of a kind, equally distributed over origins."""
    order = shuffled(sources, seed, lambda source: f"{kind}/{source.key}/{source.name}")
    origins = [
        origin for origin in get_args(Origin) if origin != "package" or kind not in _OF_NAMES
    ]
    lines = [
        _lines(kind, [source for source in order if source.origin == origin]) for origin in origins
    ]
    found: list[Line] = []
    for line in filter(None, chain.from_iterable(zip_longest(*lines))):
        if len(found) == count:
            break
        if line.keys[-1] not in taken:
            taken.add(line.keys[-1])
            found.append(line)
    return found


def _lines(kind: str, sources: Iterable[Subject]) -> Iterator[Line]:
    waiting: dict[str, Subject] = {}  # by group, until a second source for a comparison follows
    for source in sources:
        other = waiting.pop(source.group, None) if kind == "compare" else None
        if kind == "compare" and other is None:
            if source.group:
                waiting[source.group] = source
        elif (line := _line(kind, source, other)) is not None:
            yield line


def _line(kind: str, source: Subject, other: Subject | None) -> Line | None:
    """Fill a template of the kind. None if no template's placeholders can be filled."""
    fields = source.fields | ({"other": other.name} if other else {})
    usable = [text for text in KINDS[kind] if set(re.findall(r"\{(\w+)\}", text)) <= fields.keys()]
    if not usable:
        return None
    content = usable[stable_hash(f"{kind}/{source.key}/{source.name}") % len(usable)].format(
        **fields
    )
    keys = (source.key, *([other.key] if other else []), normalised(content))
    return Line([{"role": "user", "content": content}], None, keys, {"kind": kind})


def fetch_packages(directory: Path) -> None:
    """Download PACKAGES with apt and unpack them in a directory."""
    directory = directory.absolute()  # commands run in another
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        work = Path(name)
        run_debian(work, "apt-get", "-q", "download", *PACKAGES)
        for path in work.glob("*.deb"):
            run_debian(work, "dpkg-deb", "-x", str(path), str(directory))


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@INDEX
@click.option(
    "--dictionaries",
    type=click.Path(path_type=Path),
    default=Path("build/dictionaries"),
    help="Directory of FOLDOC and WordNet (9 MB). Fetched if they are missing.",
)
@click.option("--train", type=click.IntRange(8), default=6000, help="Lines of train.")
@click.option("--held-out", type=click.IntRange(8), default=400, help="Lines of each other split.")
@click.option(
    "--test-version",
    type=click.IntRange(1),
    default=1,
    help="Leave out of test the sources of every line of earlier versions.",
)
@click.option(
    "--seed", default=0, help="Of the choice and the order; the splits do not depend on it."
)
@OVERWRITE
def command(
    out: Path,
    index: Path,
    dictionaries: Path,
    train: int,
    held_out: int,
    test_version: int,
    seed: int,
    overwrite: bool,
) -> None:
    """Write prompts of eight kinds to the directory OUT, in four splits."""
    check_version(test_version, seed)
    check_output(out, MARKER, overwrite)
    dictd = dictionaries / "usr/share/dictd"
    wordnet = dictionaries / "usr/share/wordnet"
    files = [
        *(dictd / name for name in ("foldoc.index", "foldoc.dict.dz")),
        *(wordnet / name for name in ("data.noun", "cntlist.rev")),
    ]
    if not all(path.is_file() for path in files):
        click.echo(f"fetching {' and '.join(PACKAGES)}", err=True)
        fetch_packages(dictionaries)
    english, records = read_index(index)
    terms_index, dictionary, noun_data, noun_counts = files
    sources = [
        *packages(english, records),
        *terms(
            terms_index.read_text(encoding="utf-8").splitlines(),
            gzip.decompress(dictionary.read_bytes()),
        ),
        *nouns(
            noun_data.read_text(encoding="utf-8").splitlines(),
            noun_counts.read_text(encoding="utf-8").splitlines(),
        ),
    ]
    splits = {}
    taken = set[str]()
    for name in SHARES:
        members = [source for source in sources if split_of(source.key) == name]
        each = (train if name == "train" else held_out) // len(KINDS)
        for _ in range(test_version if name == "test" else 1):
            lines = [line for kind in KINDS for line in prompts(kind, members, each, seed, taken)]
            read = {key for line in lines for key in line.keys}
            members = [source for source in members if source.key not in read]
        splits[name] = shuffled(lines, seed, lambda line: line.keys[-1])
    about = {
        "task": "prompts of eight kinds",
        "source": "Debian main: index of packages, dict-foldoc "
        "(Free On-line Dictionary of Computing, Denis Howe), "
        "wordnet-base (WordNet 3.0, Princeton University)",
        "licence": "that of each package's Debian packaging; FOLDOC: GFDL-1.1-or-later; "
        "WordNet: WordNet 3.0 licence",
        "seed": seed,
        "test_version": test_version,
        "snapshot": snapshot(index),
    }
    write_data_set(out, splits, about, overwrite)


if __name__ == "__main__":
    run_tool(command)
