"""A stand-in for the package `tensorrt` on the fake of CUDA: ONNX Runtime computes what the engines would.

It has the names and signatures of NVIDIA's bindings (tests/fakes/test_fake_tensorrt.py) as far as they are used. An
"engine" names the graph that it was built from. What TensorRT refuses is refused in its way, `False` or
`None` and a line in the log; what it leaves undefined raises `Misuse`: an address that was never set, is no multiple of
256 or overlaps another; an output that is not where its input is; too little memory to work in; a graph captured before
the context had run with its shapes, or launched after the context was changed. Races and freed memory: see fake_cuda.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
from fake_bf16 import Graph
from fake_cuda import Access, FakeCuda, Misuse

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
Strategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(bfloat16)": (DataType.BF16, np.uint16),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}
# What an engine works in, for each profile.
SCRATCH = 4096


def OUTPUT(engine: str, array: np.ndarray) -> None:
    """Done to every floating output of an engine: tests put a fault here."""


def fake_tensorrt(cuda: FakeCuda, version: str = "11.4.0.106") -> ModuleType:
    """The package, for the device of `cuda`. It records what is run, as `runs`: (engine, profile, stream)."""
    trt = ModuleType("tensorrt")

    class Runtime(_Runtime):
        _cuda, _version, _runs = cuda, version, list[tuple[str, int, int]]()

    class Builder(_Builder):
        _cuda, _version = cuda, version

    trt.__dict__.update(
        __version__=version,
        __spec__=ModuleSpec("tensorrt", None),  # what asks whether it is installed wants to see one
        ILogger=ILogger,
        IProgressMonitor=IProgressMonitor,
        Runtime=Runtime,
        Builder=Builder,
        OnnxParser=_Parser,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        ExecutionContextAllocationStrategy=Strategy,
        NetworkDefinitionCreationFlag=Enum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1}, type=int),
        runs=Runtime._runs,
    )
    return trt


class _Runtime:
    _cuda: FakeCuda
    _version: str
    _runs: list[tuple[str, int, int]]

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        content = json.loads(serialized_engine)
        if content["version"] != self._version:
            self._logger.log(ILogger.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        if tuple(content["architecture"]) != self._cuda.architecture:
            self._logger.log(ILogger.ERROR, "The engine plan file is generated on an incompatible device")
            return None
        if self._cuda._failure("deserialize") is not None:
            self._logger.log(ILogger.ERROR, "CUDA initialization failure")
            return None
        return _Engine(content, self)


class _Engine:
    def __init__(self, content: dict[str, Any], runtime: _Runtime) -> None:
        self._runtime = runtime
        self._name = Path(content["graph"]).stem
        self._profiles = content["profiles"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._graph = Graph(content["graph"], options)
        self._inputs = {item.name: item for item in self._graph.inputs}
        self._outputs = {item.name: item for item in self._graph.outputs}
        self._names = [*self._inputs, *self._outputs]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self._item(name).type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self._item(name).shape)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return list(self._profiles[profile_index][name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past.") if name.startswith("present.") else None

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH * (profile_index + 1)

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> _Context:
        if strategy is not Strategy.USER_MANAGED:
            raise NotImplementedError("memory that TensorRT allocates itself")
        return _Context(self)

    def _item(self, name: str) -> Any:
        return self._inputs.get(name) or self._outputs[name]

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(TYPES[self._item(name).type][1])


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self._cuda, self._log = engine._runtime._cuda, engine._runtime._logger
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._changes = 0
        self._ran_with: dict[str, tuple[int, ...]] | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        self._changes += 1
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._changes += 1
        self._cuda._stream(stream_handle)
        if not 0 <= profile_index < self.engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {profile_index}")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._changes += 1
        if self._profile is None:
            return self._refuse("no optimization profile is set")
        least, _, most = self.engine.get_tensor_profile_shape(name, self._profile)
        fits = all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if not fits:
            return self._refuse(f"shape {shape} of {name} is not in {least} to {most} of profile {self._profile}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._changes += 1
        if not memory:
            return self._refuse(f"the address of {name} is null")
        if memory % 256:
            raise Misuse(f"the address of {name} is no multiple of 256")
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        free: dict[str, int] = {}
        for known, item in self.engine._inputs.items():
            for size, label in zip(self._shapes[known], item.shape, strict=True):
                if isinstance(label, str):
                    free[label] = size
        return tuple(free[size] if isinstance(size, str) else size for size in self.engine._item(name).shape)

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda = self.engine, self._cuda
        missing = [name for name in engine._inputs if name not in self._shapes]
        if missing:
            return self._refuse(f"the shape of {missing[0]} is not set")
        unset = [name for name in engine._names if name not in self._addresses]
        if unset:
            raise Misuse(f"the address of {unset[0]} is not set")
        assert self._profile is not None
        if self._scratch[1] < engine.get_device_memory_size_for_profile_v2(self._profile):
            raise Misuse(f"{self._scratch[1]} bytes are too little to work in")
        shapes = {name: self.get_tensor_shape(name) for name in engine._names}
        captured = cuda.capturing(stream_handle)
        if captured and self._ran_with != shapes:
            return self._refuse("the context has not run with these shapes before it is captured")
        self._ran_with = shapes
        engine._runtime._runs.append((engine._name, self._profile, stream_handle))
        action = self._action(dict(self._addresses), shapes, self._changes if captured else None)
        cuda.enqueue(stream_handle, engine._name, self._accesses(shapes), action)
        return True

    def _accesses(self, shapes: dict[str, tuple[int, ...]]) -> list[Access]:
        engine, found = self.engine, [Access(*self._scratch, True)]
        taken: list[tuple[int, int, str]] = []
        for name in engine._names:
            address, size = self._addresses[name], _size(shapes[name], engine._dtype(name))
            written = engine.get_aliased_input_tensor(name)
            if written is not None:
                if self._addresses[written] != address:
                    raise Misuse(f"{name} is not where {written} is")
                found.append(Access(address, size, True))
                continue
            for start, end, other in taken:
                if address < end and start < address + max(1, size):
                    raise Misuse(f"{name} overlaps {other}")
            taken.append((address, address + max(1, size), name))
            found.append(Access(address, size, name in engine._outputs))
        return found

    def _action(
        self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], changes: int | None
    ) -> Callable[[], None]:
        engine = self.engine

        def run() -> None:
            if changes is not None and changes != self._changes:
                raise Misuse("a graph is launched whose context was changed after it was captured")
            arrays = {name: _array(addresses[name], shapes[name], engine._dtype(name)) for name in engine._names}
            inputs, outputs = ({name: arrays[name] for name in part} for part in (engine._inputs, engine._outputs))
            engine._graph.compute(inputs, outputs)
            for name in engine._outputs:
                if arrays[name].dtype.kind == "f" and not name.startswith("present."):
                    OUTPUT(engine._name, arrays[name])

        return run

    def _refuse(self, why: str) -> bool:
        self._log.log(ILogger.ERROR, why)
        return False


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _array(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = _size(shape, dtype)
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8).view(dtype).reshape(shape)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class _Network:
    path = ""


class _Parser:
    num_errors = 0

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        self._network.path = model
        return True


class _OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class _Config:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[_OptimizationProfile] = []

    def add_optimization_profile(self, profile: _OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        class Cache:
            def serialize(self) -> bytes:
                return b"timings"

        return Cache()

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return True


class _Builder:
    _cuda: FakeCuda
    _version: str

    def __init__(self, logger: ILogger) -> None:
        pass

    def create_network(self, flags: int) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _OptimizationProfile:
        return _OptimizationProfile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 2)
        for step in range(2):
            monitor.step_complete("build", step)
        monitor.phase_finish("build")
        content = {
            "graph": network.path,
            "profiles": [profile.shapes for profile in config.profiles],
            "version": self._version,
            "architecture": self._cuda.architecture,
        }
        return json.dumps(content).encode()
