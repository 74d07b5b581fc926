"""A TensorRT engine, loaded on a device from a file written by `convert --build`, and its calls."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.engines.cuda.call import ALIGNMENT, DeviceCall, DeviceEngine, Staging, laid_out
from runtime.engines.cuda.device_array import DeviceArray
from runtime.engines.cuda.driver import CudaGraph, CudaStream
from runtime.engines.tensorrt.files import (
    Profile,
    import_tensorrt,
    logger_of,
    profile_for,
    read_record,
    sizes_of,
)
from runtime.errors import EngineError

logger = logging.getLogger(__name__)

# numpy types by TensorRT's names. bfloat16 is stored as uint16 (see DeviceArray).
_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT32": np.int32,
    "INT64": np.int64,
}
# Runs of a call before it is captured as a CUDA graph. Capturing costs as much as several runs.
RUNS_BEFORE_CAPTURE = 3
CAPTURED_PROFILES = ("decode", "sync")


class EngineTensor(NamedTuple):
    """An input or output of an engine.

    Attributes:
        dtype: Type of its elements.
        is_input: It is an input.
        on_host: TensorRT reads it from host memory.
    """

    dtype: np.dtype
    is_input: bool
    on_host: bool


class Context:
    """An execution context for one profile.

    Shapes and addresses are kept between runs, so that only changes are set.

    Args:
        context: TensorRT's context.
        engine: Engine of the context.
        profile: Number of the profile.
    """

    def __init__(self, context: Any, engine: TensorRTEngine, profile: int) -> None:
        self._context = context
        self._engine = engine
        self._stream = int(engine.stream.handle)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        if not context.set_optimization_profile_async(profile, self._stream):
            raise self._error("cannot use a profile")

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of all inputs.

        Raises:
            EngineError: If TensorRT rejects a shape.
        """
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._shapes.pop(name, None)
                if not self._context.set_input_shape(name, shape):
                    raise self._error(f"refuses shape {list(shape)} of {name}")
                self._shapes[name] = shape

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise self._error(f"refuses the memory of {name}")
                self._addresses[name] = address

    def bytes_of(self, name: str) -> int:
        """Return the size of an output, in bytes, after the shapes of the inputs are set."""
        return math.prod(self._context.get_tensor_shape(name)) * self._engine.dtype(name).itemsize

    def enqueue(self) -> None:
        """Enqueue a run into the engine's stream."""
        if not self._context.execute_async_v3(self._stream):
            raise self._error("did not run")

    def _error(self, what: str) -> EngineError:
        return EngineError(
            f"the TensorRT engine {self._engine.name} {what}: {self._engine.log.reason()}"
        )


class TensorRTCall(DeviceCall):
    """A call on TensorRT. See `DeviceCall`."""

    _engine: TensorRTEngine
    _shapes: dict[str, tuple[int, ...]]
    _addresses: dict[str, int]
    _context: Context | None = None
    _graph: CudaGraph | None = None
    _unread: DeviceArray | None = None  # kept because a graph holds its address

    def close(self) -> None:
        """Release memory, graph and context."""
        self._graph = self._context = self._unread = None
        super().close()

    def enqueue(self) -> None:
        self._engine.log.errors.clear()
        super().enqueue()

    def _prepare(self, staging: Staging) -> None:
        engine = self._engine
        self._shapes = {name: tuple(array.shape) for name, array in self._inputs.items()}
        missing = [
            name
            for name, tensor in engine.tensors.items()
            if tensor.is_input and name not in self._shapes
        ]
        if missing:
            raise EngineError(
                f"a call of the TensorRT engine {engine.name} lacks {', '.join(missing)}"
            )
        self._context = engine.context(engine.profile(self._shapes))
        self._context.set_shapes(self._shapes)
        bound = {**self._inputs, **self._outputs}
        addresses = {
            name: array.address for name, array in bound.items() if isinstance(array, DeviceArray)
        }
        # Caches are updated in place.
        for name, address in list(addresses.items()):
            if name.startswith("past."):
                addresses[f"present.{name[5:]}"] = address
        for name, offset in self._offsets.items():
            on_host = engine.tensors[name].on_host
            addresses[name] = (staging.host if on_host else staging.device.address) + offset
        unread = {
            name: self._context.bytes_of(name)
            for name in engine.output_shapes
            if name not in addresses
        }
        offsets, size = laid_out(unread)
        self._unread = engine.unread(size)
        self._addresses = addresses | {
            name: self._unread.address + offset for name, offset in offsets.items()
        }

    def _launch(self, staging: Staging) -> None:
        assert self._context is not None
        if self._graph is not None:
            self._graph.launch()
            return
        engine = self._engine
        stream = self._engine.stream
        context = self._context
        captures = engine.captures and self._runs >= RUNS_BEFORE_CAPTURE
        # Values that TensorRT reads from host memory would be frozen in the graph.
        captures = captures and not any(tensor.on_host for tensor in engine.tensors.values())
        captures = captures and engine.profile(self._shapes).name in CAPTURED_PROFILES
        if captures:  # a graph needs a context that no other call changes
            context = engine.new_context(engine.profile(self._shapes))
        context.set_shapes(self._shapes)
        context.set_addresses(self._addresses)

        def put() -> None:
            staging.send(0, self._sent)
            context.enqueue()
            staging.fetch(self._sent, self._fetched)

        put()  # TensorRT must run once with these shapes before a capture
        if not captures:
            return
        try:
            with stream.cuda.undisturbed:
                self._graph = CudaGraph(stream, put)
                self._context = context
        except EngineError as error:
            if stream.cuda.lost:
                raise
            engine.captures = False
            logger.warning(
                "calls of the TensorRT engine %s run without CUDA graphs: %s", engine.name, error
            )

    def _check(self, name: str, array: Any, is_input: bool) -> None:
        engine = self._engine
        tensor = self._engine.tensors.get(name)
        if tensor is None or tensor.is_input is not is_input:
            kind = "input" if is_input else "output"
            raise EngineError(
                f"the TensorRT engine {engine.name} has no {kind} {name}; "
                "run convert BUNDLE --build"
            )
        if array.dtype != tensor.dtype:
            raise EngineError(
                f"{name} is {array.dtype}, the TensorRT engine {engine.name} has {tensor.dtype}"
            )
        if not isinstance(array, DeviceArray):
            if name.startswith(("past.", "present.")):
                raise EngineError(
                    f"{name} is in host memory; TensorRT engines need their cache on the device"
                )
        elif array.address % ALIGNMENT or not array.contiguous:
            raise EngineError(
                f"{name} is at address {array.address}, and TensorRT needs a multiple of "
                f"{ALIGNMENT}; open the session with slots=1, or convert with another capacity"
            )


