"""A bundle on disk, checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from runtime.bundle.calibration import Calibration, check_calibration, is_calibration, read_calibration
from runtime.bundle.manifest import LARGEST_MANIFEST, MANIFEST, File, Manifest
from runtime.errors import BundleError
from runtime.json_file import UnreadableError, read_bytes, read_object, read_text

Verify = Literal["sizes", "full"]
VERIFICATION = "verification.json"
LARGEST_REPORT = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """A directory that `freeexport convert` wrote. `sha256` is the hash of its manifest, and so of all its files.

    Of the directory only the files that the manifest lists are read, none of them through a link. Beside them stand the
    report `verification.json`, and in the folder `tensorrt` the engines that were built later.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: Path | str, verify: Verify = "sizes") -> Bundle:
        """Read the manifest and check that the files are those it lists: their sizes, or with "full" their content.

        Raises BundleError naming the file that is missing, differs or is a link, or is not listed but named by a graph.
        """
        root = Path(path)
        text = _read_text(root)
        manifest = Manifest.from_json(text, MANIFEST)
        for name in engine_files(manifest):
            if name not in manifest.files:
                raise BundleError(f"{MANIFEST} lists no {name}; convert the checkpoint again")
        for name, file in manifest.files.items():
            _check_file(root, name, file, verify)
        for graph in engine_files(manifest):
            for name in external_data(root / graph) - manifest.files.keys():
                raise BundleError(
                    f"{graph} has weights in {name[:200]!r}, which {MANIFEST} does not list; do not use this bundle"
                )
        return cls(root, manifest, hashlib.sha256(text.encode()).hexdigest())

    def engine(self, name: str) -> Path:
        """The graph of one engine: encoder, prologue, shallow or deep."""
        return self.path / f"{name}.onnx"

    @property
    def verification(self) -> dict[str, Any] | None:
        """The report of `freeexport verify`, or None."""
        file = self.path / VERIFICATION
        if not os.path.lexists(file):
            return None
        check_no_link(self.path, VERIFICATION)
        return read_object(file, "run freeexport verify again", limit=LARGEST_REPORT)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration that its threshold comes from, or None. Raises BundleError where it is not that of this
        bundle."""
        manifest = self.manifest
        name = next(filter(is_calibration, manifest.files), None)
        if name is None:
            return None
        calibration = read_calibration(self.path / name)
        check_calibration(
            calibration, manifest.source_sha256, manifest.vocab_size, manifest.exit_layer, manifest.confidence
        )
        return calibration


def engines_digest(manifest: Manifest) -> str:
    """A name for what its engines compute: other calibration, tokenizer or costs change nothing."""
    files = sorted((n, file.sha256) for n, file in manifest.files.items() if n.endswith((".onnx", ".data")))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def engine_files(manifest: Manifest) -> list[str]:
    names = ["encoder", "prologue", "shallow", "deep"] if manifest.encoder_decoder else ["shallow", "deep"]
    return [f"{name}.onnx" for name in names]


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read_text(root: Path) -> str:
    if not root.is_dir():
        raise BundleError(f"there is no bundle at {root}; make one with: freeexport convert MODEL {root}")
    if not os.path.lexists(root / MANIFEST):
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}")
    check_no_link(root, MANIFEST)
    try:
        return read_text(root / MANIFEST, LARGEST_MANIFEST)
    except UnreadableError as reason:
        raise BundleError(f"{MANIFEST} cannot be read ({reason}); convert the checkpoint again") from None


def check_no_link(root: Path, name: str) -> None:
    """BundleError where a file of the bundle at `root`, or a folder on the way to it, is a symbolic link."""
    if os.path.realpath(root / name) != os.path.join(os.path.realpath(root), *name.split("/")):
        raise BundleError(
            f"{name} is a symbolic link, which no file of a bundle may be; copy the bundle with the files themselves: "
            f"cp -rL {root} COPY"
        )


def _check_file(root: Path, name: str, file: File, verify: Verify) -> None:
    path = root / name
    if not path.is_file():
        wrong = "no regular file" if path.exists() and not path.is_dir() else "missing"
        raise BundleError(f"{name} is {wrong} in {root}; copy the whole bundle, or convert the checkpoint again")
    check_no_link(root, name)
    size = path.stat().st_size
    if size != file.size:
        raise BundleError(f"{name} has {size} bytes, the manifest says {file.size}; the copy is incomplete")
    if verify == "full" and sha256_of(path) != file.sha256:
        raise BundleError(f"{name} is not the file that was written (sha256 differs); copy or convert it again")


# Bytes of a graph, whose weights stand elsewhere; fields that are looked at, and messages within each other, of which
# Protocol Buffers take no more.
LARGEST_GRAPH = 256 << 20
MOST_FIELDS = 1_000_000
DEEPEST = 100

# Of onnx.proto: a message's fields by number that lead to tensors, and the kind of message each holds.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_LOCATION = b"location"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


def external_data(graph: Path) -> set[str]:
    """The names of the files in which a graph's tensors stand. BundleError where it is no ONNX graph."""
    try:
        content = read_bytes(graph, LARGEST_GRAPH)
        return set(_locations(content))
    except UnreadableError as reason:
        raise BundleError(f"{graph.name} cannot be read ({reason}); convert the checkpoint again") from None


def _locations(content: bytes) -> Iterator[str]:
    stack: list[tuple[str, Span, int]] = [("model", (0, len(content)), 0)]
    left = MOST_FIELDS
    while stack:
        kind, span, depth = stack.pop()
        if kind == "entry":
            yield from _location(content, span)
            continue
        fields = list(islice(_fields(content, span), left))
        left -= len(fields)
        if left <= 0 or depth > DEEPEST:
            raise UnreadableError("its graph is too large")
        inner = _MESSAGES[kind]
        # Most nodes and attributes hold no tensor: what does not hold the word is not looked into.
        stack += [
            (inner[number], part, depth + 1)
            for number, part in fields
            if number in inner and content.find(_LOCATION, *part) >= 0
        ]


def _location(content: bytes, span: Span) -> Iterator[str]:
    """The value of an entry of external data, where a key of it is "location"."""
    fields = list(_fields(content, span))
    if any(number == _KEY and content[slice(*part)] == _LOCATION for number, part in fields):
        for number, part in fields:
            if number == _VALUE:
                yield content[slice(*part)].decode("utf-8", "backslashreplace")


def _fields(content: bytes, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field of a message; numbers have no length."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at, end)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(content, at, end)
            if size > end - at:
                raise UnreadableError("it is no ONNX graph, or cut off")
            yield tag >> 3, (at, at + size)
            at += size
        elif wire == _VARINT:
            _, at = _varint(content, at, end)
            yield tag >> 3, (at, at)
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
            yield tag >> 3, (at, at)
        else:
            raise UnreadableError("it is no ONNX graph")


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise UnreadableError("it is no ONNX graph, or cut off")
