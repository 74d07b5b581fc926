"""A session's engines, caches and encoder on a GPU: a stream for each decoder, everything in the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from runtime.bundle.bundle import Bundle
from runtime.cuda.driver import Cuda, Stream
from runtime.cuda.onnx_engine import CudaEngine
from runtime.cuda.runner import CudaEncoder, CudaKVCache, CudaRunner
from runtime.engines import onnx
from runtime.engines.backend import Backend, Load, cache_sizes
from runtime.engines.contract import check_contract
from runtime.engines.kv_cache import CROSS_STEP
from runtime.engines.runner import Encoder, Runner
from runtime.errors import DeviceError, OptionError
from runtime.machine.device import Device
from runtime.options import SessionOptions

logger = logging.getLogger(__name__)


class CudaBackend(Backend):
    """On `device`. DeviceError where there is none that works; CapacityError before anything is allocated where its
    memory is too little."""

    def __init__(self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int, device: Device) -> None:
        assert device.index is not None
        self.check_installed(device)
        self.cuda = Cuda(device.index)
        self._runners: list[CudaRunner] = []
        self._engines: list[Any] = []
        super().__init__(bundle, options, capacity, threads)
        self._streams = self.cuda.stream(urgent=True), self.cuda.stream(urgent=False)

    def check_installed(self, device: Device) -> None:
        """EngineError for the wrong wheel, which says more than that a driver is missing."""
        device.providers(onnx.import_onnxruntime(), {})

    def engine(self, name: str, stream: Stream, captures: bool) -> Any:
        """Load an engine for a stream; see DeviceEngine."""
        engine = CudaEngine(self.bundle.engine(name), self.threads, stream, captures)
        check_contract(self.manifest, name, engine.session)
        return engine

    def weight_bytes(self) -> int:
        """At least: what two engines share, as the head, each has for itself."""
        return self.manifest.weight_bytes

    @contextmanager
    def loading(self) -> Iterator[Load]:
        try:
            yield self._load
        except BaseException:
            self._free()
            raise

    def runners(self, engine: Load) -> tuple[Runner, Runner]:
        """The deep one runs beside the other unless `overlap` is False. A shallow step goes before a deep pass where
        both are ready: a token waits for it."""
        shallow = self._runner(engine("shallow"), self.manifest.shallow_caches, beside=False)
        beside = self.options.overlap is not False
        return shallow, self._runner(engine("deep"), self.manifest.deep_layers, beside)

    def encoder(self, engine: Load, runner: Runner) -> Encoder | None:
        manifest = self.manifest
        if not manifest.encoder_decoder:
            return None
        assert isinstance(runner, CudaRunner)
        encoder, prologue = engine("encoder"), engine("prologue")
        return CudaEncoder(encoder, prologue, runner, manifest.encoder_capacity, manifest.hidden_size)

    def close(self, drain: Callable[[], None]) -> None:
        try:
            drain()
        except OptionError:
            return  # by a callback of a request, which is not at its end
        self._free()

    def check_memory(self) -> None:
        manifest, slots = self.manifest, self.options.slots
        rows = slots * (self.capacity + manifest.max_pending)
        # A sequence's own, in every width up to the longest, and a padded copy where several share calls.
        longest = manifest.encoder_capacity
        rows += slots * (2 * longest + (longest + CROSS_STEP if slots > 1 else 0)) if longest else 0
        cache, weights = rows * manifest.kv_bytes_per_token, self.weight_bytes()
        what = f"{cache / 1e6:.1f} MB of KV cache ({rows} positions) and {weights / 1e6:.1f} MB of weights"
        logger.info("device %s: %s", self.cuda, what)
        self.cuda.require(cache + weights, what)

    def _free(self) -> None:
        for each in (*self._runners, *self._engines):
            each.close()
        self._runners.clear()
        self._engines.clear()
        with suppress(DeviceError):
            self.cuda.close()

    def _load(self, name: str) -> Any:
        # What comes before the first token goes with the shallow runner, which reads it first.
        engine = self.engine(name, self._streams[name == "deep"], name == "shallow" and self.options.cuda_graphs)
        self._engines.append(engine)
        return engine

    def _runner(self, engine: Any, layers: Sequence[int | str], beside: bool) -> CudaRunner:
        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return self.cuda.zeros(shape, dtype, engine.stream)

        sizes = cache_sizes(self.manifest, layers, self.options.slots, self.capacity)
        cache = CudaKVCache(*sizes, zeros, self.manifest.target == "tensorrt")
        self._runners.append(CudaRunner(engine, cache, engine.stream, beside))
        return self._runners[-1]
