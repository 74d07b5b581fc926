"""TensorRT engines of a bundle: built, and tried where there is a GPU."""

from __future__ import annotations

from pathlib import Path

from freeexport.system.progress import progress
from graphs.tensorrt.build import BuildOptions, Built, build
from graphs.tensorrt.self_test import SelfTest, self_test
from runtime.bundle.bundle import Bundle, engine_files
from runtime.tensorrt.files import DIRECTORY


def build_and_test(path: Path, options: BuildOptions) -> tuple[list[Built], SelfTest]:
    """Build, and then run what was built, where there is a GPU."""
    built = build_engines(path, options)
    files = {engine.plan.engine: path / DIRECTORY / engine.plan.file for engine in built}
    return built, self_test(Bundle.open(path), files, options.max_batch)


def build_engines(path: Path, options: BuildOptions) -> list[Built]:
    """Build the engines of the bundle at `path` under a progress bar. Raises BundleError and BuildError."""
    bundle = Bundle.open(path)
    done: dict[str, float] = {}
    with progress("building TensorRT engines", len(engine_files(bundle.manifest))) as advance:

        def report(engine: str, fraction: float) -> None:
            advance(fraction - done.get(engine, 0.0))
            done[engine] = fraction

        return build(bundle, options, report)
