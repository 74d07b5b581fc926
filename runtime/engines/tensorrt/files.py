"""TensorRT's Python package, and the engine files in a bundle's folder `tensorrt`.

Each file has a record beside it, `.json`, which states its sources, GPU, TensorRT version and
shapes.
"""

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
from runtime.bundle.json_file import read_json
from runtime.bundle.manifest import Manifest
from runtime.bundle.schema import Reader
from runtime.errors import BundleError, EngineError, first_line

logger = logging.getLogger(__name__)

# The first version whose ONNX parser maps TensorScatter to KV-cache updates.
MIN_VERSION = (10, 15)
NO_GPU = "nogpu"
INSTALL = "pip install 'freeexport[tensorrt]'"
DIRECTORY = "tensorrt"
LARGEST_RECORD = 1 << 20  # bytes
# Input of each engine whose shape gives B and another dimension of docs/architecture.md.
_ROWS = {
    "encoder": ("input_ids", "E"),
    "prologue": ("hidden", "E"),
    "shallow": ("input_ids", "q"),
    "exit": ("features", "k"),
    "deep": ("hidden", "k"),
}


def import_tensorrt() -> Any:
    """Import the package `tensorrt`.

    Raises:
        EngineError: If it is missing, does not load, or is too old.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be imported ({first_line(error)}); run: {INSTALL}"
        ) from error
    version = str(tensorrt.__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_VERSION:
        minimum = ".".join(map(str, MIN_VERSION))
        raise EngineError(
            f"TensorRT {version} does not support KV-cache updates; "
            f"install {minimum} or newer: {INSTALL}"
        )
    return tensorrt


def architecture(index: int = 0) -> str:
    """Return a device's architecture, such as sm90, or NO_GPU without device or cuda-python."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return NO_GPU
    failed, properties = runtime.cudaGetDeviceProperties(index)
    return NO_GPU if int(failed) else f"sm{properties.major}{properties.minor}"


def logger_of(trt: Any) -> Any:
    """Return a logger that forwards TensorRT's messages to Python's logging.

    Its `errors` collects messages of severity error.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            logger.debug("TensorRT: %s", message)

        def reason(self) -> str:
            """Return TensorRT's last error message, shortened to a line."""
            return self.errors[-1][:600] if self.errors else "no reason given"

    return Log()


@dataclass(frozen=True)
class Profile:
    """Shapes that an engine was optimized for.

    Attributes:
        name: Name of the profile.
        ranges: Smallest, typical and largest size of each dimension (B, q, k, E, R of
            docs/architecture.md).
    """

    name: str
    ranges: dict[str, tuple[int, int, int]]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Return True if all sizes are within their ranges."""
        return all(
            self.ranges[name][0] <= size <= self.ranges[name][2] for name, size in sizes.items()
        )


@dataclass(frozen=True)
class EnginePlan:
    """Identity of an engine file.

    Attributes:
        engine: Name of the engine.
        sources_sha256: Hash of the graph's and the weight file's hashes.
        tensorrt: Version of TensorRT.
        architecture: Such as sm90, or `nogpu`.
        profiles: Shapes that the engine was optimized for.
    """

    engine: str
    sources_sha256: str
    tensorrt: str
    architecture: str
    profiles: tuple[Profile, ...]

    @property
    def file(self) -> str:
        """Name of the engine file, unique to this plan."""
        profiles = [dataclasses.asdict(profile) for profile in self.profiles]
        content = json.dumps(profiles, sort_keys=True)
        shapes = hashlib.sha256(content.encode()).hexdigest()
        sources = self.sources_sha256[:8]
        device = f"trt{self.tensorrt}-{self.architecture}"
        return f"{self.engine}-{sources}-{device}-{shapes[:8]}.engine"


def profile_for(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> Profile:
    """Return the first profile that admits a call of these sizes.

    Raises:
        EngineError: If none does. The message lists sizes and profiles.
    """
    for profile in profiles:
        if profile.admits(sizes):
            return profile
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = []
    for profile in profiles:
        ranges = [
            f"{name} {profile.ranges[name][0]} to {profile.ranges[name][2]}" for name in sizes
        ]
        known.append(f"{profile.name}: {', '.join(ranges)}")
    raise EngineError(
        f"a call with {given} fits no profile of this TensorRT engine ({'; '.join(known)}); "
        "shorten it, or convert with a larger capacity and --build a larger batch"
    )


def sizes_of(engine: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the dimensions of a call, by name, from the shapes of its inputs."""
    rows, name = _ROWS[engine]
    sizes = {"B": shapes[rows][0], name: shapes[rows][1]}
    if "head_rows" in shapes:
        sizes["R"] = shapes["head_rows"][0]
    read = next((shape for name, shape in shapes.items() if name.startswith("cross.")), None)
    return sizes if read is None else {**sizes, "E": read[2]}


