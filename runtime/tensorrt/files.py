"""TensorRT's Python package, and the engine files in a bundle's folder `tensorrt`, each with a `.json` beside it that
says what it was built from and for, and for which shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.bundle.bundle import Bundle, Verify, sha256_of
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Reader
from runtime.errors import BundleError, EngineError, first_line
from runtime.json_file import read_json

logger = logging.getLogger(__name__)

# The first version whose ONNX parser maps TensorScatter to KV-cache updates.
LEAST = (10, 15)
NO_GPU = "nogpu"
INSTALL = "pip install 'freeexport[tensorrt]'"
DIRECTORY = "tensorrt"
LARGEST_RECORD = 1 << 20  # bytes
# Dimensions of the engine contract (docs/architecture.md) that the shapes of these inputs tell.
_ROWS = {
    "encoder": ("input_ids", "E"),
    "prologue": ("hidden", "E"),
    "shallow": ("input_ids", "q"),
    "deep": ("hidden", "k"),
}


def import_tensorrt() -> Any:
    """The package `tensorrt`. EngineError where it is missing, does not load, or is too old."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be imported ({first_line(error)}); run: {INSTALL}") from error
    version = str(tensorrt.__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        raise EngineError(f"TensorRT {version} has no KV-cache updates; {least} or newer is needed, run: {INSTALL}")
    return tensorrt


def architecture(index: int = 0) -> str:
    """A CUDA device as sm90 and the like; NO_GPU where there is none, or no cuda-python to ask."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return NO_GPU
    failed, properties = runtime.cudaGetDeviceProperties(index)
    return NO_GPU if int(failed) else f"sm{properties.major}{properties.minor}"


def logger_of(trt: Any) -> Any:
    """TensorRT's messages into Python's logging; `errors` keeps those of severity error."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            logger.debug("TensorRT: %s", message)

        def reason(self) -> str:
            """The last message of TensorRT, cut to a line."""
            return self.errors[-1][:600] if self.errors else "no reason given"

    return Log()


@dataclass(frozen=True)
class Profile:
    """Shapes that an engine was optimised for: `ranges` maps a dimension of docs/architecture.md (B, q, k, E, R) to its
    least, most usual and greatest size."""

    name: str
    ranges: dict[str, tuple[int, int, int]]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        return all(self.ranges[name][0] <= size <= self.ranges[name][2] for name, size in sizes.items())


@dataclass(frozen=True)
class Plan:
    """An engine file's identity. `sources_sha256` is the hash of the graph's and the weight file's; `architecture` is
    sm90 and the like, or `nogpu`."""

    engine: str
    sources_sha256: str
    tensorrt: str
    architecture: str
    profiles: tuple[Profile, ...]

    @property
    def file(self) -> str:
        """The name of the engine file, different wherever the file would be another."""
        content = json.dumps([dataclasses.asdict(profile) for profile in self.profiles], sort_keys=True)
        shapes = hashlib.sha256(content.encode()).hexdigest()
        return f"{self.engine}-{self.sources_sha256[:8]}-trt{self.tensorrt}-{self.architecture}-{shapes[:8]}.engine"


def profile_for(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> Profile:
    """The first profile that admits a call of these sizes. EngineError names what exceeds all of them."""
    for profile in profiles:
        if profile.admits(sizes):
            return profile
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = "; ".join(
        f"{profile.name}: {', '.join('{} {} to {}'.format(name, *profile.ranges[name][::2]) for name in sizes)}"
        for profile in profiles
    )
    raise EngineError(
        f"a call with {given} fits no profile of this TensorRT engine ({known}); "
        "shorten it, or convert with a larger capacity and --build a larger batch"
    )


def sizes_of(engine: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The dimensions of a call, by name, from the shapes of its inputs."""
    rows, name = _ROWS[engine]
    sizes = {"B": shapes[rows][0], name: shapes[rows][1]}
    if "head_rows" in shapes:
        sizes["R"] = shapes["head_rows"][0]
    read = next((shape for name, shape in shapes.items() if name.startswith("cross.")), None)
    return sizes if read is None else {**sizes, "E": read[2]}


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
    """The path of an engine file's record."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> EngineFile | None:
    """The record of an engine file; None where there is none that can be read."""
    try:
        content = read_json(record_of(path), "build it again", limit=LARGEST_RECORD)
        # Older records have a field more.
        found: EngineFile = Reader("build it again", skips=True).read(EngineFile, content, path.name)
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
    EngineError where there is none, or only for other weights, another GPU or another version, or it is damaged."""
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
        gpus = {file.plan.architecture for file in files.values()}
        known = ", ".join(sorted("without a GPU" if gpu == NO_GPU else f"for {gpu}" for gpu in gpus))
        raise EngineError(f"the TensorRT engine {engine} was built {known}, this GPU is {architecture}; {command}")
    loaded = {path: file for path, file in here.items() if file.plan.tensorrt == version}
    if not loaded:
        known = ", ".join(sorted({file.plan.tensorrt for file in here.values()}))
        raise EngineError(f"the TensorRT engine {engine} was built by version {known}, here is {version}; {command}")
    path, file = list(loaded.items())[-1]
    if not is_whole(path, file, verify):
        raise EngineError(f"{DIRECTORY}/{path.name} is not the file that was built, the copy is damaged; {command}")
    return path
