"""TensorRT engines that a bundle's folder has for this GPU and version; why none, where there is none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, Bundles

from runtime.bundle.bundle import Bundle
from runtime.engines.tensorrt.files import (
    DIRECTORY,
    EngineFile,
    EnginePlan,
    Profile,
    find_engine,
    read_record,
    record_of,
    sizes_of,
    sources_sha256,
)
from runtime.errors import EngineError

LLAMA = BY_NAME["llama-tied"]
Put = Callable[..., Path]


@pytest.fixture
def opened(copied: Bundles) -> Bundle:
    return Bundle.open(copied(LLAMA, target="tensorrt"))


@pytest.fixture
def put(opened: Bundle) -> Put:
    """Writes a file for engine deep, as `convert --build` would."""

    def write(data: bytes = b"engine", batch: int = 8, age: int = 0, **changes: Any) -> Path:
        identity = {"sources_sha256": sources_sha256(opened.manifest, "deep"), "tensorrt": "11.4.0", **changes}
        profiles = (Profile("decode", {"B": (1, 1, batch)}),)
        plan = EnginePlan(**{"engine": "deep", "architecture": "sm90", "profiles": profiles, **identity})
        path = opened.path / DIRECTORY / plan.file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (1000 - age, 1000 - age))
        record_of(path).write_text(EngineFile(plan, len(data), hashlib.sha256(data).hexdigest(), 1.5).to_json())
        return path

    return write


def test_newest_engine_for_this_gpu_and_version_is_found_with_its_record(put: Put, opened: Bundle) -> None:
    put(architecture="sm89")
    put(tensorrt="11.3.0")
    put(batch=3, age=-9)
    path = put(age=-20)  # the newest
    assert find_engine(opened, "deep", "11.4.0", "sm90") == path
    found = read_record(path)
    assert found is not None
    assert (found.bytes, found.plan.file, found.plan.profiles[0].ranges) == (6, path.name, {"B": (1, 1, 8)})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"engine": "shallow"}, "engine deep of this bundle is not built"),
        ({"sources_sha256": "ab" * 32}, "engine deep was built from other weights than the bundle.s"),
        ({"architecture": "sm89"}, "engine deep was built for sm89, this GPU is sm90"),
        ({"architecture": "nogpu"}, "engine deep was built without a GPU, this GPU is sm90"),
        ({"tensorrt": "10.15.1"}, "engine deep was built by version 10.15.1, this is 11.4.0"),
    ],
)
def test_missing_engine_error_gives_the_reason_and_the_build_command(
    changes: dict[str, Any], problem: str, put: Put, opened: Bundle
) -> None:
    put(**changes)
    with pytest.raises(EngineError, match=rf"{problem}; run: freeexport convert {opened.path} --build"):
        find_engine(opened, "deep", "11.4.0", "sm90")


def test_damaged_engine_is_refused(put: Put, opened: Bundle) -> None:
    path = put()
    path.write_bytes(b"enginf")
    assert find_engine(opened, "deep", "11.4.0", "sm90", "sizes") == path
    with pytest.raises(EngineError, match=r"does not match its record.*freeexport convert"):
        find_engine(opened, "deep", "11.4.0", "sm90", "full")
    path.write_bytes(b"engi")
    with pytest.raises(EngineError, match="does not match its record"):
        find_engine(opened, "deep", "11.4.0", "sm90", "sizes")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"plan": 3}'])
def test_engine_with_unreadable_record_counts_as_not_built(text: str, put: Put, opened: Bundle) -> None:
    record_of(put()).write_text(text)
    with pytest.raises(EngineError, match="not built"):
        find_engine(opened, "deep", "11.4.0", "sm90")


def test_call_sizes_are_read_from_the_inputs() -> None:
    cross = {"cross.4.key": (2, 4, 9, 16), "cross_lengths": (2,), "head_rows": (3,), "past.4.key": (2, 4, 144, 16)}
    assert sizes_of("shallow", {"input_ids": (2, 1), **cross}) == {"B": 2, "q": 1, "R": 3, "E": 9}
    assert sizes_of("deep", {"hidden": (2, 7, 32), "head_rows": (0,)}) == {"B": 2, "k": 7, "R": 0}
    assert sizes_of("encoder", {"input_ids": (1, 9), "lengths": (1,)}) == {"B": 1, "E": 9}
    assert sizes_of("prologue", {"hidden": (1, 9, 32)}) == {"B": 1, "E": 9}
