"""An engine on ONNX Runtime's CUDA provider, with calls enqueued into a stream."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from runtime.engines.cuda.attention import FUSED
from runtime.engines.cuda.call import DeviceCall, DeviceEngine, Staging
from runtime.engines.cuda.driver import CudaStream
from runtime.engines.onnx import OnnxEngine, import_onnxruntime
from runtime.errors import EngineError, first_line
from runtime.machine.device import Device

logger = logging.getLogger(__name__)

# numpy types by ONNX Runtime's names. bfloat16 is stored as uint16 (see DeviceArray).
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
BFLOAT16 = 16  # TensorProto.DataType of ONNX
# Runs of a call before it is captured as a CUDA graph. Capturing costs as much as several runs.
RUNS_BEFORE_CAPTURE = 2
# Most graphs per engine, because ONNX Runtime cannot release a graph.
MAX_GRAPHS = 256


class CudaCall(DeviceCall):
    """A call on ONNX Runtime's CUDA provider. See `DeviceCall`.

    `_graph` is the number of its captured CUDA graph, 0 for none.
    """

    _engine: CudaEngine
    _binding: Any = None
    _options: Any = None
    _graph = 0

    def close(self) -> None:
        super().close()
        self._binding = None

    def _prepare(self, staging: Staging) -> None:
        engine = self._engine
        self._binding = engine.session.io_binding()
        for name, array in {**self._inputs, **self._outputs}.items():
            offset = self._offsets.get(name)
            type_ = engine.types[name]
            place = array.address if offset is None else staging.device.address + offset
            put = self._binding.bind_input if name in self._inputs else self._binding.bind_output
            kind = BFLOAT16 if type_ == "tensor(bfloat16)" else TYPES[type_]
            put(name, "cuda", engine.stream.cuda.index, kind, list(array.shape), place)
        self._options = engine.run_options(0)
        self._graph = 0

    def _launch(self, staging: Staging) -> None:
        engine = self._engine
        staging.send(0, self._sent)
        captures = self._runs >= RUNS_BEFORE_CAPTURE and self._graph == 0 and engine.graphs_left > 0
        if captures:
            self._graph = next(engine.graphs)
            engine.graphs_left -= 1
            self._options = engine.run_options(self._graph)
        try:
            with engine.stream.cuda.undisturbed if captures else nullcontext():
                engine.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            text = first_line(error)
            engine.stream.record(staging.event)  # raises DeviceError if the device is lost
            if not captures:
                raise EngineError(
                    f"{engine.name} failed on device {engine.stream.cuda}: {text}"
                ) from error
            logger.warning(
                "calls of %s run without a CUDA graph, which cannot be captured: %s",
                engine.name,
                text,
            )
            engine.graphs_left = 0
            self._graph = 0
            self._options = engine.run_options(0)
            return self._launch(staging)
        staging.fetch(self._sent, self._fetched)


class CudaEngine(DeviceEngine):
    """An engine of a bundle on ONNX Runtime's CUDA provider.

    `attention` are the provider's options for attention kernels.

    Raises:
        EngineError: If it cannot be loaded, or would run on another device.
    """

    call = CudaCall

    def __init__(
        self,
        path: Path,
        threads: int,
        stream: CudaStream,
        captures: bool = False,
        attention: Mapping[str, str] = FUSED,
    ) -> None:
        super().__init__(path.stem, stream, captures)
        options = {
            **attention,
            "user_compute_stream": str(int(stream.handle)),
            "enable_cuda_graph": str(int(captures)),
            # Allocate as much as is needed. The default doubles each time.
            "arena_extend_strategy": "kSameAsRequested",
        }
        engine = OnnxEngine(path, threads, Device(stream.cuda.index), options)
        self.session = engine.session
        self.output_shapes = engine.output_shapes
        self.graphs = itertools.count(1)
        self.graphs_left = MAX_GRAPHS if captures else 0
        self.types = {
            value.name: value.type
            for value in (*self.session.get_inputs(), *self.session.get_outputs())
        }

    def close(self) -> None:
        super().close()
        self.session = None

    def dtype(self, name: str) -> np.dtype:
        """Return the type of an input or output."""
        return np.dtype(TYPES[self.types[name]])

    def run_options(self, graph: int) -> Any:
        """Return options for calls of captured graph number `graph`, or of none if it is 0."""
        options = import_onnxruntime().RunOptions()
        # The stream keeps the order. Readers of results wait for events.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.captures:
            options.add_run_config_entry("gpu_graph_id", str(graph or -1))
        return options
