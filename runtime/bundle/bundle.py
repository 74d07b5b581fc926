"""Opens a bundle and checks its files before any of them is used."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from runtime.bundle.calibration import (
    Calibration,
    check_calibration,
    is_calibration,
    read_calibration,
)
from runtime.bundle.json_file import UnreadableError, read_bytes, read_object, read_text
from runtime.bundle.manifest import LARGEST_MANIFEST, MANIFEST, REMEDY, File, Manifest
from runtime.errors import BundleError

Verify = Literal["sizes", "full"]
VERIFICATION = "verification.json"

# Size limits in bytes. The weights of a graph are in other files.
LARGEST_REPORT = 64 << 20
LARGEST_GRAPH = 256 << 20
# Limits on the fields of a graph and on nesting. Protocol Buffers have the same limit on nesting.
MAX_FIELDS = 1_000_000
DEEPEST = 100


@dataclass(frozen=True)
class Bundle:
    """A directory written by `freeexport convert`.

    Only files listed in the manifest are read, none of them through a link, except for links in the
    Hugging Face cache that stay in it. The report `verification.json` and the folder `tensorrt`,
    with engines built later, are not listed.

    Attributes:
        path: The directory.
        manifest: Its manifest.
        sha256: Hash of the manifest, which contains the hashes of all files.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: Path | str, verify: Verify = "sizes") -> Bundle:
        """Read the manifest and check the files that it lists.

        Args:
            path: The directory.
            verify: "sizes" compares sizes, "full" also content.

        Raises:
            BundleError: If a file is missing, different, a link, or used by a graph but not listed.
        """
        root = Path(path)
        text = _read_manifest(root)
        manifest = Manifest.from_json(text, MANIFEST)
        for name in engine_files(manifest):
            if name not in manifest.files:
                raise BundleError(f"{MANIFEST} lists no {name}; {REMEDY}")
        for name, file in manifest.files.items():
            _check_file(root, name, file, verify)
        for graph in engine_files(manifest):
            for name in external_data(root / graph) - manifest.files.keys():
                raise BundleError(
                    f"{graph} has weights in {name[:200]!r}, which {MANIFEST} does not list; "
                    "do not use this bundle"
                )
        return cls(root, manifest, hashlib.sha256(text.encode()).hexdigest())

    def engine(self, name: str) -> Path:
        """Return the path of an engine's graph: encoder, prologue, shallow, exit or deep."""
        return self.path / f"{name}.onnx"

    @property
    def verification(self) -> dict[str, Any] | None:
        """Report of `freeexport verify`. None if there is none."""
        file = self.path / VERIFICATION
        if not os.path.lexists(file):
            return None
        check_no_link(self.path, VERIFICATION)
        return read_object(file, "run freeexport verify again", limit=LARGEST_REPORT)

    @property
    def calibration(self) -> Calibration | None:
        """Calibration of the threshold. None if there is none.

        Raises:
            CalibrationError: If it was measured on another model.
        """
        name = next(filter(is_calibration, self.manifest.files), None)
        if name is None:
            return None
        calibration = read_calibration(self.path / name)
        check_calibration(
            calibration,
            self.manifest.source_sha256,
            self.manifest.vocab_size,
            exit_layer=self.manifest.exit_layer,
            confidence=self.manifest.confidence,
        )
        return calibration


