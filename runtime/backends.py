"""Which backend a session runs on: the CPU, CUDA or TensorRT. GPU modules are imported only where one is asked for."""

from __future__ import annotations

from runtime.bundle.bundle import Bundle
from runtime.engines.backend import Placement
from runtime.machine.device import Device
from runtime.options import SessionOptions


def place(bundle: Bundle, options: SessionOptions, capacity: int, threads: int) -> Placement:
    """What the options ask for. Raises CapacityError, EngineError, DeviceError."""
    device = Device.parse(options.device)
    if device.index is None:
        return Placement(bundle, options, capacity, threads)
    if bundle.manifest.target == "tensorrt":
        from runtime.tensorrt.backend import TensorRTPlacement

        return TensorRTPlacement(bundle, options, capacity, threads, device)
    from runtime.cuda.backend import CudaPlacement

    return CudaPlacement(bundle, options, capacity, threads, device)
