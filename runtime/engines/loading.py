"""The engines of a bundle, loaded side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from runtime.bundle.bundle import Bundle, engine_files
from runtime.engines.contract import check_contract
from runtime.engines.onnx import OnnxEngine
from runtime.errors import EngineError
from runtime.machine.device import Device
from runtime.machine.page_cache import read_in_large_pages

logger = logging.getLogger(__name__)

# What takes longest begins first.
ORDER = ("deep", "encoder", "shallow", "prologue")


@contextmanager
def loading(
    bundle: Bundle, threads: int, device: Device, packed: Path | None = None
) -> Iterator[Callable[[str], OnnxEngine]]:
    """Load all engines of a bundle, `threads` at a time; what this gives waits for one of them by its name.

    ONNX Runtime packs weights outside the interpreter's lock, so engines, and a tokenizer meanwhile, gain from a second
    core. `packed` is a directory of the engine cache to load them from. EngineError where one cannot be loaded,
    BundleError where it is not the one that the manifest describes.
    """
    names = [name for name in ORDER if f"{name}.onnx" in engine_files(bundle.manifest)]
    with ThreadPoolExecutor(min(threads, len(names)), thread_name_prefix="load") as pool:
        if bundle.manifest.kernels is not None:  # which read their weights from the mapped file
            for name in bundle.manifest.files:
                if name.endswith(".data"):
                    pool.submit(read_in_large_pages, bundle.path / name)
        futures = {name: pool.submit(_load, bundle, name, threads, device, packed) for name in names}
        try:
            yield lambda name: futures[name].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _load(bundle: Bundle, name: str, threads: int, device: Device, packed: Path | None) -> OnnxEngine:
    engine = _loaded(bundle.engine(name), threads, device, packed, bundle.manifest.kernels)
    check_contract(bundle.manifest, name, engine.session)
    return engine


def _loaded(path: Path, threads: int, device: Device, packed: Path | None, kernels: int | None) -> OnnxEngine:
    if packed is not None:
        try:
            return OnnxEngine(packed / path.name, threads, device, optimized=True)
        except EngineError as error:
            # ONNX Runtime compares packed weights with what it would pack, so damage is found here.
            logger.warning("the engine cache is not used: %s; run: freeexport cache clear", error)
    return OnnxEngine(path, threads, device, kernels=kernels)
