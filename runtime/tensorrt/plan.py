"""What is known of a TensorRT engine file without loading it: what it was built from and for, and for which shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError
from runtime.tensorrt.library import version_numbers

# Dimensions of the engine contract (docs/architecture.md) that the shapes of these inputs tell.
_ROWS = {
    "encoder": ("input_ids", "E"),
    "prologue": ("hidden", "E"),
    "shallow": ("input_ids", "q"),
    "deep": ("hidden", "k"),
}


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
    sm90 and the like, or `nogpu`. `version_compatible`: later TensorRTs of the same major version run it too."""

    engine: str
    sources_sha256: str
    tensorrt: str
    architecture: str
    profiles: tuple[Profile, ...]
    version_compatible: bool = False

    @property
    def file(self) -> str:
        """The name of the engine file, different wherever the file would be another."""
        shapes = _digest([dataclasses.asdict(profile) for profile in self.profiles])
        version = f"trt{self.tensorrt}{'-compatible' if self.version_compatible else ''}"
        return f"{self.engine}-{self.sources_sha256[:8]}-{version}-{self.architecture}-{shapes[:8]}.engine"

    def runs_with(self, version: str) -> bool:
        """Whether a TensorRT of this version loads it."""
        here, built = version_numbers(version), version_numbers(self.tensorrt)
        return here == built or (self.version_compatible and here[:1] == built[:1] and here > built)


def profile_for(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> Profile:
    """The first profile that admits a call of these sizes. EngineError names what exceeds all of them."""
    for profile in profiles:
        if profile.admits(sizes):
            return profile
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = "; ".join(f"{profile.name}: {_text(profile, sizes)}" for profile in profiles)
    raise EngineError(
        f"a call with {given} fits no profile of this TensorRT engine ({known}); "
        "shorten it, or convert with a larger capacity and build with a larger --max-batch"
    )


def sizes_of(engine: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The dimensions of a call, by name, from the shapes of its inputs."""
    rows, name = _ROWS[engine]
    sizes = {"B": shapes[rows][0], name: shapes[rows][1]}
    if "head_rows" in shapes:
        sizes["R"] = shapes["head_rows"][0]
    read = next((shape for name, shape in shapes.items() if name.startswith("cross.")), None)
    return sizes if read is None else {**sizes, "E": read[2]}


def _text(profile: Profile, sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {profile.ranges[name][0]} to {profile.ranges[name][2]}" for name in sizes)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
