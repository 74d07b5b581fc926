"""Calls of TensorRT engines on the fakes: what ONNX Runtime gives on the same graphs, and nothing undefined."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoints import BY_NAME, Bundles
from fake_cuda import FakeCuda
from fake_tensorrt import _Context, fake_tensorrt

from graphs.tensorrt.build import build
from runtime.bundle.bundle import Bundle
from runtime.engines.cuda.device_array import DeviceArray
from runtime.engines.cuda.driver import Cuda, CudaStream
from runtime.engines.onnx import OnnxEngine
from runtime.engines.tensorrt.engine import RUNS_BEFORE_CAPTURE, TensorRTEngine
from runtime.engines.tensorrt.files import DIRECTORY, record_of
from runtime.errors import CapacityError, DeviceError, EngineError

LLAMA = BY_NAME["llama-tied"]


class Gpu(NamedTuple):
    fake: FakeCuda
    cuda: Cuda
    stream: CudaStream
    trt: ModuleType
    bundle: Bundle

    def engine(self, name: str, captures: bool = False) -> TensorRTEngine:
        (path,) = (self.bundle.path / DIRECTORY).glob(f"{name}-*.engine")
        return TensorRTEngine(path, self.stream, captures)


@pytest.fixture(params=[0, 1])
def gpu(copied: Bundles, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """A bundle whose engines are built, with a device that lags by chance."""
    fake = FakeCuda(request.param)
    trt = fake_tensorrt(fake)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", trt)
    opened = Bundle.open(copied(LLAMA, target="tensorrt"))
    build(opened, 2)
    cuda = Cuda(0, fake)
    yield Gpu(fake, cuda, cuda.stream(urgent=True), trt, opened)
    cuda.close()


class Steps:
    """The shallow decoder of a bundle, step by step, on a device or on the host."""

    def __init__(self, engine: Any, bundle: Bundle, stream: CudaStream | None, batch: int = 1, rows: int = 1) -> None:
        manifest = bundle.manifest
        shape = batch, manifest.kv_heads, manifest.capacity + manifest.max_pending, manifest.head_dim
        names = [f"{layer}.{part}" for layer in manifest.shallow_layers for part in ("key", "value")]
        self.caches = {
            name: np.zeros(shape, np.float16) if stream is None else stream.cuda.zeros(shape, np.float16, stream)
            for name in names
        }
        self.tokens, self.lengths = np.zeros((batch, rows), np.int64), np.zeros(batch, np.int32)
        self.token, self.confidence = np.zeros(batch, np.int64), np.zeros(batch, np.float32)
        self.hidden = np.zeros((batch, rows, manifest.hidden_size), np.float32)
        self.inputs = {
            "input_ids": self.tokens,
            "past_lengths": self.lengths,
            "query_lengths": np.full(batch, rows, np.int32),
            "head_rows": np.arange(batch) * rows + rows - 1,
            **{f"past.{name}": array for name, array in self.caches.items()},
        }
        self.outputs = {
            "hidden": self.hidden,
            "token": self.token,
            "confidence": self.confidence,
            **{f"present.{name}": array for name, array in self.caches.items()},
        }
        self.call = engine.bind(self.inputs, self.outputs)

    def step(self, tokens: list[list[int]]) -> tuple[list[int], list[float], float]:
        self.tokens[:] = tokens
        self.call.run()
        self.lengths += self.tokens.shape[1]
        return self.token.tolist(), self.confidence.tolist(), float(self.hidden.sum())


def test_steps_match_onnxruntime_and_are_captured_as_a_graph(gpu: Gpu) -> None:
    theirs = Steps(OnnxEngine(gpu.bundle.engine("shallow"), 1), gpu.bundle, None)
    ours = Steps(gpu.engine("shallow", captures=True), gpu.bundle, gpu.stream)
    for step in range(RUNS_BEFORE_CAPTURE + 6):
        assert ours.step([[step + 3]]) == theirs.step([[step + 3]])
    assert (gpu.fake.captures, gpu.fake.launches) == (1, 5)
    # Warm-up, capture and its rehearsal; a launch runs nothing anew.
    assert len(gpu.trt.runs) == RUNS_BEFORE_CAPTURE + 2


def test_batches_and_longer_calls_use_a_matching_profile(gpu: Gpu) -> None:
    plain = OnnxEngine(gpu.bundle.engine("shallow"), 1)
    engine = gpu.engine("shallow")
    for batch, rows, profile in ((2, 1, "decode"), (1, 5, "prefill"), (2, 3, "prefill"), (1, 1, "decode")):
        tokens = [[7 * row + column + 3 for column in range(rows)] for row in range(batch)]
        ours, theirs = (
            Steps(engine, gpu.bundle, gpu.stream, batch, rows),
            Steps(plain, gpu.bundle, None, batch, rows),
        )
        assert ours.step(tokens) == theirs.step(tokens)
        assert engine.plan.profiles[gpu.trt.runs[-1][1]].name == profile


def test_alternating_calls_share_a_context_and_keep_their_shapes(gpu: Gpu) -> None:
    plain, engine = OnnxEngine(gpu.bundle.engine("shallow"), 1), gpu.engine("shallow", captures=True)
    ours = [Steps(engine, gpu.bundle, gpu.stream, batch) for batch in (1, 2)]
    theirs = [Steps(plain, gpu.bundle, None, batch) for batch in (1, 2)]
    for step in range(RUNS_BEFORE_CAPTURE + 3):
        for mine, other in zip(ours, theirs, strict=True):
            tokens = [[step + 3 + row] for row in range(len(mine.tokens))]
            assert mine.step(tokens) == other.step(tokens)
    assert gpu.fake.captures == 2


def test_graph_is_released_with_its_call_and_when_shapes_change(gpu: Gpu) -> None:
    steps = Steps(gpu.engine("shallow", captures=True), gpu.bundle, gpu.stream)
    for _ in range(RUNS_BEFORE_CAPTURE + 1):
        steps.step([[5]])
    assert gpu.fake.graphs == 1
    # No head row: another shape, but the same call.
    steps.call.rebind(
        {"head_rows": np.zeros(0, np.int64)}, {"token": np.zeros(0, np.int64), "confidence": np.zeros(0, np.float32)}
    )
    steps.step([[6]])
    assert gpu.fake.graphs == 0
    for _ in range(RUNS_BEFORE_CAPTURE + 1):
        steps.step([[5]])
    assert gpu.fake.graphs == 1
    del steps.call
    assert gpu.fake.graphs == 0


def refuse_to_end(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.fake.refuse("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated")


def refuse_to_run(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with a part that cannot be captured."""
    run = _Context.execute_async_v3
    monkeypatch.setattr(
        _Context, "execute_async_v3", lambda self, stream: not gpu.fake.capturing(stream) and run(self, stream)
    )


