"""An engine on TensorRT: a file that `convert --build` wrote, loaded for a device, and its execution contexts.

Not yet run on a GPU; checked against tests/fakes/fake_tensorrt.py, which has the names and signatures of TensorRT's
package.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from runtime.cuda.device_array import DeviceArray
from runtime.cuda.driver import Stream
from runtime.cuda.staging import ALIGNMENT, StagingPool, laid_out
from runtime.errors import EngineError
from runtime.tensorrt.call import TensorRTCall
from runtime.tensorrt.context import Context
from runtime.tensorrt.files import read_record
from runtime.tensorrt.library import import_tensorrt, logger_of
from runtime.tensorrt.plan import Profile, profile_for, sizes_of

# TensorRT's names of types; numpy has no bfloat16, see DeviceArray.
_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": np.uint16, "INT32": np.int32, "INT64": np.int64}


class Tensor(NamedTuple):
    """An input or output of an engine. `on_host`: TensorRT reads it from the host's memory."""

    dtype: np.dtype
    is_input: bool
    on_host: bool


class TensorRTEngine:
    """One engine of a bundle; its calls are put into `stream`, in order. Safe to use from many threads.

    `captures`: calls of one row per sequence that come again become CUDA graphs. EngineError where the file does not
    load; CapacityError, which says how much is needed and free, where the device has too little memory for it.
    """

    def __init__(self, path: Path, stream: Stream, captures: bool = False) -> None:
        record = read_record(path)
        if record is None:
            raise EngineError(f"{path} has no record of what it was built for; run convert BUNDLE --build again")
        self.plan, self.stream, self.captures = record.plan, stream, captures
        self.lock = threading.Lock()
        self.staging = StagingPool(stream)
        self._trt = import_tensorrt()
        self._log = logger_of(self._trt)
        stream.cuda.make_current()
        stream.cuda.require(record.bytes, f"TensorRT engine {path.name}")
        # The runtime must outlive its engines.
        self._runtime, self._engine = self._load(path)
        self.tensors = self._read_tensors()
        self._check(path)
        self._scratch = self._allocate_scratch()
        self._contexts: dict[int, Context] = {}
        self._calls: WeakSet[TensorRTCall] = WeakSet()

    @property
    def name(self) -> str:
        return self.plan.engine

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each output, -1 where a dimension is free."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in self.output_names}

    def dtype(self, name: str) -> np.dtype:
        """Of an input or output."""
        return self.tensors[name].dtype

    def close(self) -> None:
        """Let go of everything on the device, before its stream is gone. No call may run any more."""
        for call in list(self._calls):
            call.close()
        self._contexts.clear()
        self._engine = self._runtime = None

    @property
    def output_names(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if not tensor.is_input]

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> TensorRTCall:
        """A call on fixed arrays: numpy ones, which are copied to the device and back at every run, or DeviceArrays of
        this device, which are used where they are."""
        call = TensorRTCall(self, inputs, outputs)
        self._calls.add(call)
        return call

    def run(self, outputs: list[str], inputs: Mapping[str, Any]) -> list[DeviceArray]:
        """One call with arrays of any shape: its outputs as new arrays on the device, complete."""
        with self.lock:
            context = self.context(self.profile({name: array.shape for name, array in inputs.items()}))
            context.set_shapes({name: array.shape for name, array in inputs.items()})
            shapes = {name: context.shape(name) for name in outputs}
        sizes = {name: _bytes(shapes[name], self.tensors[name].dtype) for name in outputs}
        offsets, size = laid_out(sizes)
        block = self.stream.cuda.empty((size,), np.uint8, self.stream)
        results = [
            DeviceArray(block.memory, block.address + offsets[name], shapes[name], self.tensors[name].dtype)
            for name in outputs
        ]
        self.bind(inputs, dict(zip(outputs, results, strict=True))).run()
        return results

    def profile(self, shapes: Mapping[str, tuple[int, ...]]) -> Profile:
        """The one for a call whose inputs have these shapes. EngineError where there is none."""
        return profile_for(self.plan.profiles, sizes_of(self.name, shapes))

    def context(self, profile: Profile) -> Context:
        """The one that calls of a profile share."""
        index = self.plan.profiles.index(profile)
        if index not in self._contexts:
            self._contexts[index] = self.new_context(profile)
        return self._contexts[index]

    def new_context(self, profile: Profile) -> Context:
        """One that nothing else changes, as a captured call needs it."""
        # Calls follow each other in the stream, so that all contexts can work in the same memory.
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self._engine.create_execution_context(strategy)
        if made is None:
            raise EngineError(f"TensorRT makes no execution context for {self.name}: {self.reason()}")
        made.set_device_memory(self._scratch.address, self._scratch.size)
        return Context(made, self.name, self.plan.profiles.index(profile), self.stream, self._log)

    def reason(self) -> str:
        """What TensorRT said last."""
        return str(self._log.reason())

    def forget_errors(self) -> None:
        self._log.errors.clear()

    def _load(self, path: Path) -> tuple[Any, Any]:
        try:
            runtime = self._trt.Runtime(self._log)
        except TypeError:  # its constructor gave nothing
            raise EngineError(
                f"TensorRT {self._trt.__version__} cannot start: {self.reason()}; run freeexport doctor"
            ) from None
        # A version-compatible engine brings a runtime of its own along.
        runtime.engine_host_code_allowed = self.plan.version_compatible
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(
                f"TensorRT {self._trt.__version__} does not load {path.name}: {self.reason()}; "
                "run: freeexport convert BUNDLE --build"
            )
        return runtime, engine

    def _read_tensors(self) -> dict[str, Tensor]:
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {
            name: Tensor(
                np.dtype(_TYPES[engine.get_tensor_dtype(name).name]),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
            for name in names
        }

    def _check(self, path: Path) -> None:
        engine = self._engine
        if engine.num_optimization_profiles != len(self.plan.profiles):
            raise EngineError(f"{path.name} has other profiles than its record says; run convert BUNDLE --build again")
        for name in self.output_names:
            if name.startswith("present.") and engine.get_aliased_input_tensor(name) != f"past.{name[8:]}":
                raise EngineError(
                    f"{path.name} does not write {name} in place of the past; run convert BUNDLE --build again"
                )

    def _allocate_scratch(self) -> DeviceArray:
        sizes = [self._engine.get_device_memory_size_for_profile_v2(index) for index in range(len(self.plan.profiles))]
        cuda = self.stream.cuda
        cuda.require(max(sizes), f"what the TensorRT engine {self.name} works in")
        return cuda.empty((max(*sizes, ALIGNMENT),), np.uint8, self.stream)


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
