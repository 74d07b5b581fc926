"""What is known of a TensorRT engine file without loading it: what it was built from and for, and for which shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError


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
        shapes = _digest([dataclasses.asdict(profile) for profile in self.profiles])
        return f"{self.engine}-{self.sources_sha256[:8]}-trt{self.tensorrt}-{self.architecture}-{shapes[:8]}.engine"


def profile_for(profiles: Sequence[Profile], sizes: Mapping[str, int]) -> Profile:
    """The first profile that admits a call of these sizes. EngineError names what exceeds all of them."""
    for profile in profiles:
        if profile.admits(sizes):
            return profile
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = "; ".join(f"{profile.name}: {_text(profile, sizes)}" for profile in profiles)
    raise EngineError(
        f"a call with {asked} fits no profile of this TensorRT engine ({known}); "
        "shorten it, or convert with a larger capacity and build with a larger --max-batch"
    )


def _text(profile: Profile, sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {profile.ranges[name][0]} to {profile.ranges[name][2]}" for name in sizes)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
