"""The backend that a session runs on: the CPU, CUDA or TensorRT. GPU modules are imported only where one is asked
for."""

from __future__ import annotations

from runtime.bundle.bundle import Bundle
from runtime.engines.backend import Backend
from runtime.machine.device import Device
from runtime.options import SessionOptions


def open_backend(bundle: Bundle, options: SessionOptions, capacity: int, threads: int) -> Backend:
    """Open the backend that the options ask for. Raises CapacityError, EngineError, DeviceError."""
    device = Device.parse(options.device)
    if device.index is None:
        return Backend(bundle, options, capacity, threads)
    if bundle.manifest.target == "tensorrt":
        from runtime.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(bundle, options, capacity, threads, device)
    from runtime.cuda.backend import CudaBackend

    return CudaBackend(bundle, options, capacity, threads, device)
