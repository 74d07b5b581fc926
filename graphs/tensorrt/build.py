"""Builds the TensorRT engines of a bundle that are missing or out of date."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir

from graphs.errors import BuildError
from runtime.bundle.bundle import Bundle, engine_files
from runtime.bundle.manifest import Manifest
from runtime.engines.kv_cache import CROSS_STEP
from runtime.engines.tensorrt.files import (
    DIRECTORY,
    EngineFile,
    EnginePlan,
    Profile,
    architecture,
    import_tensorrt,
    is_whole,
    logger_of,
    read_record,
    record_of,
    sources_sha256,
)
from runtime.errors import FreeExportError

MAX_BATCH = 256
# Typical prompt length, for which prefill kernels are tuned.
USUAL_PROMPT = 128


def profiles_of(engine: str, manifest: Manifest, max_batch: int) -> tuple[Profile, ...]:
    """Return an engine's optimization profiles, the most frequent first.

    Dimensions are those of the engine contract: B sequences, q or k rows each, E prompt tokens, R
    head rows.

    Args:
        engine: Name of the engine.
        manifest: Manifest of the bundle.
        max_batch: Most sequences per call.

    Raises:
        BuildError: If `max_batch` is out of range.
    """
    if not 1 <= max_batch <= MAX_BATCH:
        raise BuildError(f"max batch {max_batch} is out of range; choose 1 to {MAX_BATCH}")
    batch = {"B": (1, 1, max_batch)}
    # Sequences that share calls read arrays of one width, a multiple of CROSS_STEP.
    longest = -(-manifest.encoder_capacity // CROSS_STEP) * CROSS_STEP
    prompt = {"E": _up_to(longest)} if manifest.encoder_decoder else {}
    if engine in ("encoder", "prologue"):
        return (Profile("prompt", {**batch, **prompt}),)
    rows = "q" if engine == "shallow" else "k"
    # If nothing may exit, the shallow head computes no rows.
    decode = Profile("decode", {**batch, **prompt, rows: (1, 1, 1), "R": (0, 1, max_batch)})
    prompt_rows = {rows: _up_to(manifest.capacity), "R": (0, 1, max_batch)}
    prefill = Profile("prefill", {**batch, **prompt, **prompt_rows})
    if engine == "shallow":
        return decode, prefill
    most = manifest.max_pending
    sync_rows = {"k": (1, min(4, most), most), "R": (0, 1, most * max_batch)}
    sync = Profile("sync", {**batch, **prompt, **sync_rows})
    return decode, sync, prefill


def _up_to(limit: int) -> tuple[int, int, int]:
    return 1, min(USUAL_PROMPT, limit), limit


def parse(trt: Any, builder: Any, log: Any, graph: Path) -> tuple[Any, Any]:
    """Parse an ONNX file. Returns its network and the parser.

    Raises:
        BuildError: If the parser rejects nodes. The message lists them.
    """
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refused = [
            f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'}): "
            f"{' '.join(error.desc().split())[:300]}"
            for error in errors
        ]
        raise BuildError(
            f"TensorRT {trt.__version__} cannot parse {graph.name}: "
            f"{'; '.join(refused) or 'no reason given'}; "
            "convert with --target tensorrt, or use a newer TensorRT"
        )
    # The parser owns weights that the network refers to.
    return network, parser


def dimensions(graph: Path) -> dict[str, list[int | str]]:
    """Return the shape of each input of an ONNX file. Free dimensions are names."""
    shapes = {}
    for value in ir.load(graph).graph.inputs:
        sizes = value.shape or ()
        shapes[str(value.name)] = [
            size if isinstance(size, int) else str(size.value) for size in sizes
        ]
    return shapes


class Phases:
    """Progress of a build from its nested phases, as a fraction that never decreases."""

    def __init__(self) -> None:
        self._parents: dict[str, str | None] = {}
        self._steps: dict[str, tuple[int, int]] = {}  # done, total
        self._reached = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._parents[name] = parent
        self._steps[name] = (0, max(1, steps))

    def step(self, name: str, step: int) -> float:
        if name in self._steps:
            done, steps = self._steps[name]
            self._steps[name] = max(done, min(steps, step + 1)), steps
        roots = [
            self._done(name)
            for name, parent in self._parents.items()
            if parent not in self._parents
        ]
        self._reached = max([self._reached, *roots])
        return self._reached

    def finish(self, name: str) -> float:
        self._parents.pop(name, None)
        if not self._parents:
            self._reached = 1.0
        return self._reached

    def _done(self, name: str) -> float:
        """Return the fraction of a phase that is done, including its children's part of the current
        step.
        """
        inner = [self._done(child) for child, parent in self._parents.items() if parent == name]
        done, steps = self._steps[name]
        return min(1.0, (done + max(inner, default=0.0)) / steps)


def monitor_of(trt: Any, report: Callable[[float], None]) -> Any:
    """Return a progress monitor that calls `report` with the fraction of the build that is done.

    An exception of `report`, such as an interrupt, stops the build and is kept as `error`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._phases = Phases()
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(lambda: self._phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            self._tell(lambda: self._phases.finish(phase_name))

        def _tell(self, change: Callable[[], float]) -> bool:
            # An exception must not pass through TensorRT's own frames.
            try:
                with self._lock:
                    report(change())
            except BaseException as error:
                self.error = self.error or error
            return self.error is None

    return Monitor()


# Receives the name of an engine and the fraction of its build that is done, 0 to 1.
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True)
class Built(EngineFile):
    """An engine file.

    Attributes:
        reused: The file existed and was up to date.
    """

    reused: bool = False


