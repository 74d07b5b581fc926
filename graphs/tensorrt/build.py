"""TensorRT engines of a bundle: built where they are missing or stale, each beside what it was built from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from graphs.errors import BuildError
from graphs.tensorrt.environment import architecture, import_tensorrt
from graphs.tensorrt.monitor import monitor_of
from graphs.tensorrt.network import add_profiles, dimensions, logger_of, parse
from graphs.tensorrt.profiles import profiles_of
from runtime.bundle import Bundle, engine_files, sha256_of
from runtime.errors import FreeExportError
from runtime.manifest import Manifest
from runtime.tensorrt_plan import Plan

DIRECTORY = "tensorrt"
# Called with an engine's name, and how much of its build is done: 0 to 1.
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildOptions:
    """`max_batch` is the most sequences of a call. `timing_cache` None is a file in the bundle."""

    max_batch: int = 8
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """An engine file: its size in bytes, whether it was there already, and the seconds its build took."""

    plan: Plan
    bytes: int
    sha256: str
    reused: bool
    seconds: float


def build(bundle: Bundle, options: BuildOptions, report: Report = lambda engine, done: None) -> list[Built]:
    """Build the engines of a bundle that are missing or stale, into its folder `tensorrt`.

    BuildError where TensorRT cannot be used, or the bundle is not for it, or a graph is refused.
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
    files = bundle.manifest.files
    sources = [files[name].sha256 for name in sorted(files) if name == f"{engine}.onnx" or name.endswith(".data")]
    digest = hashlib.sha256("".join(sources).encode()).hexdigest()
    profiles = profiles_of(engine, bundle.manifest, options.max_batch)
    return Plan(engine, digest, version, architecture(), profiles)


class Workshop:
    """A TensorRT builder with its log and the timing cache that its builds share."""

    def __init__(self, trt: Any, timing_cache: Path) -> None:
        self._trt, self._timing_cache = trt, timing_cache
        self._log = logger_of(trt)
        try:
            self._builder = trt.Builder(self._log)
        except TypeError:  # its constructor gave nothing
            raise BuildError(
                f"TensorRT {trt.__version__} cannot start: {self._reason()}; building needs an NVIDIA GPU and a driver "
                "that fits (see nvidia-smi)"
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
        with self._timings(config):
            serialized = self._builder.build_serialized_network(network, config)
        if monitor.error is not None:
            raise monitor.error
        if serialized is None:
            raise BuildError(f"TensorRT {plan.tensorrt} cannot build {plan.engine}.onnx: {self._reason()}")
        del parser, network
        data = memoryview(serialized)
        built = Built(plan, data.nbytes, hashlib.sha256(data).hexdigest(), False, perf_counter() - began)
        _write(directory / plan.file, data)
        _write(_record_of(directory / plan.file), _record(built).encode())
        return built

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

    def _reason(self) -> str:
        return self._log.errors[-1][:600] if self._log.errors else "no reason given"


def remove_stale(directory: Path, plan: Plan) -> None:
    """Remove other engines of the same name and GPU: of other weights, shapes, or another TensorRT."""
    for path in directory.glob(f"{plan.engine}-*-{plan.architecture}-*.engine"):
        if path.name != plan.file:
            path.unlink()
            _record_of(path).unlink(missing_ok=True)


def _reusable(directory: Path, plan: Plan) -> Built | None:
    path = directory / plan.file
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
        if path.stat().st_size != record["bytes"] or sha256_of(path) != record["sha256"]:
            return None
        return Built(plan, record["bytes"], record["sha256"], True, record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(built: Built) -> str:
    content = {**dataclasses.asdict(built.plan), "bytes": built.bytes, "sha256": built.sha256, "seconds": built.seconds}
    return json.dumps(content, indent=2) + "\n"


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write(path: Path, data: memoryview | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise FreeExportError(f"{path}: {error.strerror}; free some space, or make the bundle writable") from error
    finally:
        partial.unlink(missing_ok=True)
