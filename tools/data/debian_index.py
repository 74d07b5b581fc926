"""The index of Debian's packages, read: descriptions in each language, the source of each package, and families.

Packages of one source, packages named alike (libfoo2, libfoo-dev, foo-doc) and packages with a paragraph that begins
alike form one family, which goes into one split as a whole. A paragraph that many sources share is boilerplate: it
makes no families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tools.data.splits import normalised

# Sources that begin a paragraph alike, at most, for them to be a family: of many words in common, more may be.
SHARED_BY, LONG_SHARED_BY = 5, 200
SHORT, LONG = 6, 16  # words; what follows in a longer paragraph is not compared
_AFFIXES = re.compile(
    r"^(lib|python3?-|node-|golang-|ruby-|librust-|r-cran-|gir1\.2-)"
    r"|(-(dev|dbg|dbgsym|doc|docs|data|common|bin|tools|utils|core|extra|examples|perl|java|dkms|l10n|i18n).*)$"
    r"|[-.]?\d[\d.~+a-z]*$"
)


@dataclass(frozen=True)
class Description:
    """A description in one language: the synopsis and the long text's paragraphs, each on one line."""

    package: str
    synopsis: str
    paragraphs: tuple[str, ...]

    @property
    def body(self) -> str:
        return " ".join(self.paragraphs)


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a control file; continuation lines follow their field after a newline."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[name] += "\n" + line[1:]
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields


def descriptions(lines: Iterable[str], language: str) -> dict[str, Description]:
    """The descriptions of a Translation file by the md5 of the English text."""
    found = {}
    for fields in stanzas(lines):
        text, md5 = fields.get(f"Description-{language}"), fields.get("Description-md5")
        if text and md5:
            synopsis, *rest = text.split("\n")
            found[md5] = Description(fields.get("Package", ""), synopsis.strip(), tuple(_paragraphs(rest)))
    return found


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    current: list[str] = []
    for line in [*lines, "."]:
        if line.strip() != ".":
            current.append(line.strip())
        elif current:
            yield " ".join(current)
            current = []


def sources(lines: Iterable[str]) -> dict[str, str]:
    """The source package of each description's md5, from a Packages file."""
    found = {}
    for fields in stanzas(lines):
        if "Description-md5" in fields:
            found[fields["Description-md5"]] = fields.get("Source", fields["Package"]).partition(" ")[0]
    return found


def stem(package: str) -> str:
    """The part that names of one family of packages share: libfoo2, libfoo-dev and foo-doc are all foo."""
    previous = ""
    while package != previous:
        previous, package = package, _AFFIXES.sub("", package) or package
    return package


def families(english: Mapping[str, Description], source: Mapping[str, str]) -> dict[str, str]:
    """The family of each md5: joined by source, by stem, and by beginnings of paragraphs that few share."""
    sharing: dict[str, set[str]] = defaultdict(set)
    links: dict[str, list[str]] = {}
    for md5, text in english.items():
        origin = source.get(md5, text.package)
        links[md5] = [f"source {origin}", f"stem {stem(text.package)}", f"stem {stem(origin)}"]
        for paragraph in text.paragraphs:
            sharing[_comparable(paragraph)].add(origin)
    for md5, text in english.items():
        compared = (_comparable(paragraph) for paragraph in text.paragraphs)
        links[md5] += [f"text {key}" for key in compared if _links(key, len(sharing[key]))]
    return components(links)


def _links(beginning: str, shared_by: int) -> bool:
    words = beginning.count(" ") + 1
    return words >= SHORT and shared_by <= (LONG_SHARED_BY if words >= LONG else SHARED_BY)


def _comparable(paragraph: str) -> str:
    """The paragraph's first words without case and digits."""
    return " ".join(re.findall(r"[^\W\d]+(?:-[^\W\d]+)*", normalised(paragraph))[:LONG])


def components(links: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The component of each item: items that have a link in common, directly or through others, have one name."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for names in links.values():
        for name in names[1:]:
            first, second = sorted((root(names[0]), root(name)))
            parent[second] = first
    return {item: root(names[0]) for item, names in links.items()}
