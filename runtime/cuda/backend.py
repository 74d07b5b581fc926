"""Engines, caches and encoder of a session on a GPU, with one stream per decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from runtime.bundle.bundle import Bundle
from runtime.cuda.driver import Cuda, CudaStream
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
    """Backend on a CUDA device.

    Raises:
        EngineError: If the installed ONNX Runtime has no CUDA provider.
        DeviceError: If there is no working device.
        CapacityError: If the device has too little memory. Checked before anything is allocated.
    """

    def __init__(
        self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int, device: Device
    ) -> None:
        assert device.index is not None
        self.check_installed(device)
        self.cuda = Cuda(device.index)
        self._runners: list[CudaRunner] = []
        self._engines: list[Any] = []
        super().__init__(bundle, options, capacity, threads)
        self._streams = self.cuda.stream(urgent=True), self.cuda.stream(urgent=False)

    def check_installed(self, device: Device) -> None:
        """Check ONNX Runtime before the driver, because its error says more.

        Raises:
            EngineError: If the installed wheel has no CUDA provider.
        """
        device.providers(onnx.import_onnxruntime(), {})

    def engine(self, name: str, stream: CudaStream, captures: bool) -> Any:
        """Load an engine for a stream. See `DeviceEngine` for `captures`."""
        engine = CudaEngine(self.bundle.engine(name), self.threads, stream, captures)
        check_contract(self.manifest, name, engine.session)
        return engine

    def weight_bytes(self) -> int:
        """Return a lower bound: engines that share weights, such as the head, each load a copy."""
        return self.manifest.weight_bytes

    @contextmanager
    def loading(self) -> Iterator[Load]:
        try:
            yield self._load
        except BaseException:
            self._free()
            raise

    def runners(self, engine: Load) -> tuple[Runner, Runner]:
        """Return the runners of the shallow and the deep engine.

        The deep engine runs concurrently unless the option `overlap` is False. Shallow steps have
        priority, because a token waits for them.
        """
        shallow = self._runner(engine("shallow"), self.manifest.shallow_caches, beside=False)
        beside = self.options.overlap is not False
        return shallow, self._runner(engine("deep"), self.manifest.deep_layers, beside)

    def encoder(self, engine: Load, runner: Runner) -> Encoder | None:
        manifest = self.manifest
        if not manifest.encoder_decoder:
            return None
        assert isinstance(runner, CudaRunner)
        encoder = engine("encoder")
        prologue = engine("prologue")
        return CudaEncoder(
            encoder, prologue, runner, manifest.encoder_capacity, manifest.hidden_size
        )

    def close(self, drain: Callable[[], None]) -> None:
        try:
            drain()
        except OptionError:
            return  # called from a callback of a request that is still running
        self._free()

    def check_memory(self) -> None:
        manifest = self.manifest
        slots = self.options.slots
        rows = slots * (self.capacity + manifest.max_pending)
        longest = manifest.encoder_capacity
        if longest:
            # Cross-attention: every sequence's arrays, in all widths up to the longest.
            rows += slots * 2 * longest
        if longest and slots > 1:
            # And a padded copy for sequences that share calls.
            rows += slots * (longest + CROSS_STEP)
        cache = rows * manifest.kv_bytes_per_token
        weights = self.weight_bytes()
        what = (
            f"{cache / 1e6:.1f} MB of KV cache ({rows} positions) "
            f"and {weights / 1e6:.1f} MB of weights"
        )
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
        # Encoder and prologue share the stream of the shallow engine, which reads their results
        # first.
        stream = self._streams[1] if name == "deep" else self._streams[0]
        captures = name == "shallow" and self.options.cuda_graphs
        engine = self.engine(name, stream, captures)
        self._engines.append(engine)
        return engine

    def _runner(self, engine: Any, layers: Sequence[int | str], beside: bool) -> CudaRunner:
        def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
            return self.cuda.zeros(shape, dtype, engine.stream)

        sizes = cache_sizes(self.manifest, layers, self.options.slots, self.capacity)
        fixed = self.manifest.target == "tensorrt"
        cache = CudaKVCache(**sizes, zeros=zeros, fixed=fixed)
        self._runners.append(CudaRunner(engine, cache, engine.stream, beside))
        return self._runners[-1]
