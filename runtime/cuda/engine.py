"""An engine on ONNX Runtime's CUDA provider: its calls are put into a stream and work on memory of the device.

Not yet run on a GPU; checked against tests/fakes/fake_onnxruntime.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from runtime.cuda.call import MOST_GRAPHS, CudaCall
from runtime.cuda.driver import Stream
from runtime.cuda.staging import StagingPool
from runtime.engines.onnx import OnnxEngine, import_onnxruntime
from runtime.machine.device import Device

# ONNX Runtime's names of types, as numpy's, which has no bfloat16 (see DeviceArray).
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
# What ONNX calls bfloat16 (TensorProto.DataType).
BFLOAT16 = 16


class CudaEngine(OnnxEngine):
    """`captures`: calls with one token a row that come again become CUDA graphs. Safe to use from many threads, but
    those calls always from the same one.

    EngineError where it cannot be loaded, or would run elsewhere.
    """

    def __init__(self, path: Path, threads: int, stream: Stream, captures: bool = False) -> None:
        options = {
            "user_compute_stream": str(int(stream.handle)),
            "enable_cuda_graph": str(int(captures)),
            # Memory as it is needed, not twice as much each time.
            "arena_extend_strategy": "kSameAsRequested",
        }
        super().__init__(path, threads, Device(stream.cuda.index), provider_options=options)
        self.name, self.stream, self.captures = path.stem, stream, captures
        self.staging = StagingPool(stream)
        self.graphs, self.graphs_left = itertools.count(1), MOST_GRAPHS if captures else 0
        self._calls: WeakSet[CudaCall] = WeakSet()
        values = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.types = {value.name: value.type for value in values}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> CudaCall:  # type: ignore[override]
        """A call on fixed arrays: numpy ones, which are copied to the device and back at every run, or DeviceArrays of
        this device, which are used where they are."""
        call = CudaCall(self, inputs, outputs)
        self._calls.add(call)
        return call

    def close(self) -> None:
        """Let go of the session, before its stream is gone. No call may run any more."""
        for call in list(self._calls):
            call.close()
        self.session = None

    def dtype(self, name: str) -> np.dtype:
        """Of an input or output."""
        return np.dtype(TYPES[self.types[name]])

    def element_type(self, name: str) -> Any:
        """The same, as ONNX Runtime's bindings take it."""
        return BFLOAT16 if self.types[name] == "tensor(bfloat16)" else TYPES[self.types[name]]

    def run_options(self, graph: int) -> Any:
        """For calls of the captured graph of this number; of none if it is 0."""
        options = import_onnxruntime().RunOptions()
        # The stream keeps the order; whoever needs a result waits for its event.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph or -1))
        return options
