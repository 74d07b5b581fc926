"""After a build: the engines against the graphs that they were built from, on the GPU where they will run.

The graphs run in fp32 on the CPU, once as they are and once with every operator's result rounded to the type that the
engines compute in. How far these two are apart is what that type explains; an engine may be TOLERANCE times as far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from graphs.errors import BuildError
from graphs.rewrites.widen import fp32_copy
from runtime.bundle.bundle import Bundle, engine_files
from runtime.cuda.driver import Cuda, Stream
from runtime.engines.kv_cache import PARTS
from runtime.engines.onnx import OnnxEngine
from runtime.errors import DeviceError
from runtime.machine.machine import usable_cores
from runtime.tensorrt.engine import TensorRTEngine
from runtime.tensorrt.files import record_of

# Another implementation of fp16, ONNX Runtime's, is 0.4 to 1.2 times as far from fp32 as rounding every result is, by
# root mean square (18 small checkpoints; tests/graphs/rewrites/test_widen.py): kernels add in another order, and fuse.
TOLERANCE = 3.0
# What rounding explains at least, as a share of an output: where it happens to change nothing.
LEAST = {"fp16": 2.0**-11, "bf16": 2.0**-8}
# Outputs that are computed from the logits.
_HEADS = {"confidence", "nll"}
# Tokens of the prompt that is read.
PROMPT = 32

Arrays = dict[str, Any]
# Shape and type of each output that is compared.
Outputs = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SelfTest:
    """`largest` maps each engine to the largest difference of an output from the graph's, as a multiple of what
    rounding explains. It is empty where the test was not run, and `why` says why not."""

    largest: dict[str, float]
    why: str = ""

    @property
    def ran(self) -> bool:
        return not self.why


def self_test(bundle: Bundle, files: Mapping[str, Path], max_batch: int, cuda: Cuda | None = None) -> SelfTest:
    """Run each engine's file with calls of one sequence and of `max_batch`, in all profiles, and compare. Not run where
    there is no CUDA device.

    BuildError where an output differs by more than TOLERANCE; then the file is removed.
    """
    try:
        cuda = cuda or Cuda(0)
    except DeviceError as error:
        return SelfTest({}, f"there is no GPU to run on ({error})")
    try:
        with fp32_copy(bundle, rounds=False) as exact, fp32_copy(bundle, rounds=True) as rounded:
            return _compare_all(bundle, (exact, rounded), files, max_batch, cuda)
    finally:
        cuda.close()


def _compare_all(
    bundle: Bundle, copies: tuple[Bundle, Bundle], files: Mapping[str, Path], max_batch: int, cuda: Cuda
) -> SelfTest:
    stream = cuda.stream(urgent=True)
    largest: dict[str, float] = {}
    for batch in sorted({1, max_batch}):
        inputs: Arrays = {}
        for name in (Path(file).stem for file in engine_files(bundle.manifest)):
            trio = _Trio(bundle, copies, TensorRTEngine(files[name], stream), batch, stream)
            _RUNS[name](trio, inputs)
            largest[name] = max(trio.differences.farthest(), largest.get(name, 0.0))
            if largest[name] > TOLERANCE:
                _remove(files[name])
                raise BuildError(
                    f"self-test: the TensorRT engine {name} differs from {name}.onnx by {largest[name]:.3g} times what "
                    f"{bundle.manifest.float_type} explains in calls of {batch} sequences, allowed are "
                    f"{TOLERANCE:g}; it was removed: build with another TensorRT, or convert with another --precision"
                )
    return SelfTest(largest)


class _Trio:
    """An engine, and its graph twice, with caches of their own, over `batch` sequences."""

    def __init__(
        self, bundle: Bundle, copies: tuple[Bundle, Bundle], ours: TensorRTEngine, batch: int, stream: Stream
    ) -> None:
        self.manifest = manifest = bundle.manifest
        self.batch = batch
        self._ours = ours
        self.differences = _Differences(LEAST[manifest.float_type])
        self._graphs = [OnnxEngine(copy.engine(ours.name), usable_cores()) for copy in copies]
        self._random = np.random.default_rng(0)
        self._lengths = np.zeros(batch, np.int32)
        layers = {"shallow": manifest.shallow_layers, "deep": manifest.deep_layers}.get(ours.name, range(0))
        names = [f"{layer}.{part}" for layer in layers for part in PARTS]
        shape = batch, manifest.kv_heads, manifest.capacity + manifest.max_pending, manifest.head_dim
        self._hosts = [{name: np.zeros(shape, np.float32) for name in names} for _ in copies]
        self._device = {name: stream.cuda.zeros(shape, ours.dtype(f"past.{name}"), stream) for name in names}

    def tokens(self, count: int) -> np.ndarray:
        return self._random.integers(0, self.manifest.vocab_size, (self.batch, count))

    def compare(self, inputs: Arrays, shapes: Outputs) -> Arrays:
        """A call of all three: what the graph gave, as the engine takes it."""
        exact, rounded = (
            self._run(graph, inputs, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, cache)
            for graph, cache in zip(self._graphs, self._hosts, strict=True)
        )
        given = {name: _as(array, self._ours.dtype(name)) for name, array in inputs.items()}
        places = {name: np.zeros(shape, self._ours.dtype(name)) for name, shape in shapes.items()}
        ours = self._run(self._ours, given, places, self._device)
        self.differences.add(exact, rounded, {name: _as_float(array) for name, array in ours.items()})
        return {name: _as_float(_as(array, self._ours.dtype(name))) for name, array in exact.items()}

    def decode(self, rows: Arrays, width: int, shapes: Outputs, cross: Arrays) -> Arrays:
        """A call of a decoder for `width` rows of each sequence, the head for the last of them."""
        batch = self.batch
        inputs = {
            **rows,
            **cross,
            "query_lengths": np.full(batch, width, np.int32),
            "head_rows": np.arange(batch) * width + width - 1,
        }
        # Tokens are not compared: where two are nearly equal, either may be chosen. Their logits are.
        heads = {"confidence": (batch,), "logits": (batch, self.manifest.vocab_size)}
        given = self.compare(inputs, {**shapes, **heads})
        self._lengths += width
        return given

    def _run(self, engine: Any, inputs: Arrays, outputs: Arrays, cache: Arrays) -> Arrays:
        past = {f"past.{name}": array for name, array in cache.items()}
        present = {f"present.{name}": array for name, array in cache.items()}
        lengths = {"past_lengths": self._lengths} if past else {}
        engine.bind({**inputs, **lengths, **past}, {**outputs, **present}).run()
        return outputs


class _Differences:
    """The error of all calls of an engine together, as one alone has few numbers. `least` is what rounding explains at
    least."""

    def __init__(self, least: float) -> None:
        self._least = least
        # Of each output: sums of squares of the engine's difference, of rounding's, and of the output.
        self._sums: dict[str, np.ndarray] = {}
        self._step, self._heads, self._finite = 1e-6, 0.0, True

    def add(self, exact: Arrays, rounded: Arrays, ours: Arrays) -> None:
        self._finite = self._finite and all(np.isfinite(array).all() for array in ours.values())
        for name in exact.keys() - _HEADS:
            squares = (np.square(array, dtype=np.float64).sum() for array in _apart(exact, rounded, ours, name))
            self._sums[name] = self._sums.get(name, 0) + np.array(list(squares))
        if "logits" in exact:
            # One number a row is too few for a root mean square. It moves by less than twice what a logit does.
            by = np.abs(exact["logits"] - rounded["logits"]).max()
            self._step = max(self._step, by, self._least * np.abs(exact["logits"]).max())
            self._heads = max([self._heads, *(np.abs(exact[n] - ours[n]).max() for n in _HEADS & exact.keys())])

    def farthest(self) -> float:
        """The largest difference as a multiple of what rounding explains, by root mean square."""
        if not self._finite:
            return float("inf")
        found = [self._heads / (2 * self._step)]
        for ours, rounding, whole in self._sums.values():
            found.append(float(np.sqrt(ours / max(rounding, self._least**2 * whole, 1e-12))))
        return max(found)


def _apart(exact: Arrays, rounded: Arrays, ours: Arrays, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return exact[name] - ours[name], exact[name] - rounded[name], exact[name]


def _as(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A floating array in the type of an engine, which has bfloat16 as uint16; others as they are."""
    if array.dtype != np.float32 or dtype == np.float32:
        return array
    return array.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else array.astype(dtype)