@dataclass(frozen=True)
class EngineFile:
    """Record of an engine file.

    Attributes:
        plan: Identity of the file.
        bytes: Size of the file.
        sha256: Hash of its content.
        seconds: Build time.
    """

    plan: EnginePlan
    bytes: int
    sha256: str
    seconds: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def record_of(path: Path) -> Path:
    """Return the path of an engine file's record."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> EngineFile | None:
    """Read the record of an engine file. None if it is missing or unreadable."""
    try:
        content = read_json(record_of(path), "build it again", limit=LARGEST_RECORD)
        # Older records have one more field.
        reader = Reader("build it again", skips=True)
        record: EngineFile = reader.read(EngineFile, content, path.name)
    except BundleError:
        return None
    return record


def is_whole(path: Path, file: EngineFile, verify: Verify) -> bool:
    """Return True if a file matches its record: in size, or with verify="full" in content."""
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return verify == "sizes" or sha256_of(path) == file.sha256


def sources_sha256(manifest: Manifest, engine: str) -> str:
    """Return the hash of an engine's graph and weights."""
    files = manifest.files
    sources = [
        files[name].sha256
        for name in sorted(files)
        if name == f"{engine}.onnx" or name.endswith(".data")
    ]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def find_engine(
    bundle: Bundle, engine: str, version: str, architecture: str, verify: Verify = "sizes"
) -> Path:
    """Return the newest engine file for a TensorRT version and GPU architecture.

    Raises:
        EngineError: If there is none, only files for other weights, GPUs or versions, or a damaged
            file.
    """
    command = f"run: freeexport convert {bundle.path} --build"
    candidates = (bundle.path / DIRECTORY).glob(f"{engine}-*.engine")
    paths = sorted(candidates, key=lambda path: path.stat().st_mtime)
    files = {
        path: file
        for path in paths
        if (file := read_record(path)) is not None and file.plan.engine == engine
    }
    sources = sources_sha256(bundle.manifest, engine)
    if not files:
        raise EngineError(f"the TensorRT engine {engine} of this bundle is not built; {command}")
    files = {path: file for path, file in files.items() if file.plan.sources_sha256 == sources}
    if not files:
        raise EngineError(
            f"the TensorRT engine {engine} was built from other weights than the bundle's; "
            f"{command}"
        )
    here = {path: file for path, file in files.items() if file.plan.architecture == architecture}
    if not here:
        gpus = {file.plan.architecture for file in files.values()}
        names = ["without a GPU" if gpu == NO_GPU else f"for {gpu}" for gpu in gpus]
        known = ", ".join(sorted(names))
        raise EngineError(
            f"the TensorRT engine {engine} was built {known}, this GPU is {architecture}; {command}"
        )
    loaded = {path: file for path, file in here.items() if file.plan.tensorrt == version}
    if not loaded:
        known = ", ".join(sorted({file.plan.tensorrt for file in here.values()}))
        raise EngineError(
            f"the TensorRT engine {engine} was built by version {known}, this is {version}; "
            f"{command}"
        )
    path, file = list(loaded.items())[-1]
    if not is_whole(path, file, verify):
        raise EngineError(
            f"{DIRECTORY}/{path.name} does not match its record, the file is damaged; {command}"
        )
    return path