def build(
    bundle: Bundle, max_batch: int, report: OnProgress = lambda engine, done: None
) -> list[Built]:
    """Build the engines of a bundle that are missing or out of date, in its folder `tensorrt`.

    Args:
        bundle: A bundle converted with target tensorrt.
        max_batch: Most sequences per call.
        report: Called with the name of an engine and the fraction of its build that is done.

    Raises:
        EngineError: If TensorRT is missing or too old.
        BuildError: If TensorRT does not start, the bundle has another target, or a graph is
            rejected.
    """
    manifest = bundle.manifest
    if manifest.target != "tensorrt":
        raise BuildError(
            f"this bundle was converted for {manifest.target}; convert again with --target tensorrt"
        )
    trt = import_tensorrt()
    log = logger_of(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # the constructor returned nothing
        raise BuildError(
            f"TensorRT {trt.__version__} cannot start: {log.reason()}; "
            "building needs an NVIDIA GPU and a matching driver (see nvidia-smi)"
        ) from None
    directory = bundle.path / DIRECTORY
    directory.mkdir(exist_ok=True)
    timings = directory / f"timing-{architecture()}-trt{trt.__version__}.cache"
    built = []
    for engine in (Path(file).stem for file in engine_files(manifest)):
        sources = sources_sha256(manifest, engine)
        profiles = profiles_of(engine, manifest, max_batch)
        plan = EnginePlan(engine, sources, str(trt.__version__), architecture(), profiles)
        path = directory / plan.file
        found = read_record(path)
        if found is not None and found.plan == plan and is_whole(path, found, "full"):
            built.append(Built(**vars(found), reused=True))
        else:
            built.append(
                _build(trt, builder, log, bundle.engine(engine), path, plan, timings, report)
            )
            # Remove engines of other weights, shapes or TensorRT versions.
            for other in directory.glob(f"{engine}-*-{plan.architecture}-*.engine"):
                if other != path:
                    other.unlink()
                    record_of(other).unlink(missing_ok=True)
        report(engine, 1.0)
    return built


def _build(
    trt: Any,
    builder: Any,
    log: Any,
    graph: Path,
    path: Path,
    plan: EnginePlan,
    timings: Path,
    report: OnProgress,
) -> Built:
    """Write one engine to `path`, then its record."""
    began = perf_counter()
    log.errors.clear()
    network, parser = parse(trt, builder, log, graph)
    config = builder.create_builder_config()
    for profile in plan.profiles:
        added = builder.create_optimization_profile()
        for name, shape in dimensions(graph).items():
            # Smallest, typical and largest size of each dimension.
            sizes = [
                profile.ranges[size] if isinstance(size, str) else (size,) * 3 for size in shape
            ]
            least, usual, most = ([size[which] for size in sizes] for which in range(3))
            added.set_shape(name, least, usual, most)
        config.add_optimization_profile(added)
    monitor = monitor_of(trt, lambda done: report(plan.engine, done))
    config.progress_monitor = monitor
    # Reuse kernel timings of earlier builds on this machine.
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")  # another device's, or damaged
        config.set_timing_cache(cache, False)
    serialized = builder.build_serialized_network(network, config)
    _write(timings, memoryview(cache.serialize()))
    if monitor.error is not None:
        raise monitor.error
    if serialized is None:
        raise BuildError(
            f"TensorRT {plan.tensorrt} cannot build {plan.engine}.onnx: {log.reason()}"
        )
    del parser, network
    data = memoryview(serialized)
    built = EngineFile(plan, data.nbytes, hashlib.sha256(data).hexdigest(), perf_counter() - began)
    _write(path, data)
    _write(record_of(path), built.to_json().encode())
    return Built(**vars(built))


def _write(path: Path, data: memoryview | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise FreeExportError(
            f"{path}: {error.strerror}; free some space, or make the bundle writable"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
