"""Profiles, file names, progress and refusals of TensorRT builds: all that needs no TensorRT."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from checkpoints import BY_NAME, Bundles
from hypothesis import strategies as st

from graphs.errors import BuildError
from graphs.tensorrt.build import build, dimensions, profiles_of
from runtime.bundle.bundle import Bundle, engine_files
from runtime.engines.tensorrt.files import EnginePlan, Profile, import_tensorrt, profile_for
from runtime.errors import EngineError

T5, LLAMA = BY_NAME["t5-relu-tied"], BY_NAME["llama-tied"]


@pytest.fixture
def t5(bundle: Bundles) -> Bundle:
    return Bundle.open(bundle(T5, target="tensorrt", max_pending=7))


def test_every_dynamic_dimension_has_a_range_in_every_profile(t5: Bundle) -> None:
    for file in engine_files(t5.manifest):
        shapes = dimensions(t5.path / file)
        free = {size for shape in shapes.values() for size in shape if isinstance(size, str)}
        for profile in profiles_of(Path(file).stem, t5.manifest, 4):
            assert profile.ranges.keys() == free
            caches = [shape for name, shape in shapes.items() if name.startswith("past.")]
            assert all(shape[2] == t5.manifest.capacity + t5.manifest.max_pending for shape in caches)
            assert all(least <= usual <= most for least, usual, most in profile.ranges.values())


def test_session_calls_select_a_matching_profile(t5: Bundle) -> None:
    shallow, deep = (profiles_of(engine, t5.manifest, 2) for engine in ("shallow", "deep"))
    assert profile_for(shallow, {"B": 2, "q": 1, "R": 0, "E": 128}).name == "decode"
    assert profile_for(shallow, {"B": 1, "q": 128, "R": 1, "E": 1}).name == "prefill"
    assert profile_for(deep, {"B": 2, "k": 7, "R": 14, "E": 9}).name == "sync"
    assert profile_for(deep, {"B": 2, "k": 128, "R": 2, "E": 9}).name == "prefill"


@pytest.mark.parametrize("size", [{"q": 129}, {"B": 3}, {"E": 129}, {"R": 3}])
def test_call_without_a_matching_profile_is_refused_with_the_limits(size: dict[str, int], t5: Bundle) -> None:
    sizes = {"B": 1, "q": 1, "R": 1, "E": 1} | size
    ((name, value),) = size.items()
    with pytest.raises(EngineError, match=rf"{name}={value}.* fits no profile .*prefill: .*--build a larger batch"):
        profile_for(profiles_of("shallow", t5.manifest, 2), sizes)


@pytest.mark.parametrize("batch", [0, -1, 257])
def test_out_of_range_batch_is_refused(batch: int, t5: Bundle) -> None:
    with pytest.raises(BuildError, match=f"max batch {batch} is out of range; choose 1 to 256"):
        profiles_of("deep", t5.manifest, batch)


PLAN = EnginePlan("deep", "ab" * 32, "11.4.0", "sm90", (Profile("decode", {"B": (1, 1, 8)}),))


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "shallow"},
        {"sources_sha256": "cd" * 32},
        {"tensorrt": "11.5.0"},
        {"architecture": "sm89"},
        {"profiles": (Profile("decode", {"B": (1, 1, 9)}),)},
    ],
)
def test_engine_file_name_depends_on_every_input_of_the_build(change: dict[str, object]) -> None:
    assert replace(PLAN, **change).file != PLAN.file == replace(PLAN).file


@pytest.mark.parametrize("version", ["10.14.1", "9.9", "8.6.1.6"])
def test_tensorrt_without_cache_updates_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(EngineError, match=rf"TensorRT {version} .*10.15 or newer.*pip install"):
        import_tensorrt()


def test_tensorrt_that_cannot_start_mentions_the_gpu(monkeypatch: pytest.MonkeyPatch, t5: Bundle) -> None:
    """As NVIDIA's package does it without a driver: the constructor of the builder gives nothing."""
    fake = ModuleType("tensorrt")

    class Builder:
        def __init__(self, log: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

    fake.__dict__.update(__version__="11.4.0", Builder=Builder, ILogger=ILogger)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    with pytest.raises(BuildError, match=r"TensorRT 11\.4\.0 cannot start.*NVIDIA GPU"):
        build(t5, 8)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_bundle_for_another_target_is_refused(target: str, bundle: Bundles) -> None:
    with pytest.raises(BuildError, match=f"converted for {target}; convert again with --target tensorrt"):
        build(Bundle.open(bundle(LLAMA, target=target)), 8)


@st.composite
def builds(draw: st.DrawFn) -> list[tuple[str, str, str | None, int]]:
    """Reports of a build: phases nested at random, some of which end early."""

    def phase(name: str, parent: str | None, depth: int) -> None:
        steps = draw(st.integers(1, 4))
        events.append(("start", name, parent, steps))
        for step in range(draw(st.integers(0, steps))):
            if depth < 3 and draw(st.booleans()):
                phase(f"{name}.{step}", name, depth + 1)
            events.append(("step", name, None, step))
        events.append(("finish", name, None, 0))

    events: list[tuple[str, str, str | None, int]] = []
    phase("root", None, 0)
    return events
