"""TensorRT engines of a bundle: built where they are missing or stale, each beside what it was built from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from graphs.errors import BuildError
from graphs.tensorrt.monitor import monitor_of
from graphs.tensorrt.network import add_profiles, dimensions, parse
from graphs.tensorrt.profiles import profiles_of
from runtime.bundle.bundle import Bundle, engine_files
from runtime.bundle.manifest import Manifest
from runtime.errors import FreeExportError
from runtime.tensorrt.files import DIRECTORY, EngineFile, is_whole, read_record, record_of, sources_sha256
from runtime.tensorrt.library import architecture, import_tensorrt, logger_of
from runtime.tensorrt.plan import Plan

# Called with an engine's name, and how much of its build is done: 0 to 1.
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildOptions:
    """`max_batch` is the most sequences of a call. `timing_cache` None is a file in the bundle. `version_compatible`:
    engines that later TensorRTs of the same major version run too."""

    max_batch: int = 8
    timing_cache: Path | None = None
    version_compatible: bool = False


@dataclass(frozen=True)
class Built(EngineFile):
    """`reused`: it was there already, and up to date."""

    reused: bool = False


def build(bundle: Bundle, options: BuildOptions, report: Report = lambda engine, done: None) -> list[Built]:
    """Build the engines of a bundle that are missing or stale, into its folder `tensorrt`.

    EngineError where TensorRT is missing or too old; BuildError where it does not start, the bundle is not for it, or a
    graph is refused.
    """
    check_target(bundle.manifest)
    trt = import_tensorrt()
    directory = bundle.path / DIRECTORY
    directory.mkdir(exist_ok=True)
    workshop = Workshop(trt, options.timing_cache or directory / f"timing-{architecture()}-trt{trt.__version__}.cache")
    built = []
    for file in engine_files(bundle.manifest):
        plan = plan_of(bundle, Path(file).stem, str(trt.__version__), options)
        found = _reusable(directory, plan)
        if found is None:
            found = workshop.build(bundle, plan, directory, report)
            remove_stale(directory, plan)
        report(plan.engine, 1.0)
        built.append(found)
    return built


def check_target(manifest: Manifest) -> None:
    """BuildError for a bundle whose graphs TensorRT does not take."""
    if manifest.target != "tensorrt":
        raise BuildError(f"this bundle was converted for {manifest.target}; convert again with --target tensorrt")


def plan_of(bundle: Bundle, engine: str, version: str, options: BuildOptions) -> Plan:
    """What the file of this engine would be built from and for, here."""
    digest = sources_sha256(bundle.manifest, engine)
    profiles = profiles_of(engine, bundle.manifest, options.max_batch)
    return Plan(engine, digest, version, architecture(), profiles, options.version_compatible)


class Workshop:
    """A TensorRT builder with its log and the timing cache that its builds share."""

    def __init__(self, trt: Any, timing_cache: Path) -> None:
        self._trt, self._timing_cache = trt, timing_cache
        self._log = logger_of(trt)
        try:
            self._builder = trt.Builder(self._log)
        except TypeError:  # its constructor gave nothing
            raise BuildError(
                f"TensorRT {trt.__version__} cannot start: {self._log.reason()}; building needs an NVIDIA GPU and a "
                "driver that fits (see nvidia-smi)"
            ) from None

    def build(self, bundle: Bundle, plan: Plan, directory: Path, report: Report) -> Built:
        """One engine, written to `directory` with its plan when it is whole."""
        began = perf_counter()
        self._log.errors.clear()
        graph = bundle.engine(plan.engine)
        network, parser = parse(self._trt, self._builder, self._log, graph)
        config = self._builder.create_builder_config()
        add_profiles(self._builder, config, dimensions(graph), plan.profiles)
        monitor = monitor_of(self._trt, lambda done: report(plan.engine, done))
        config.progress_monitor = monitor
        if plan.version_compatible:
            config.set_flag(self._trt.BuilderFlag.VERSION_COMPATIBLE)
        with self._timings(config):
            serialized = self._builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if serialized is None:
            raise BuildError(f"TensorRT {plan.tensorrt} cannot build {plan.engine}.onnx: {self._log.reason()}")
        del parser, network
        data = memoryview(serialized)
        built = EngineFile(plan, data.nbytes, hashlib.sha256(data).hexdigest(), perf_counter() - began)
        _write(directory / plan.file, data)
        _write(record_of(directory / plan.file), built.to_json().encode())
        return Built(**vars(built))

    @contextmanager
    def _timings(self, config: Any) -> Iterator[None]:
        """Measurements of kernels that earlier builds made here, and those of this one for the next."""
        known = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            # Another device's, or damaged.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        yield
        _write(self._timing_cache, memoryview(cache.serialize()))


def remove_stale(directory: Path, plan: Plan) -> None:
    """Remove other engines of the same name and GPU: of other weights, shapes, or another TensorRT."""
    for path in directory.glob(f"{plan.engine}-*-{plan.architecture}-*.engine"):
        if path.name != plan.file:
            path.unlink()
            record_of(path).unlink(missing_ok=True)


def _reusable(directory: Path, plan: Plan) -> Built | None:
    path = directory / plan.file
    found = read_record(path)
    whole = found is not None and found.plan == plan and is_whole(path, found, "full")
    return Built(**vars(found), reused=True) if found is not None and whole else None


def _write(path: Path, data: memoryview | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise FreeExportError(f"{path}: {error.strerror}; free some space, or make the bundle writable") from error
    finally:
        partial.unlink(missing_ok=True)
