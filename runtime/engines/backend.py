"""The place of a session's engines, caches and encoder: on the CPU, or on a GPU. All that a session makes once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle, engine_files
from runtime.bundle.manifest import Manifest
from runtime.engines.contract import check_contract
from runtime.engines.kv_cache import FeatureCache, KVCache, check_memory
from runtime.engines.onnx import OnnxEngine, import_onnxruntime
from runtime.engines.runner import Encoder, Runner
from runtime.machine.machine import read_in_large_pages
from runtime.options import SessionOptions

# An engine by its name.
Load = Callable[[str], Any]
# What takes longest begins first.
ORDER = ("deep", "encoder", "shallow", "exit", "prologue")
HEAD_START = 0.01  # seconds


class Backend:
    """On the CPU. `capacity` positions a slot; `threads` of an engine call. CapacityError for too little memory."""

    def __init__(self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int) -> None:
        self.bundle, self.options, self.capacity, self.threads = bundle, options, capacity, threads
        self.check_memory()

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @contextmanager
    def loading(self) -> Iterator[Load]:
        """Load all engines, `threads` at a time, and give what waits for one of them by its name.

        ONNX Runtime packs weights outside the interpreter's lock, so engines, and a tokenizer meanwhile, gain from a
        second core. EngineError where one cannot be loaded, BundleError where it is not that of the manifest.
        """
        names = [name for name in ORDER if f"{name}.onnx" in engine_files(self.manifest)]
        import_onnxruntime()
        with ThreadPoolExecutor(min(self.threads, len(names)), thread_name_prefix="load") as pool:
            if self.manifest.kernels is not None:  # they read their weights where the file is mapped
                for name in self.manifest.files:
                    if name.endswith(".data"):
                        pool.submit(read_in_large_pages, self.bundle.path / name)
            futures = {name: pool.submit(self._load, name) for name in names}
            # A tokenizer is parsed under the interpreter's lock: let engines get into ONNX Runtime, outside it, before.
            wait(futures.values(), timeout=HEAD_START)
            try:
                yield lambda name: futures[name].result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _load(self, name: str) -> Any:
        engine = OnnxEngine(self.bundle.engine(name), self.threads, kernels=self.manifest.kernels)
        check_contract(self.manifest, name, engine.session)
        return engine

    def runners(self, engine: Load) -> tuple[Runner, Runner]:
        """The shallow and the deep one."""
        heads = not self.manifest.exit_engine
        shallow = Runner(engine("shallow"), self._cache(self.manifest.shallow_caches), heads)
        return shallow, Runner(engine("deep"), self._cache(self.manifest.deep_layers))

    def exit_runner(self, engine: Load) -> Runner | None:
        """The exit, where it is an engine of its own."""
        manifest = self.manifest
        if not manifest.exit_engine:
            return None
        sizes = cache_sizes(manifest, manifest.exit_names, self.options.slots, self.capacity)
        return Runner(engine("exit"), FeatureCache(*sizes, width=manifest.hidden_size, embeds=manifest.exit_embeds))

    def encoder(self, engine: Load, runner: Runner) -> Encoder | None:
        """The encoder of an encoder-decoder; its output is read in `runner` first."""
        return Encoder(engine("encoder"), engine("prologue")) if self.manifest.encoder_decoder else None

    def close(self, drain: Callable[[], None]) -> None:
        """Give back what the process keeps otherwise: on the CPU nothing. `drain` waits until nothing is used any more.
        Idempotent."""

    def check_memory(self) -> None:
        """CapacityError where there is too little for what is opened next."""
        check_memory(self.manifest, self.capacity, self.options.slots, self.options.prefix_cache_bytes)

    def _cache(self, layers: Sequence[int | str]) -> KVCache:
        sizes = cache_sizes(self.manifest, layers, self.options.slots, self.capacity)
        return KVCache(*sizes, fixed=self.manifest.target == "tensorrt")


def cache_sizes(
    manifest: Manifest, layers: Sequence[int | str], slots: int, capacity: int
) -> tuple[Sequence[int | str], int, int, int, int, Any]:
    """The first arguments of a KVCache. numpy has no bfloat16: its bits are uint16."""
    dtype = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}[manifest.cache_type]
    return layers, slots, manifest.kv_heads, capacity + manifest.max_pending, manifest.head_dim, dtype
