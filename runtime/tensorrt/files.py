"""The TensorRT engines in a bundle's folder `tensorrt`, each with a `.json` beside that describes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle.bundle import Bundle, Verify, sha256_of
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Reader
from runtime.errors import BundleError, EngineError
from runtime.json_file import read_json
from runtime.tensorrt.library import NO_GPU
from runtime.tensorrt.plan import Plan

DIRECTORY = "tensorrt"
LARGEST_RECORD = 1 << 20  # bytes


@dataclass(frozen=True)
class EngineFile:
    """A file that was built: its size in bytes, its hash, and the seconds that took."""

    plan: Plan
    bytes: int
    sha256: str
    seconds: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def record_of(path: Path) -> Path:
    """Where it stands what an engine file is."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> EngineFile | None:
    """What the record of an engine file says; None where there is none that can be read."""
    try:
        content = read_json(record_of(path), "build it again", limit=LARGEST_RECORD)
        found: EngineFile = Reader("build it again").read(EngineFile, content, path.name)
    except BundleError:
        return None
    return found


def is_whole(path: Path, file: EngineFile, verify: Verify) -> bool:
    """Whether a file is as its record says: its size, or with "full" its content."""
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return verify == "sizes" or sha256_of(path) == file.sha256


def sources_sha256(manifest: Manifest, engine: str) -> str:
    """The hash of what an engine is built from: its graph and the weights."""
    files = manifest.files
    sources = [files[name].sha256 for name in sorted(files) if name == f"{engine}.onnx" or name.endswith(".data")]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def find_engine(bundle: Bundle, engine: str, version: str, architecture: str, verify: Verify = "sizes") -> Path:
    """The file of an engine that a TensorRT of this version runs on a GPU of this architecture, the newest of several.

    EngineError where there is none, or only for other weights, another GPU or another version, or it is damaged.
    """
    command = f"run: freeexport convert {bundle.path} --build"
    paths = sorted((bundle.path / DIRECTORY).glob(f"{engine}-*.engine"), key=lambda path: path.stat().st_mtime)
    files = {path: file for path in paths if (file := read_record(path)) is not None and file.plan.engine == engine}
    sources = sources_sha256(bundle.manifest, engine)
    if not files:
        raise EngineError(f"the TensorRT engine {engine} of this bundle is not built; {command}")
    files = {path: file for path, file in files.items() if file.plan.sources_sha256 == sources}
    if not files:
        raise EngineError(f"the TensorRT engine {engine} was built from other weights than the bundle's; {command}")
    here = {path: file for path, file in files.items() if file.plan.architecture == architecture}
    if not here:
        known = ", ".join(sorted({_gpu(file.plan.architecture) for file in files.values()}))
        raise EngineError(f"the TensorRT engine {engine} was built {known}, this GPU is {architecture}; {command}")
    loaded = {path: file for path, file in here.items() if file.plan.runs_with(version)}
    if not loaded:
        known = ", ".join(sorted({file.plan.tensorrt for file in here.values()}))
        raise EngineError(f"the TensorRT engine {engine} was built by version {known}, here is {version}; {command}")
    path, file = list(loaded.items())[-1]
    if not is_whole(path, file, verify):
        raise EngineError(f"{DIRECTORY}/{path.name} is not the file that was built, the copy is damaged; {command}")
    return path


def _gpu(architecture: str) -> str:
    return "without a GPU" if architecture == NO_GPU else f"for {architecture}"
