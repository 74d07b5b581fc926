"""Fetches and reads the index of Debian packages, and groups descriptions into families.

A family consists of packages of one source, packages with similar names (libfoo2, libfoo-dev,
foo-doc), and packages with a paragraph that begins alike. A paragraph shared by many sources is
boilerplate and does not create a family.

The split of a package depends only on the name of its source, so another release of Debian never
moves a line to another split. If a family would be in several splits, only its packages in the
first of them are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from runtime.bundle.bundle import sha256_of
from tools.data.splits import SHARES, DataError, normalised, split_of

# Most sources with the same beginning of a paragraph that form a family. More sources may share a
# beginning of LONG words.
SHARED_BY = 5
LONG_SHARED_BY = 200
# Minimum and maximum number of words of a compared beginning.
SHORT = 6
LONG = 16
_AFFIXES = re.compile(
    r"^(lib|python3?-|node-|golang-|ruby-|librust-|r-cran-|gir1\.2-)"
    r"|(-(dev|dbg|dbgsym|doc|docs|data|common|bin|tools|utils|core|extra|examples|perl|java|dkms|l10n|i18n).*)$"
    r"|[-.]?\d[\d.~+a-z]*$"
)
TEXTS = ("Packages", "Translation-en")
RELEASES = "releases.json"
_SYSTEM_PARTS = Path("/etc/apt/apt.conf.d")
INDEX = click.option(
    "--index",
    type=click.Path(path_type=Path),
    default=Path("build/debian-index"),
    help="Directory of the downloaded index (about 25 MB). Fetched if it is missing.",
)


def fetch_index(target: Path) -> None:
    """Fetch `Packages` and `Translation-en` from the apt sources of this machine.

    Args:
        target: Directory of the index, which is written atomically.
    """
    target = target.absolute()  # apt resolves relative directories against its own
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as name:
        work = Path(name)
        work.chmod(0o755)
        apt = work / "apt"
        own = {"APT_CONFIG": str(private_configuration(apt))}
        # By default apt reports success even if files could not be fetched.
        update = ("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
        run_debian(apt, *update, **own)
        out = work / "index"
        out.mkdir()
        releases = [_release(path) for path in sorted((apt / "lists").glob("*Release"))]
        (out / RELEASES).write_text(json.dumps(releases, indent=2) + "\n", encoding="utf-8")
        for kind in TEXTS:
            files = sorted((apt / "lists").iterdir())
            found = [path for path in files if re.search(rf"_(i18n_)?{kind}(\.\w+)?$", path.name)]
            if not found:
                raise DataError(
                    f"the sources of apt have no {kind}; check that they name a Debian mirror"
                )
            texts = (
                run_debian(apt, "/usr/lib/apt/apt-helper", "cat-file", str(path), **own)
                for path in found
            )
            (out / kind).write_bytes(b"".join(text + b"\n" for text in texts))
        out.rename(target)


def read_index(index: Path) -> tuple[dict[str, PackageDescription], list[dict[str, str]]]:
    """Return the English descriptions and the records of all packages.

    Fetches the index if the directory does not exist.
    """
    if not index.is_dir():
        click.echo("fetching the package index", err=True)
        fetch_index(index)
    if missing := [name for name in TEXTS if not (index / name).is_file()]:
        raise DataError(f"{index} has no {missing[0]}; choose another --index, or remove it")
    texts = []
    for name in TEXTS:
        with (index / name).open(encoding="utf-8", errors="replace") as file:
            texts.append(list(stanzas(file)))
    packages, translations = texts
    return descriptions(translations), packages


def _release(path: Path) -> dict[str, str]:
    """Return codename, suite, date and sha256 of an archive's Release file."""
    fields = dict(
        re.findall(r"^(Codename|Suite|Date): (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    return {**{name.lower(): value for name, value in fields.items()}, "sha256": sha256_of(path)}


def snapshot(index: Path) -> dict[str, Any]:
    """Return the releases of an index and the sha256 of its files."""
    releases = index / RELEASES
    return {
        "releases": json.loads(releases.read_text(encoding="utf-8")) if releases.is_file() else [],
        "sha256": {name: sha256_of(index / name) for name in TEXTS},
    }


def private_configuration(directory: Path) -> Path:
    """Write a configuration of apt for English and other directories, and return its path.

    Parts of the machine's configuration that set languages are left out, because Debian images
    often set none.
    """
    parts, lists, archives = (directory / name for name in ("parts", "lists", "archives"))
    for path in (parts, lists / "partial", archives / "partial"):
        path.mkdir(parents=True)
    for part in sorted(_SYSTEM_PARTS.iterdir()) if _SYSTEM_PARTS.is_dir() else ():
        if part.is_file() and not re.search(
            r"Acquire::Languages", part.read_text(errors="replace"), re.IGNORECASE
        ):
            shutil.copy(part, parts)
    (parts / "zz-languages").write_text('Acquire::Languages {"en";};\n')
    settings = {
        "Etc::parts": f"{parts}/",
        "State::lists": f"{lists}/",
        "Cache::archives": f"{archives}/",
    }
    lines = [f'Dir::{name} "{path}";' for name, path in settings.items()]
    # Keep apt from changing to a sandbox user, which requires root and is not needed here.
    lines += ['Dir::Cache::pkgcache "";', 'Dir::Cache::srcpkgcache "";', 'APT::Sandbox::User "";']
    path = directory / "apt.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_debian(folder: Path, *command: str, **variables: str) -> bytes:
    """Run a command of Debian in a folder, and return its output.

    Raises:
        DataError: If it is missing, or fails.
    """
    environment = {**os.environ, **variables, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
    except FileNotFoundError:
        raise DataError(f"{command[0]} is not on this machine; run on Debian") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise DataError(
            f"{Path(command[0]).name} failed ({lines[-1]}); try: apt-get update"
        ) from None
    return done.stdout


@dataclass(frozen=True)
class PackageDescription:
    """A description of a package.

    Attributes:
        paragraphs: Paragraphs of the long description, each on one line.
    """

    package: str
    synopsis: str
    paragraphs: tuple[str, ...]


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the fields of each paragraph of a control file.

    Continuation lines are appended to their field after a newline.
    """
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


def descriptions(translations: Iterable[Mapping[str, str]]) -> dict[str, PackageDescription]:
    """Return the descriptions of a Translation file, by the md5 of the text."""
    found = {}
    for fields in translations:
        text = fields.get("Description-en")
        md5 = fields.get("Description-md5")
        if text and md5:
            synopsis, *rest = (line.strip() for line in text.split("\n"))
            blocks = groupby(rest, lambda line: line == ".")
            paragraphs = tuple(" ".join(block) for separator, block in blocks if not separator)
            found[md5] = PackageDescription(fields.get("Package", ""), synopsis, paragraphs)
    return found


def sources(
    english: Mapping[str, PackageDescription], packages: Iterable[Mapping[str, str]]
) -> dict[str, list[str]]:
    """Return the sorted names of the source packages with each md5.

    Descriptions without a known source have the name of their package.
    """
    found: dict[str, set[str]] = {md5: set() for md5 in english}
    for fields in packages:
        md5 = fields.get("Description-md5", "")
        if md5 in found:
            found[md5].add(fields.get("Source", fields["Package"]).partition(" ")[0])
    return {md5: sorted(names) or [english[md5].package] for md5, names in found.items()}


def splits_of(
    source: Mapping[str, Sequence[str]], family: Mapping[str, str], prefix: str = ""
) -> dict[str, str]:
    """Return the split of each md5: the first split of its sources, hashed with `prefix`.

    Descriptions whose family has a source in an earlier split are left out.
    """
    order = list(SHARES)
    own = {
        md5: min((split_of(f"{prefix}source {name}") for name in names), key=order.index)
        for md5, names in source.items()
    }
    first: dict[str, str] = {}
    for md5, split in own.items():
        first[family[md5]] = min(split, first.get(family[md5], split), key=order.index)
    return {md5: split for md5, split in own.items() if first[family[md5]] == split}


def package_families(
    english: Mapping[str, PackageDescription], source: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return the family of each md5.

    A family shares a source, the stem of a name, or the beginning of a paragraph that few sources
    share.
    """
    sharing: dict[str, set[str]] = defaultdict(set)
    links: dict[str, list[str]] = {}
    for md5, text in english.items():
        origins = source[md5]
        links[md5] = [f"stem {stem(text.package)}", *(f"source {name}" for name in origins)]
        links[md5] += [f"stem {stem(name)}" for name in origins]
        for paragraph in text.paragraphs:
            sharing[_beginning(paragraph)].add(origins[0])
    for md5, text in english.items():
        for beginning in map(_beginning, text.paragraphs):
            words = beginning.count(" ") + 1
            if words >= SHORT and len(sharing[beginning]) <= (
                LONG_SHARED_BY if words >= LONG else SHARED_BY
            ):
                links[md5].append(f"text {beginning}")
    return components(links)


def stem(package: str) -> str:
    """Return a package name without affixes. libfoo2, libfoo-dev and foo-doc become foo."""
    previous = ""
    while package != previous:
        previous = package
        package = _AFFIXES.sub("", package) or package
    return package


def _beginning(paragraph: str) -> str:
    """Return the first LONG words of a paragraph, in lower case and without digits."""
    return " ".join(re.findall(r"[^\W\d]+(?:-[^\W\d]+)*", normalised(paragraph))[:LONG])


def components(links: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the connected component of each item. Items are connected by common links."""
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
