"""Where a session's engines, caches and encoder stand: on the CPU, or on a GPU. All that a session makes once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.bundle.bundle import Bundle
from runtime.bundle.manifest import Manifest
from runtime.engines.encoder import Encoder
from runtime.engines.kv_cache import KVCache
from runtime.engines.loading import loading
from runtime.engines.memory import check_memory
from runtime.engines.packed_cache import packed_engines
from runtime.engines.runner import Runner
from runtime.machine.device import CPU
from runtime.machine.huge_pages import HugePages
from runtime.options import SessionOptions

# An engine by its name.
Load = Callable[[str], Any]
Sizes = tuple[range, int, int, int, int, Any]


class Backend:
    """On the CPU. `capacity` positions a slot; `threads` of an engine call. CapacityError for too little memory."""

    def __init__(self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int) -> None:
        self.bundle, self.options, self.capacity, self.threads = bundle, options, capacity, threads
        self._check_memory()
        self._huge_pages: HugePages | None = None

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @contextmanager
    def loading(self) -> Iterator[Load]:
        """Gives what gives an engine by its name. EngineError where one cannot be loaded."""
        packed = packed_engines(self.bundle, self.options)
        # Our own kernels pack nothing: it would be the caches that move, whole where they are hardly filled.
        moves = self.options.huge_pages and self.manifest.kernels is None
        self._huge_pages = HugePages() if moves else None
        with loading(self.bundle, self.threads, CPU, packed) as engine:
            yield engine
        if self._huge_pages is not None:
            self._huge_pages.begin()

    def lanes(self, engine: Load) -> tuple[Runner, Runner]:
        """The shallow and the deep one."""
        shallow = Runner(engine("shallow"), self._cache(self.manifest.shallow_layers))
        return shallow, Runner(engine("deep"), self._cache(self.manifest.deep_layers))

    def encoder(self, engine: Load, lane: Runner) -> Encoder | None:
        """Of an encoder-decoder; what it gives is read in `lane` first."""
        return Encoder(engine("encoder"), engine("prologue")) if self.manifest.encoder_decoder else None

    def settle(self) -> None:
        """Wait until what loading left to do beside requests is done."""
        if self._huge_pages is not None:
            self._huge_pages.wait()

    def close(self, drain: Callable[[], None]) -> None:
        """Give back what the process keeps otherwise; `drain` waits until nothing is used any more. Idempotent."""
        if self._huge_pages is not None:
            self._huge_pages.close()

    def _check_memory(self) -> None:
        check_memory(self.manifest, self.capacity, self.options.slots)

    def _cache(self, layers: range) -> KVCache:
        sizes = cache_sizes(self.manifest, layers, self.options.slots, self.capacity)
        return KVCache(*sizes, fixed=is_fixed(self.manifest))


def cache_sizes(manifest: Manifest, layers: range, slots: int, capacity: int) -> Sizes:
    """What a KVCache is made with. numpy has no bfloat16: its bits are uint16."""
    dtype = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32}[manifest.float_type]
    return layers, slots, manifest.kv_heads, capacity + manifest.max_pending, manifest.head_dim, dtype


def is_fixed(manifest: Manifest) -> bool:
    """Whether the graphs take a cache of one length only."""
    return manifest.target == "tensorrt"