def engine_files(manifest: Manifest) -> list[str]:
    names = ["encoder", "prologue"] if manifest.encoder_decoder else []
    names += ["shallow", "exit", "deep"] if manifest.exit_engine else ["shallow", "deep"]
    return [f"{name}.onnx" for name in names]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(root: Path) -> str:
    if not os.path.exists(root):  # Path.exists raises OSError for a name that is too long
        raise BundleError(
            f"no bundle at {root}; create one with: freeexport convert MODEL {_quoted(root)}"
        )
    if not os.path.lexists(root / MANIFEST):
        if (checkpoint := _checkpoint_at(root)) is not None:
            command = f"freeexport convert {_quoted(checkpoint)} BUNDLE"
            raise BundleError(
                f"{root} is not a bundle but a checkpoint; convert it with: {command}"
            )
        missing = f"it has no {MANIFEST}" if root.is_dir() else "it is a file"
        raise BundleError(
            f"{root} is not a bundle: {missing}; give a directory that freeexport convert wrote"
        )
    check_no_link(root, MANIFEST)
    try:
        return read_text(root / MANIFEST, LARGEST_MANIFEST)
    except UnreadableError as reason:
        raise BundleError(f"{MANIFEST} cannot be read ({reason}); {REMEDY}") from None


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _checkpoint_at(path: Path) -> Path | None:
    """What `freeexport convert` would read there; None if it is nothing of that kind."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    # The second is in the directory of a LoRA adapter.
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    return min(path.glob("*.gguf"), default=None)


def snapshot_repository(path: Path) -> Path | None:
    """Return the folder of a repository in the Hugging Face cache, if `path` is a snapshot of it.

    The path of a snapshot is CACHE/models--OWNER--NAME/snapshots/COMMIT. It must be resolved.
    """
    folders = path.parents
    if len(folders) < 2 or path.parent.name != "snapshots":
        return None
    return folders[1] if folders[1].name.startswith("models--") else None


def check_no_link(root: Path, name: str) -> None:
    """Check that a file of a bundle, and the folders up to the bundle, are not symbolic links.

    In a snapshot of the Hugging Face cache, links are allowed to blobs of the same repository, and
    to CACHE/blobs, where huggingface_hub stores files that repositories share.

    Raises:
        BundleError: If one is, or leaves the cache.
    """
    real = os.path.realpath(root / name)
    folder = Path(os.path.realpath(root))
    if real == os.path.join(folder, *name.split("/")):
        return
    repository = snapshot_repository(folder)
    if repository is None:
        raise BundleError(
            f"{name} is a symbolic link, which is not allowed in a bundle; "
            "copy the bundle with the linked files: "
            f"cp -rL {root} COPY"
        )
    if not any(Path(real).is_relative_to(at / "blobs") for at in (repository, repository.parent)):
        raise BundleError(
            f"{name} is a symbolic link to {real}, which is outside of the cache of "
            f"{repository.name}; delete {repository} and download the bundle again"
        )


def _check_file(root: Path, name: str, file: File, verify: Verify) -> None:
    path = root / name
    if not path.is_file():
        wrong = "not a regular file" if path.exists() and not path.is_dir() else "missing"
        raise BundleError(f"{name} is {wrong} in {root}; copy the whole bundle, or {REMEDY}")
    check_no_link(root, name)
    size = path.stat().st_size
    if size != file.size:
        raise BundleError(f"{name} has {size} bytes, expected {file.size}; the copy is incomplete")
    if verify == "full" and sha256_of(path) != file.sha256:
        raise BundleError(
            f"{name} differs from the original file (sha256); copy or convert it again"
        )


# Messages of onnx.proto, with the numbers and types of their fields that can contain tensors.
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
_LOCATION = b"location"
_NO_GRAPH = "it is not an ONNX graph, or truncated"

Span = tuple[int, int]


def external_data(graph: Path) -> set[str]:
    """Return the names of the files that hold a graph's tensors, without using `onnx`.

    Raises:
        BundleError: If the file is not an ONNX graph.
    """
    try:
        return set(_locations(read_bytes(graph, LARGEST_GRAPH)))
    except UnreadableError as reason:
        raise BundleError(f"{graph.name} cannot be read ({reason}); {REMEDY}") from None


def _locations(content: bytes) -> Iterator[str]:
    stack: list[tuple[str, Span, int]] = [("model", (0, len(content)), 0)]
    left = MAX_FIELDS
    while stack:
        kind, span, depth = stack.pop()
        fields = list(islice(_fields(content, span), left))
        left -= len(fields)
        if left <= 0 or depth > DEEPEST:
            raise UnreadableError("its graph is too large")
        if kind == "entry":  # key and value, in any order
            if any(number == 1 and content[slice(*part)] == _LOCATION for number, part in fields):
                for number, part in fields:
                    if number == 2:
                        yield content[slice(*part)].decode("utf-8", "backslashreplace")
            continue
        inner = _MESSAGES[kind]
        # Most nodes and attributes contain no tensor. Skip those without the key.
        stack += [
            (inner[number], part, depth + 1)
            for number, part in fields
            if number in inner and content.find(_LOCATION, *part) >= 0
        ]


def _fields(content: bytes, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield number and position of each field of a message. Numeric fields have no position."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at, end)
        begin = at
        wire = tag & 7
        if wire == 0:
            _, at = _varint(content, at, end)
            begin = at
        elif wire == 2:
            size, begin = _varint(content, at, end)
            if size > end - begin:
                raise UnreadableError(_NO_GRAPH)
            at = begin + size
        elif wire in (1, 5):
            begin = at = at + (8 if wire == 1 else 4)
        else:
            raise UnreadableError(_NO_GRAPH)
        yield tag >> 3, (begin, at)


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at
    raise UnreadableError(_NO_GRAPH)
