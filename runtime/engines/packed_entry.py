"""An entry of the engine cache: its record, and whether it can be trusted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle.bundle import sha256_of
from runtime.bundle.schema import Reader
from runtime.errors import CacheError
from runtime.json_file import read_json

SCHEMA_VERSION = 1
ENTRY = "entry.json"
LARGEST_ENTRY = 16 << 20  # bytes


@dataclass(frozen=True)
class CachedFile:
    """Its size in bytes and its time of change in nanoseconds; of a graph also the sha256."""

    size: int
    changed: int
    sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """What is cached of one bundle: `engines` names its engines and weights by their content."""

    schema_version: int
    bundle: str
    engines: str
    onnxruntime: str
    files: dict[str, CachedFile]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def read_entry(place: Path) -> Entry:
    """CacheError or BundleError where it cannot be read."""
    content = read_json(place / ENTRY, "run freeexport cache clear", CacheError, LARGEST_ENTRY)
    entry: Entry = Reader("make it again").read(Entry, content, ENTRY)
    return entry


def write_entry(place: Path, bundle: Path, engines: str, onnxruntime: str) -> None:
    """Say what the files in `place` are, and let this user alone write them."""
    files = {path.name: _cached(path) for path in sorted(place.iterdir())}
    entry = Entry(SCHEMA_VERSION, str(bundle.resolve()), engines, onnxruntime, files)
    (place / ENTRY).write_text(json.dumps(dataclasses.asdict(entry), indent=1), encoding="utf-8")
    for path in place.iterdir():
        path.chmod(0o600)


def check_entry(place: Path, needed: Iterable[str]) -> None:
    """CacheError where others could have written it, where it is not as it was written, or lacks a file of `needed`."""
    check_owner(place)
    entry = read_entry(place)
    if entry.schema_version != SCHEMA_VERSION:
        raise CacheError(f"{place / ENTRY} is of schema {entry.schema_version}, not {SCHEMA_VERSION}")
    for name in needed:
        if name not in entry.files:
            raise CacheError(f"{place} has no {name}")
    for name, file in entry.files.items():
        if not _unchanged(place / name, file):
            raise CacheError(f"{place / name} is not the file that was written")


def check_owner(place: Path) -> None:
    """What others can write could be anything, weights of another model too. CacheError then."""
    if not hasattr(os, "geteuid"):
        return
    for path in (place.parent, place, *place.iterdir()):
        status = path.lstat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022 or path.is_symlink():
            raise CacheError(f"{path} could be written by others than you")


def _unchanged(path: Path, file: CachedFile) -> bool:
    if not path.is_file():
        return False
    status = path.stat()
    same = (status.st_size, status.st_mtime_ns) == (file.size, file.changed)
    return same and (file.sha256 is None or sha256_of(path) == file.sha256)


def _cached(path: Path) -> CachedFile:
    status = path.stat()
    return CachedFile(status.st_size, status.st_mtime_ns, sha256_of(path) if path.suffix == ".onnx" else None)
