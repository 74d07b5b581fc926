"""Compares TensorRT engines with their graphs after a build, on the GPU where they will run.

The graphs run in fp32 on the CPU: once unchanged, and once with every operator's result rounded to
the type in which the engines compute. The type explains the difference between these two. An engine
may differ by TOLERANCE times as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from graphs.errors import BuildError
from graphs.tensorrt.build import dimensions
from graphs.widen import fp32_copy
from runtime.bundle.bundle import Bundle, engine_files
from runtime.engines.cuda.driver import Cuda, CudaStream
from runtime.engines.onnx import OnnxEngine
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.files import record_of
from runtime.errors import DeviceError
from runtime.machine.machine import usable_cores

# ONNX Runtime's fp16 differs from fp32 by 0.4 to 1.2 times as much as rounding every result does,
# by RMS (18 small checkpoints, tests/graphs/test_widen.py): kernels fuse and add in another order.
TOLERANCE = 3.0
# Relative error that rounding always explains, for outputs that it happens not to change.
LEAST = {"fp16": 2.0**-11, "bf16": 2.0**-8}
# Outputs computed from the logits.
_HEADS = {"confidence", "nll"}
# Length of the test prompt, in tokens.
PROMPT = 32

Arrays = dict[str, Any]


@dataclass(frozen=True)
class SelfTest:
    """Result of a self-test.

    Attributes:
        largest: Largest difference between each engine and its graph, as a multiple of what
            rounding explains. Empty if the test did not run.
        why: Why it did not run.
    """

    largest: dict[str, float]
    why: str = ""

    @property
    def ran(self) -> bool:
        return not self.why


def self_test(bundle: Bundle, files: Mapping[str, Path], max_batch: int) -> SelfTest:
    """Compare each engine with its graph, in all profiles, for one and for `max_batch` sequences.

    The test does not run without a CUDA device.

    Args:
        bundle: The bundle.
        files: Engine files by name.
        max_batch: Most sequences per call.

    Raises:
        BuildError: If an output differs by more than TOLERANCE. The engine file is removed.
    """
    try:
        cuda = Cuda(0)
    except DeviceError as error:
        return SelfTest({}, f"there is no GPU to run on ({error})")
    largest: dict[str, float] = {}
    try:
        with fp32_copy(bundle, rounds=False) as exact, fp32_copy(bundle, rounds=True) as rounded:
            stream = cuda.stream(urgent=True)
            for name in (Path(file).stem for file in engine_files(bundle.manifest)):
                engine = TensorRTEngine(files[name], stream)
                graphs = [
                    OnnxEngine(copy.engine(name), usable_cores()) for copy in (exact, rounded)
                ]
                for batch in sorted({1, max_batch}):
                    found = _compare(bundle, engine, graphs, batch, stream)
                    largest[name] = max(found, largest.get(name, 0.0))
                    if found > TOLERANCE:
                        for path in (files[name], record_of(files[name])):
                            path.unlink(missing_ok=True)
                        raise BuildError(
                            f"self-test: the TensorRT engine {name} differs from {name}.onnx by "
                            f"{found:.3g} times what {bundle.manifest.float_type} explains in "
                            f"calls of {batch} sequences (limit {TOLERANCE:g}), and was removed; "
                            "build with another TensorRT, or convert with another --precision"
                        )
    finally:
        cuda.close()
    return SelfTest(largest)


def _compare(
    bundle: Bundle, engine: TensorRTEngine, graphs: list[OnnxEngine], batch: int, stream: CudaStream
) -> float:
    """Run a prompt and then steps through an engine and its two graphs.

    Returns the difference between the engine and the first graph, as a multiple of the graphs'
    difference.
    """
    shapes = dimensions(bundle.engine(engine.name))
    manifest = bundle.manifest
    differences = _Differences(LEAST[manifest.float_type])
    rows = manifest.capacity + manifest.max_pending
    cache = {
        name: (batch, manifest.kv_heads, rows, manifest.head_dim)
        for name in shapes
        if name.startswith("past.")
    }
    hosts: list[Arrays] = [
        {name: np.zeros(shape, np.float32) for name, shape in cache.items()} for _ in graphs
    ]
    past = {
        name: stream.cuda.zeros(shape, engine.dtype(name), stream) for name, shape in cache.items()
    }
    present = {name.replace("past", "present"): array for name, array in past.items()}
    length = 0
    random = np.random.default_rng(0)
    for profile in sorted(engine.plan.profiles, key=lambda profile: profile.name != "prefill"):
        sizes = {name: min(usual, PROMPT) for name, (_, usual, _) in profile.ranges.items()}
        sizes["B"] = batch
        sizes["R"] = batch
        axis = next(name for name in ("q", "k", "E") if name in sizes)
        if profile.name == "prefill":  # leave room for the steps
            sizes[axis] = min(sizes[axis], max(1, manifest.capacity - 2))
        width = sizes[axis]
        integers = {
            "lengths": np.full(batch, width, np.int32),
            "query_lengths": np.full(batch, width, np.int32),
            "exit_lengths": np.full(batch, width, np.int32),
            "past_lengths": np.full(batch, length, np.int32),
            "cross_lengths": np.full(batch, sizes.get("E", 1), np.int32),
            "head_rows": np.arange(batch) * width + width - 1,  # the last of each sequence
            "emitted": np.zeros(batch, np.int64),
            "input_ids": random.integers(0, manifest.vocab_size, (batch, width)),
        }
        inputs: Arrays = {name: array for name, array in integers.items() if name in shapes}
        for name in sorted(shapes.keys() - integers.keys() - cache.keys()):
            shape = [size if isinstance(size, int) else sizes[size] for size in shapes[name]]
            numbers = random.standard_normal(shape, np.float32)
            inputs[name] = _as_float(_as(numbers, engine.dtype(name)))
        exact, rounded = (
            _run(graph, inputs, host, sizes) for graph, host in zip(graphs, hosts, strict=True)
        )
        given = {name: _as(array, engine.dtype(name)) for name, array in inputs.items()}
        ours = {name: np.zeros(array.shape, engine.dtype(name)) for name, array in exact.items()}
        engine.bind({**given, **past}, {**ours, **present}).run()
        differences.add(exact, rounded, {name: _as_float(array) for name, array in ours.items()})
        length += width
    return differences.farthest()


def _run(graph: OnnxEngine, inputs: Arrays, cache: Arrays, sizes: Mapping[str, int]) -> Arrays:
    """Run a graph and extend its cache.

    Tokens are left out, because either of two nearly equal ones may be chosen. Their logits are
    compared.
    """
    outputs = {
        name: np.zeros([sizes.get(size, size) for size in shape], np.float32)
        for name, shape in graph.output_shapes.items()
        if name != "token" and not name.startswith("present.")
    }
    present = {name.replace("past", "present"): array for name, array in cache.items()}
    graph.bind({**inputs, **cache}, {**outputs, **present}).run()
    return outputs


class _Differences:
    """Accumulated error of an engine's calls. A single call has too few numbers.

    Args:
        least: Relative error that rounding always explains.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        # Sums of squares by output: the engine's difference, rounding's, and the output.
        self._sums: dict[str, np.ndarray] = {}
        self._step = 1e-6
        self._heads = 0.0
        self._finite = True

    def add(self, exact: Arrays, rounded: Arrays, ours: Arrays) -> None:
        self._finite = self._finite and all(np.isfinite(array).all() for array in ours.values())
        for name in exact.keys() - _HEADS:
            apart = exact[name] - ours[name], exact[name] - rounded[name], exact[name]
            squares = np.array([np.square(array, dtype=np.float64).sum() for array in apart])
            self._sums[name] = self._sums.get(name, 0) + squares
        if "logits" in exact:
            # One number per row is too few for an RMS. It changes less than twice as much as a
            # logit.
            by = np.abs(exact["logits"] - rounded["logits"]).max()
            self._step = max(self._step, by, self._least * np.abs(exact["logits"]).max())
            for name in _HEADS & exact.keys():
                self._heads = max(self._heads, np.abs(exact[name] - ours[name]).max())

    def farthest(self) -> float:
        """Return the largest difference (RMS) as a multiple of what rounding explains."""
        if not self._finite:
            return float("inf")
        found = [self._heads / (2 * self._step)]
        for ours, rounding, whole in self._sums.values():
            found.append(float(np.sqrt(ours / max(rounding, self._least**2 * whole, 1e-12))))
        return max(found)


def _as(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert float32 to an engine's type. bfloat16 is stored as uint16. Other arrays are
    unchanged.
    """
    if array.dtype != np.float32 or dtype == np.float32:
        return array
    if dtype == np.uint16:
        return array.astype(ml_dtypes.bfloat16).view(np.uint16)
    return array.astype(dtype)


def _as_float(array: np.ndarray) -> np.ndarray:
    half = array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
    return half.astype(np.float32)
