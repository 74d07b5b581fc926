"""Backend of a session: its engines, caches and encoder, all of which are created once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle, engine_files
from runtime.bundle.manifest import Manifest
from runtime.engines.contract import check_contract
from runtime.engines.kv_cache import CacheSizes, FeatureCache, KVCache, check_memory
from runtime.engines.onnx import OnnxEngine, import_onnxruntime
from runtime.engines.runner import Encoder, Runner
from runtime.machine.machine import read_in_large_pages
from runtime.options.session_options import SessionOptions

# Returns an engine by its name.
Load = Callable[[str], Any]
# Loading order, the slowest first.
ORDER = ("deep", "encoder", "shallow", "exit", "prologue")


class Backend:
    """Backend on the CPU.

    Args:
        bundle: The bundle.
        options: Options of the session.
        capacity: Most valid positions per slot.
        threads: Threads per engine call.

    Raises:
        CapacityError: If memory is too small.
    """

    cache: type[KVCache] = KVCache

    def __init__(
        self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int
    ) -> None:
        self.bundle = bundle
        self.options = options
        self.capacity = capacity
        self.threads = threads
        self.check_memory()

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @contextmanager
    def loading(self, meanwhile: Callable[[], None]) -> Iterator[Load]:
        """Context manager: load all engines, `threads` at a time.

        Yields a function that waits for an engine and returns it by its name. ONNX Runtime packs
        weights outside the interpreter's lock, so engines load in parallel, and `meanwhile`, which
        may hold the lock, is called after the first of them.

        Raises:
            EngineError: If an engine cannot be loaded.
            BundleError: If an engine does not match the manifest.
        """
        names = [name for name in ORDER if f"{name}.onnx" in engine_files(self.manifest)]
        import_onnxruntime()
        with ThreadPoolExecutor(min(self.threads, len(names)), thread_name_prefix="load") as pool:
            if self.manifest.kernels is not None:  # weights are read from the mapped file
                for name in self.manifest.files:
                    if name.endswith(".data"):
                        pool.submit(read_in_large_pages, self.bundle.path / name)
            futures = {name: pool.submit(self._load, name) for name in names}
            try:
                futures[names[0]].result()
                meanwhile()
                yield lambda name: futures[name].result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _load(self, name: str) -> Any:
        engine = OnnxEngine(self.bundle.engine(name), self.threads, kernels=self.manifest.kernels)
        check_contract(self.manifest, name, engine.session)
        return engine

    def runners(self, engine: Load) -> tuple[Runner, Runner]:
        """Return the runners of the shallow and the deep engine."""
        heads = not self.manifest.exit_engine
        shallow = Runner(engine("shallow"), self._cache(self.manifest.shallow_caches), heads)
        return shallow, Runner(engine("deep"), self._cache(self.manifest.deep_layers))

    def exit_runner(self, engine: Load) -> Runner | None:
        """Return the runner of the exit's engine. None if the exit is in the shallow engine."""
        manifest = self.manifest
        if not manifest.exit_engine:
            return None
        return Runner(engine("exit"), self._feature_cache())

    def encoder(self, engine: Load, runner: Runner) -> Encoder | None:
        """Return the encoder of an encoder-decoder, whose output is read by `runner` first."""
        if not self.manifest.encoder_decoder:
            return None
        return Encoder(engine("encoder"), engine("prologue"))

    def close(self, drain: Callable[[], None]) -> None:
        """Release what the process would keep. Nothing on the CPU. Idempotent.

        Args:
            drain: Waits until nothing is used any more.
        """

    def check_memory(self) -> None:
        """Check the memory that caches and engines need.

        Raises:
            CapacityError: If it is not available.
        """
        check_memory(
            self.manifest,
            self.capacity,
            self.options.slots,
            prefixes=self.options.prefix_cache_bytes,
        )

    def _cache(self, layers: Sequence[int | str], **others: Any) -> KVCache:
        sizes = cache_sizes(self.manifest, layers, self.options.slots, self.capacity)
        return self.cache(**sizes, fixed=self.manifest.target == "tensorrt", **others)

    def _feature_cache(self, **others: Any) -> FeatureCache:
        manifest = self.manifest
        return FeatureCache(
            **cache_sizes(manifest, manifest.exit_names, self.options.slots, self.capacity),
            fixed=manifest.target == "tensorrt",
            state_size=manifest.hidden_size,
            feature_size=manifest.feature_size,
            embeds=manifest.exit_embeds,
            skips=manifest.exit_skips,
            **others,
        )


def cache_sizes(
    manifest: Manifest, layers: Sequence[int | str], slots: int, capacity: int
) -> CacheSizes:
    """Return the sizes of a KVCache. bfloat16, which numpy lacks, is uint16."""
    types = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "int8": np.int8}
    return {
        "layers": layers,
        "slots": slots,
        "kv_heads": manifest.kv_heads,
        "rows": capacity + manifest.max_pending,
        "width": manifest.cache_width,
        "dtype": types[manifest.cache_type],
    }
