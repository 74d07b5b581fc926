"""Where a bundle runs: the backend of its device, and the capacity of its caches."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.engines import onnx
from runtime.engines.backend import Backend
from runtime.errors import CapacityError
from runtime.machine.device import Device, check_runnable
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


def check_device(device: Device, needed: int = 0, what: str = "") -> None:
    """Check that a GPU, its driver and ONNX Runtime's provider are there. Pass for the CPU.

    Raises:
        EngineError: If the installed ONNX Runtime has no provider for the device.
        DeviceError: If there is no driver, or no such device.
        CapacityError: If less than `needed` bytes of its memory are free.
    """
    if device.index is not None:
        device.providers(onnx.import_onnxruntime(), {})
        require_memory(device.index, needed, what)


def check_bundles(bundles: Sequence[Bundle], device: Device, slots: int = 1) -> None:
    """Check that a GPU can hold sessions of all bundles at once. Allocate nothing.

    On a CPU, sessions check their memory themselves, since engines share the mapped weights.

    Raises:
        EngineError: If the device cannot run a bundle, or packages for it are missing.
        OptionError: If a bundle reads speech and the device is a GPU.
        DeviceError: If there is no such device.
        CapacityError: If it has too little free memory.
    """
    for bundle in bundles:
        check_runnable(bundle.manifest, device)
    if device.index is None:
        return
    options = SessionOptions(device=str(device), slots=slots)
    for bundle in bundles:
        backend = open_backend(bundle, options, bundle.manifest.capacity, 1, device)
        backend.close(lambda: None)
    if len(bundles) > 1:
        manifests = [bundle.manifest for bundle in bundles]
        needed = sum(one.weight_bytes + slots * one.kv_bytes_per_sequence for one in manifests)
        what = f"{needed / 1e6:.1f} MB of weights and KV caches of {len(bundles)} bundles"
        require_memory(device.index, needed, what)


def require_memory(index: int, needed: int, what: str) -> None:
    """Check that a CUDA device has `needed` bytes free for `what`.

    Raises:
        DeviceError: If there is no driver, or no such device.
        CapacityError: If less memory is free.
    """
    from runtime.cuda.driver import Cuda

    cuda = Cuda(index)
    try:
        cuda.require(needed, what)
    finally:
        cuda.close()


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