def _as_float(array: np.ndarray) -> np.ndarray:
    half = array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
    return half.astype(np.float32)


def _widths(trio: _Trio) -> tuple[int, int, int]:
    """A prompt, a step, and a sync pass."""
    manifest = trio.manifest
    return max(1, min(PROMPT, manifest.capacity - 2)), 1, min(manifest.max_pending, max(1, manifest.capacity - PROMPT))


def _encoder(trio: _Trio, inputs: Arrays) -> None:
    manifest = trio.manifest
    tokens = trio.tokens(min(PROMPT, manifest.encoder_capacity))
    lengths = np.full(trio.batch, tokens.shape[1], np.int32)
    shape = (*tokens.shape, manifest.hidden_size)
    given = trio.compare({"input_ids": tokens, "lengths": lengths}, {"hidden": shape})
    inputs |= {"encoded": given["hidden"], "cross_lengths": lengths}


def _prologue(trio: _Trio, inputs: Arrays) -> None:
    manifest, encoded = trio.manifest, inputs.pop("encoded")
    # T5 has as many heads for keys and values as for queries.
    shape = trio.batch, manifest.kv_heads, encoded.shape[1], manifest.head_dim
    names = [f"cross.{layer}.{part}" for layer in range(manifest.layers) for part in PARTS]
    inputs |= trio.compare({"hidden": encoded}, dict.fromkeys(names, shape))


def _shallow(trio: _Trio, inputs: Arrays) -> None:
    inputs["hidden"] = []
    cross = _cross(inputs, trio.manifest.shallow_layers)
    for width in _widths(trio):
        tokens = trio.tokens(width)
        shape = (*tokens.shape, trio.manifest.hidden_size)
        given = trio.decode({"input_ids": tokens}, width, {"hidden": shape}, cross)
        inputs["hidden"].append(given["hidden"])


def _deep(trio: _Trio, inputs: Arrays) -> None:
    cross = _cross(inputs, trio.manifest.deep_layers)
    for hidden in inputs["hidden"]:
        rows = {"hidden": hidden, "emitted": np.zeros(trio.batch, np.int64)}
        trio.decode(rows, hidden.shape[1], {"nll": (trio.batch,)}, cross)


_RUNS: dict[str, Callable[[_Trio, Arrays], None]] = {
    "encoder": _encoder,
    "prologue": _prologue,
    "shallow": _shallow,
    "deep": _deep,
}


def _cross(inputs: Arrays, layers: range) -> Arrays:
    names = {f"cross.{layer}.{part}" for layer in layers for part in PARTS} | {"cross_lengths"}
    return {name: array for name, array in inputs.items() if name in names}


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    record_of(path).unlink(missing_ok=True)
