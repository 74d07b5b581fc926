"""The engines of a bundle, loaded side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from runtime.bundle.bundle import Bundle, engine_files
from runtime.engines.contract import check_contract
from runtime.engines.onnx import OnnxEngine
from runtime.machine.device import Device

# What takes longest begins first.
ORDER = ("deep", "encoder", "shallow", "prologue")


@contextmanager
def loading(bundle: Bundle, threads: int, device: Device) -> Iterator[Callable[[str], OnnxEngine]]:
    """Load all engines of a bundle, `threads` at a time; what this gives waits for one of them by its name.

    ONNX Runtime packs weights outside the interpreter's lock, so engines, and a tokenizer meanwhile, gain from a second
    core. EngineError where one cannot be loaded, BundleError where it is not the one that the manifest describes.
    """
    names = [name for name in ORDER if f"{name}.onnx" in engine_files(bundle.manifest)]
    with ThreadPoolExecutor(min(threads, len(names)), thread_name_prefix="load") as pool:
        futures = {name: pool.submit(_load, bundle, name, threads, device) for name in names}
        try:
            yield lambda name: futures[name].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _load(bundle: Bundle, name: str, threads: int, device: Device) -> OnnxEngine:
    engine = OnnxEngine(bundle.engine(name), threads, device, kernels=bundle.manifest.kernels)
    check_contract(bundle.manifest, name, engine.session)
    return engine
