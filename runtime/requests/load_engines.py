"""Where a bundle runs: the backend of its device, its engines, and the capacity of its caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.decoding.decoder import Decoder
from runtime.decoding.feature_decoder import FeatureDecoder
from runtime.decoding.overlapping import OverlappingDecoder
from runtime.engines import onnx
from runtime.engines.backend import Backend
from runtime.engines.kv_cache import CrossCache
from runtime.engines.runner import Encoder, Runner
from runtime.errors import CapacityError
from runtime.machine.device import Device, check_runnable
from runtime.options.session_options import SessionOptions
from runtime.requests.batching import BatchedCall


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
        from runtime.engines.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(bundle, options, capacity, threads=threads, device=device)
    from runtime.engines.cuda.backend import CudaBackend

    return CudaBackend(bundle, options, capacity, threads=threads, device=device)


@dataclass(frozen=True, eq=False)
class LoadedEngines:
    """The loaded engines of a session.

    Attributes:
        shallow: Runs the shallow engine.
        deep: Runs the deep engine.
        encoder: Runs the encoder. None for decoder-only models.
        decoders: The decoder of each slot.
        batches: Combines the calls of several slots, for each runner.
        cross: Cross-attention of the prompts in the slots.
    """

    shallow: Runner
    deep: Runner
    encoder: Encoder | None
    decoders: list[Decoder]
    batches: dict[Runner, BatchedCall]
    cross: CrossCache


def load_engines(
    backend: Backend,
    slots: int,
    meanwhile: Callable[[], None],
    decoder_type: Callable[..., Decoder] | None = None,
) -> LoadedEngines:
    """Load the engines of a bundle, and create a decoder for each slot.

    Args:
        backend: The backend.
        slots: Number of slots.
        meanwhile: Called while engines are loaded.
        decoder_type: Creates the decoders, unless passes overlap. Default: the type for the bundle.

    Raises:
        EngineError: If an engine cannot be loaded.
        BundleError: If an engine does not match the manifest.
    """
    manifest = backend.manifest
    with backend.loading(meanwhile) as engine:
        shallow, deep = backend.runners(engine)
        encoder = backend.encoder(engine, shallow)
        exit = backend.exit_runner(engine)
    if deep.beside:
        decoder_type = OverlappingDecoder
    elif exit is not None:
        decoder_type = partial(decoder_type or FeatureDecoder, exit=exit)
    else:
        decoder_type = decoder_type or Decoder
    sizes = {"hidden_size": manifest.hidden_size, "vocab_size": manifest.vocab_size}
    decoders = [
        decoder_type(shallow, deep, slot, max_pending=manifest.max_pending, **sizes)
        for slot in range(slots)
    ]
    cross = CrossCache(slots, shallow.zeros)
    batches = {
        runner: BatchedCall(runner, cross, **sizes, feature_size=manifest.feature_size)
        for runner in (shallow, exit, deep)
        if runner is not None
    }
    return LoadedEngines(shallow, deep, encoder, decoders=decoders, batches=batches, cross=cross)


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
        backend = open_backend(bundle, options, bundle.manifest.capacity, threads=1, device=device)
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
    from runtime.engines.cuda.driver import Cuda

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
