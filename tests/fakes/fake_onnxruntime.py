"""ONNX Runtime with a CUDA provider, as the runtime sees it: real sessions on the CPU, whose runs are put into streams
of fake_cuda and work on its memory.

What the provider does with a user's stream and with graphs is as onnxruntime-gpu 1.31.1 was seen to do it on a CUDA
runtime without a device: the first run with a gpu_graph_id in a thread runs, is captured and
launched; later ones in that thread launch what was captured, whatever is bound.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as real
from fake_bf16 import Graph
from fake_cuda import Access, FakeCuda, Misuse

from runtime.engines.cuda.attention import attention_model

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
BFLOAT16 = 16  # TensorProto.BFLOAT16, which numpy has no type for


class _Place(NamedTuple):
    """The place of a value."""

    element_type: Any
    shape: tuple[int, ...]
    address: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.element_type == BFLOAT16 else self.element_type)

    @property
    def array(self) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, self.dtype)
        raw = (ctypes.c_uint8 * self.size).from_address(self.address)
        return np.frombuffer(raw, np.uint8).view(self.dtype).reshape(self.shape)


class FakeOnnxRuntime(SimpleNamespace):
    """`runs`, `captures` and `launches` count; `fails` makes the next run raise, `fails_to_capture` every capture."""

    def __init__(self, cuda: FakeCuda, active: Sequence[str] = (CUDA, CPU)) -> None:
        super().__init__(__version__="1.31.1", SessionOptions=real.SessionOptions, OrtValue=real.OrtValue)
        self.cuda, self.active = cuda, list(active)
        self.runs = self.captures = self.launches = 0
        self.fails = self.fails_to_capture = False
        self.sessions: list[_Session] = []
        self.broken_attention: dict[str, float] = {}  # NaN to raise, or an error, by sdpa_kernel
        self.RunOptions = _RunOptions

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def InferenceSession(self, path: Any, options: Any, providers: list[Any]) -> Any:
        if isinstance(path, bytes):
            return self._attention(path, providers[0][1])
        if providers == [CPU]:
            return real.InferenceSession(path, options, providers=providers)
        self.sessions.append(_Session(self, path, options, dict([providers[0]])[CUDA]))
        return self.sessions[-1]

    def _attention(self, model: bytes, options: dict[str, str]) -> Any:
        """The test of attention, on the CPU, which has no bf16."""
        model = attention_model("fp32") if model == attention_model("bf16") else model
        session = real.InferenceSession(model, providers=[CPU])
        error = self.broken_attention.get(options.get("sdpa_kernel", "0"), 0.0)

        def run(outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            if np.isnan(error):
                raise RuntimeError("CUDA failure 1: invalid argument\nand more")
            return [session.run(None, inputs)[0] + error]

        return SimpleNamespace(run=run, get_providers=lambda: self.active)


class _RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, _Place] = {}
        self.outputs: dict[str, _Place] = {}

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = _Place(element_type, tuple(shape), buffer_ptr)

    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = _Place(element_type, tuple(shape), buffer_ptr)


class _Session:
    def __init__(self, runtime: FakeOnnxRuntime, path: str, options: Any, given: dict[str, str]) -> None:
        assert all(isinstance(value, str) for value in given.values()), "provider options are strings"
        self._runtime, self._name = runtime, path
        self._graph = Graph(path, options)
        self.get_inputs, self.get_outputs = lambda: self._graph.inputs, lambda: self._graph.outputs
        self.stream = int(given["user_compute_stream"])
        self._captures = given["enable_cuda_graph"] == "1"
        self._graphs: dict[tuple[int, str], _Binding] = {}

    def get_providers(self) -> list[str]:
        return self._runtime.active

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: _RunOptions) -> None:
        runtime = self._runtime
        assert options.entries["disable_synchronize_execution_providers"] == "1"
        assert ("gpu_graph_id" in options.entries) == self._captures
        runtime.cuda.check_undisturbing("a run, which may allocate,")
        if runtime.fails:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700\nand more")
        graph = options.entries.get("gpu_graph_id", "-1")
        key = threading.get_ident(), graph
        if graph == "-1":
            runtime.runs += 1
            self._enqueue(binding)
        elif key in self._graphs:
            runtime.launches += 1
            if self._graphs[key].inputs != binding.inputs or self._graphs[key].outputs != binding.outputs:
                raise Misuse("a captured graph is launched for other addresses or shapes")
            self._enqueue(self._graphs[key])
        else:
            self._capture(key, binding)

    def _capture(self, key: tuple[int, str], binding: _Binding) -> None:
        runtime = self._runtime
        if runtime.fails_to_capture:
            raise RuntimeError("CUDA failure 901: operation failed due to a previous error during capture")
        runtime.captures += 1
        kept = _Binding()
        kept.inputs, kept.outputs = dict(binding.inputs), dict(binding.outputs)
        self._graphs[key] = kept
        for _ in range(2):
            self._enqueue(kept)
        with runtime.cuda.captured():
            pass
        self._enqueue(kept)

    def _enqueue(self, binding: _Binding) -> None:
        ins, outs = dict(binding.inputs), dict(binding.outputs)
        accesses = [Access(place.address, place.size, False) for place in ins.values()]
        accesses += [Access(place.address, place.size, True) for place in outs.values()]
        self._runtime.cuda.enqueue(self.stream, self._name, _merged(accesses), lambda: self._compute(ins, outs))

    def _compute(self, ins: dict[str, _Place], outs: dict[str, _Place]) -> None:
        arrays = [{name: place.array for name, place in places.items()} for places in (ins, outs)]
        self._graph.compute(*arrays)


def _merged(accesses: Iterable[Access]) -> list[Access]:
    """Count what is read and written in place as written."""
    written = {(access.address, access.size) for access in accesses if access.writes}
    return [access for access in accesses if access.writes or (access.address, access.size) not in written]