@pytest.mark.parametrize("refuse", [refuse_to_end, refuse_to_run])
def test_steps_that_cannot_be_captured_run_without_a_graph(
    refuse: Callable[[Gpu, pytest.MonkeyPatch], None],
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = gpu.engine("shallow", captures=True)
    ours = Steps(engine, gpu.bundle, gpu.stream)
    plain = Steps(OnnxEngine(gpu.bundle.engine("shallow"), 1), gpu.bundle, None)
    refuse(gpu, monkeypatch)
    for step in range(RUNS_BEFORE_CAPTURE + 3):
        assert ours.step([[step + 3]]) == plain.step([[step + 3]])
    assert "shallow run without CUDA graphs" in caplog.text
    assert (gpu.fake.launches, engine.captures) == (0, False)


def test_missing_and_unknown_inputs_and_outputs_are_named(gpu: Gpu) -> None:
    engine = gpu.engine("shallow")
    steps = Steps(engine, gpu.bundle, gpu.stream)
    del steps.inputs["query_lengths"], steps.inputs["head_rows"]
    with pytest.raises(EngineError, match=r"engine shallow lacks query_lengths, head_rows"):
        engine.bind(steps.inputs, {}).run()
    with pytest.raises(EngineError, match="engine shallow has no input hidden"):
        engine.bind({"hidden": steps.hidden}, {})
    with pytest.raises(EngineError, match="engine shallow has no output nll"):
        engine.bind({}, {"nll": steps.confidence})
    with pytest.raises(EngineError, match="token is float32, the TensorRT engine shallow has int64"):
        engine.bind({}, {"token": steps.confidence})
    with pytest.raises(EngineError, match=r"past\.0\.key is in host memory"):
        engine.bind({"past.0.key": np.zeros((1, 4, 144, 16), np.float16)}, {})


def test_arrays_of_wrong_shape_or_location_are_refused_by_name(gpu: Gpu) -> None:
    engine = gpu.engine("shallow")
    for batch, rows in ((3, 1), (1, 129)):
        steps = Steps(engine, gpu.bundle, gpu.stream, batch, rows)
        with pytest.raises(EngineError, match=rf"B={batch}, q={rows}.* fits no profile .*--build a larger batch"):
            steps.step([[3] * rows] * batch)
    steps = Steps(engine, gpu.bundle, gpu.stream)
    array = steps.caches["0.key"]
    shifted = DeviceArray(array.memory, array.address + 64, array.shape, array.dtype)
    with pytest.raises(
        EngineError, match=r"past.0.key is at address .* a multiple of 256; open the session with slots=1"
    ):
        steps.call.rebind({"past.0.key": shifted}, {})
    steps.call.rebind({"past.0.key": gpu.cuda.zeros((1, 4, 64, 16), np.float16, gpu.stream)}, {})
    with pytest.raises(EngineError, match=r"shallow refuses shape .* of past.0.key"):
        steps.step([[3]])


def test_out_of_memory_names_needed_and_free_bytes(gpu: Gpu) -> None:
    (path,) = (gpu.bundle.path / DIRECTORY).glob("deep-*.engine")
    needed = path.stat().st_size
    gpu.fake.free_bytes = gpu.fake.allocated + needed - 1
    with pytest.raises(CapacityError, match=rf"engine {path.name} needs {needed} bytes .*cuda:0, and {needed - 1} are"):
        gpu.engine("deep")
    gpu.fake.free_bytes = gpu.fake.allocated + needed
    with pytest.raises(CapacityError, match=r"scratch memory of the TensorRT engine deep needs 12288 bytes"):
        gpu.engine("deep")


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"version": "11.3.0"}, "not compatible with this version"), ({"architecture": [8, 9]}, "incompatible device")],
)
def test_engine_file_refused_by_tensorrt_is_an_error_with_the_reason(
    change: dict[str, Any], reason: str, gpu: Gpu
) -> None:
    (path,) = (gpu.bundle.path / DIRECTORY).glob("shallow-*.engine")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EngineError, match=rf"does not load {path.name}: .*{reason}.*freeexport convert"):
        gpu.engine("shallow")
    record_of(path).unlink()
    with pytest.raises(EngineError, match="has no record"):
        gpu.engine("shallow")


def test_lost_device_fails_the_call(gpu: Gpu) -> None:
    steps = Steps(gpu.engine("shallow", captures=True), gpu.bundle, gpu.stream)
    gpu.fake.lose(after=7)
    with pytest.raises(DeviceError, match="cuda:0 was lost"):
        any(steps.step([[3]]) is None for _ in range(9))
    with pytest.raises(DeviceError, match="close the session"):
        steps.step([[3]])
