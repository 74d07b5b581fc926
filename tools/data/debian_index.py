"""What the index of Debian's packages says: descriptions in each language, and the source of each package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


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