class TensorRTEngine(DeviceEngine):
    """One engine of a bundle.

    Args:
        path: The engine file.
        stream: Stream of its calls.
        captures: Capture repeated steps and sync passes as CUDA graphs.

    Raises:
        EngineError: If the file cannot be loaded, or does not match its record.
        CapacityError: If the device has too little memory. The message states needed and free
            bytes.
    """

    call = TensorRTCall

    def __init__(self, path: Path, stream: CudaStream, captures: bool = False) -> None:
        record = read_record(path)
        if record is None:
            raise EngineError(
                f"{path} has no record of what it was built for; run convert BUNDLE --build again"
            )
        self.plan = record.plan
        super().__init__(self.plan.engine, stream, captures)
        self._trt = import_tensorrt()
        self.log = logger_of(self._trt)
        stream.cuda.make_current()
        stream.cuda.require(record.bytes, f"TensorRT engine {path.name}")
        # The runtime must outlive its engines.
        self._runtime, self._engine = self._load(path)
        engine = self._engine
        trt = self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors = {
            name: EngineTensor(
                np.dtype(_TYPES[engine.get_tensor_dtype(name).name]),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
            for name in names
        }
        # TensorRT reports free dimensions as -1.
        outputs = [name for name, tensor in self.tensors.items() if not tensor.is_input]
        self.output_shapes = {name: tuple(engine.get_tensor_shape(name)) for name in outputs}
        if engine.num_optimization_profiles != len(self.plan.profiles):
            raise EngineError(
                f"{path.name} does not have the profiles of its record; "
                "run convert BUNDLE --build again"
            )
        for name in outputs:
            if not name.startswith("present."):
                continue
            if engine.get_aliased_input_tensor(name) != f"past.{name[8:]}":
                raise EngineError(
                    f"{path.name} does not update {name} in place; run convert BUNDLE --build again"
                )
        sizes = [
            engine.get_device_memory_size_for_profile_v2(index)
            for index in range(len(self.plan.profiles))
        ]
        needed = max(sizes)
        stream.cuda.require(needed, f"scratch memory of the TensorRT engine {self.name}")
        self._scratch = stream.cuda.empty((max(needed, ALIGNMENT),), np.uint8, stream)
        self._unread = stream.cuda.empty((ALIGNMENT,), np.uint8, stream)
        self._contexts: dict[int, Context] = {}

    def dtype(self, name: str) -> np.dtype:
        """Return the type of an input or output."""
        return self.tensors[name].dtype

    def close(self) -> None:
        super().close()
        self._contexts.clear()
        self._engine = self._runtime = None

    def profile(self, shapes: Mapping[str, tuple[int, ...]]) -> Profile:
        """Return the profile for a call whose inputs have these shapes.

        Raises:
            EngineError: If no profile admits them.
        """
        return profile_for(self.plan.profiles, sizes_of(self.name, shapes))

    def context(self, profile: Profile) -> Context:
        """Return the context that calls with a profile share."""
        index = self.plan.profiles.index(profile)
        if index not in self._contexts:
            self._contexts[index] = self.new_context(profile)
        return self._contexts[index]

    def new_context(self, profile: Profile) -> Context:
        """Return a context for one call only, as captured calls need."""
        # Calls run one after the other in the stream, so contexts can share scratch memory.
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self._engine.create_execution_context(strategy)
        if made is None:
            raise EngineError(
                f"TensorRT cannot create an execution context for {self.name}: {self.log.reason()}"
            )
        made.set_device_memory(self._scratch.address, self._scratch.size)
        return Context(made, self, self.plan.profiles.index(profile))

    def unread(self, size: int) -> DeviceArray:
        """Return shared memory for outputs that are not read. Calls run one after the other."""
        if self._unread.size < size:
            self._unread = self.stream.cuda.empty((size,), np.uint8, self.stream)
        return self._unread

    def _load(self, path: Path) -> tuple[Any, Any]:
        try:
            runtime = self._trt.Runtime(self.log)
        except TypeError:  # the constructor returned nothing
            raise EngineError(
                f"TensorRT {self._trt.__version__} cannot start: {self.log.reason()}; "
                "run freeexport doctor"
            ) from None
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise EngineError(
                f"TensorRT {self._trt.__version__} does not load {path.name}: {self.log.reason()}; "
                "run: freeexport convert BUNDLE --build"
            )
        return runtime, engine
