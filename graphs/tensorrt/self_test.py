"""After a build: the engines against the graphs that they were built from, on the GPU where they will run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs.errors import BuildError
from runtime.bundle import Bundle, engine_files
from runtime.cuda import Cuda, Stream
from runtime.engines.onnx import OnnxEngine
from runtime.engines.tensorrt import TensorRTEngine
from runtime.errors import DeviceError
from runtime.kv_cache import PARTS
from runtime.machine import usable_cores
from runtime.tensorrt_files import record_of

# Largest difference of an output, as a share of its largest value: kernels add up in another order, and round between.
TOLERANCE = 0.03
# Tokens of the prompt that is read.
PROMPT = 32

Arrays = dict[str, Any]


@dataclass(frozen=True)
class SelfTest:
    """`largest` maps each engine to the largest difference of an output, as a share of the output's largest value. It
    is empty where the test was not run, and `why` says why not."""

    largest: dict[str, float]
    why: str = ""

    @property
    def ran(self) -> bool:
        return not self.why


def self_test(bundle: Bundle, files: Mapping[str, Path], max_batch: int, cuda: Cuda | None = None) -> SelfTest:
    """Run each engine's file with calls of one sequence and of `max_batch`, in all profiles, and compare. Not run where
    there is no CUDA device, or nothing runs the graphs.

    BuildError where an output differs by more than TOLERANCE; then the file is removed.
    """
    if bundle.manifest.precision == "bf16":
        return SelfTest({}, "ONNX Runtime's CPU provider, which it is compared with, has no bf16")
    try:
        cuda = cuda or Cuda(0)
    except DeviceError as error:
        return SelfTest({}, f"there is no GPU to run on ({error})")
    try:
        return _compare_all(bundle, files, max_batch, cuda)
    finally:
        cuda.close()


def _compare_all(bundle: Bundle, files: Mapping[str, Path], max_batch: int, cuda: Cuda) -> SelfTest:
    stream = cuda.stream(urgent=True)
    largest: dict[str, float] = {}
    for batch in sorted({1, max_batch}):
        inputs: Arrays = {}
        for name in (Path(file).stem for file in engine_files(bundle.manifest)):
            pair = _Pair(bundle, TensorRTEngine(files[name], stream), batch, stream)
            largest[name] = max(_RUNS[name](pair, inputs), largest.get(name, 0.0))
            if largest[name] > TOLERANCE:
                _remove(files[name])
                raise BuildError(
                    f"self-test: the TensorRT engine {name} differs from {name}.onnx by {largest[name]:.3g} of the "
                    f"largest value in a call of {batch} sequences, allowed is {TOLERANCE}; it was removed: build with "
                    "another TensorRT, or convert with another --precision"
                )
    return SelfTest(largest)


class _Pair:
    """An engine and its graph, with caches of their own, over `batch` sequences."""

    def __init__(self, bundle: Bundle, ours: TensorRTEngine, batch: int, stream: Stream) -> None:
        self.manifest = manifest = bundle.manifest
        self.batch = batch
        self._engines: tuple[Any, Any] = OnnxEngine(bundle.engine(ours.name), usable_cores()), ours
        self._random = np.random.default_rng(0)
        self._lengths = np.zeros(batch, np.int32)
        layers = {"shallow": manifest.shallow_layers, "deep": manifest.deep_layers}.get(ours.name, range(0))
        names = [f"{layer}.{part}" for layer in layers for part in PARTS]
        shape = batch, manifest.kv_heads, manifest.capacity + manifest.max_pending, manifest.head_dim
        self._caches: tuple[Arrays, Arrays] = (
            {name: np.zeros(shape, np.float16) for name in names},
            {name: stream.cuda.zeros(shape, np.float16, stream) for name in names},
        )

    def tokens(self, count: int) -> np.ndarray:
        return self._random.integers(0, self.manifest.vocab_size, (self.batch, count))

    def compare(self, inputs: Arrays, outputs: Arrays) -> tuple[float, Arrays]:
        """The largest difference, and what the graph gave. `outputs` are arrays to fill."""
        copies = {name: array.copy() for name, array in outputs.items()}
        for engine, cache, given in zip(self._engines, self._caches, (outputs, copies), strict=True):
            past = {f"past.{name}": array for name, array in cache.items()}
            present = {f"present.{name}": array for name, array in cache.items()}
            lengths = {"past_lengths": self._lengths} if past else {}
            engine.bind({**inputs, **lengths, **past}, {**given, **present}).run()
        return max(_difference(outputs[name], copies[name]) for name in outputs), outputs

    def decode(self, rows: Arrays, width: int, outputs: Arrays, cross: Arrays) -> tuple[float, Arrays]:
        """A call of a decoder for `width` rows of each sequence, the head for the last of them."""
        batch, vocabulary = self.batch, self.manifest.vocab_size
        inputs = {
            **rows,
            **cross,
            "query_lengths": np.full(batch, width, np.int32),
            "head_rows": np.arange(batch) * width + width - 1,
        }
        # Tokens are not compared: where two are nearly equal, either may be chosen. Their logits are.
        head = {"confidence": np.zeros(batch, np.float32), "logits": np.zeros((batch, vocabulary), np.float32)}
        found, given = self.compare(inputs, {**outputs, **head})
        self._lengths += width
        return found, given


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    a, b = theirs.astype(np.float32), ours.astype(np.float32)
    if not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0) / max(float(np.abs(a).max(initial=0.0)), 1e-6))


def _widths(pair: _Pair) -> tuple[int, int, int]:
    """A prompt, a step, and a sync pass."""
    manifest = pair.manifest
    return max(1, min(PROMPT, manifest.capacity - 2)), 1, min(manifest.max_pending, max(1, manifest.capacity - PROMPT))


def _encoder(pair: _Pair, inputs: Arrays) -> float:
    manifest = pair.manifest
    tokens = pair.tokens(min(PROMPT, manifest.encoder_capacity))
    lengths = np.full(pair.batch, tokens.shape[1], np.int32)
    hidden = np.zeros((*tokens.shape, manifest.hidden_size), np.float16)
    found, given = pair.compare({"input_ids": tokens, "lengths": lengths}, {"hidden": hidden})
    inputs |= {"encoded": given["hidden"], "cross_lengths": lengths}
    return found


def _prologue(pair: _Pair, inputs: Arrays) -> float:
    manifest, encoded = pair.manifest, inputs.pop("encoded")
    # T5 has as many heads for keys and values as for queries.
    shape = pair.batch, manifest.kv_heads, encoded.shape[1], manifest.head_dim
    names = [f"cross.{layer}.{part}" for layer in range(manifest.layers) for part in PARTS]
    found, given = pair.compare({"hidden": encoded}, {name: np.zeros(shape, np.float16) for name in names})
    inputs |= given
    return found


def _shallow(pair: _Pair, inputs: Arrays) -> float:
    largest, hidden = 0.0, []
    cross = _cross(inputs, pair.manifest.shallow_layers)
    for width in _widths(pair):
        tokens = pair.tokens(width)
        array = np.zeros((*tokens.shape, pair.manifest.hidden_size), np.float32)
        found, given = pair.decode({"input_ids": tokens}, width, {"hidden": array}, cross)
        largest = max(largest, found)
        hidden.append(given["hidden"])
    inputs["hidden"] = hidden
    return largest


def _deep(pair: _Pair, inputs: Arrays) -> float:
    largest, cross = 0.0, _cross(inputs, pair.manifest.deep_layers)
    for hidden in inputs["hidden"]:
        rows = {"hidden": hidden, "emitted": np.zeros(pair.batch, np.int64)}
        found, _ = pair.decode(rows, hidden.shape[1], {"nll": np.zeros(pair.batch, np.float32)}, cross)
        largest = max(largest, found)
    return largest


_RUNS: dict[str, Callable[[_Pair, Arrays], float]] = {
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
