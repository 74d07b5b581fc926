"""Where a bundle runs: the backend of its device, and the capacity of its caches."""

from __future__ import annotations

from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.engines.backend import Backend
from runtime.errors import CapacityError
from runtime.machine.device import Device
from runtime.options import SessionOptions


def open_backend(
    bundle: Bundle, options: SessionOptions, capacity: int, threads: int, device: Device
) -> Backend:
    """Open the backend for the device.

    Raises:
        CapacityError: If the KV cache does not fit into memory.
        EngineError: If an engine cannot be loaded.
        DeviceError: If the device is not usable.
    """
    if device.index is None:
        return Backend(bundle, options, capacity, threads)
    if bundle.manifest.target == "tensorrt":
        from runtime.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(bundle, options, capacity, threads, device)
    from runtime.cuda.backend import CudaBackend

    return CudaBackend(bundle, options, capacity, threads, device)


def capacity_of(manifest: Manifest, wanted: int | None) -> int:
    """Return the positions per slot. Default: as many as the bundle was converted for.

    Raises:
        CapacityError: If the bundle does not support `wanted` positions.
    """
    if wanted is not None and wanted > manifest.capacity:
        raise CapacityError(
            f"capacity {wanted} is more than the {manifest.capacity} positions this bundle was "
            "converted for; lower it, or convert with --capacity"
        )
    if wanted not in (None, manifest.capacity) and manifest.target == "tensorrt":
        raise CapacityError(
            f"capacity {wanted} is not the {manifest.capacity} positions that the graphs of this "
            "bundle are fixed to; leave it out, or convert with --capacity"
        )
    return wanted or manifest.capacity
