"""Engines, caches and encoder of a session on a GPU, with one stream per decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from runtime.bundle.bundle import Bundle
from runtime.engines import onnx
from runtime.engines.backend import Backend, Load
from runtime.engines.contract import check_contract
from runtime.engines.cuda.attention import AttentionKernels, choose_attention
from runtime.engines.cuda.driver import Cuda, CudaStream
from runtime.engines.cuda.onnx_engine import CudaEngine
from runtime.engines.cuda.runner import CudaEncoder, CudaKVCache, CudaRunner
from runtime.engines.kv_cache import CROSS_STEP, KVCache
from runtime.engines.runner import Encoder, Runner
from runtime.errors import DeviceError, OptionError
from runtime.machine.device import Device
from runtime.options.session_options import SessionOptions

logger = logging.getLogger(__name__)


class CudaBackend(Backend):
    """Backend on a CUDA device.

    Raises:
        EngineError: If the installed ONNX Runtime has no CUDA provider, or its attention fails.
        DeviceError: If there is no working device.
        CapacityError: If the device has too little memory. Checked before anything is allocated.
        OptionError: If steps cannot overlap with deep passes, and `overlap` is True.
    """

    cache = CudaKVCache

    def __init__(
        self, bundle: Bundle, options: SessionOptions, capacity: int, threads: int, device: Device
    ) -> None:
        assert device.index is not None
        if options.overlap and bundle.manifest.exit_engine:
            raise OptionError(
                "overlap is True, but the exit of this bundle reads features of deep passes, so "
                "its steps wait for them; leave it out"
            )
        self.check_installed(device)
        self.cuda = Cuda(device.index)
        self._runners: list[CudaRunner] = []
        self._engines: list[Any] = []
        super().__init__(bundle, options, capacity, threads)
        self.attention = self.choose_attention(device)
        self._streams = self.cuda.stream(urgent=True), self.cuda.stream(urgent=False)

    def check_installed(self, device: Device) -> None:
        """Check ONNX Runtime before the driver, because its error says more.

        Raises:
            EngineError: If the installed wheel has no CUDA provider.
        """
        device.providers(onnx.import_onnxruntime(), {})

    def choose_attention(self, device: Device) -> AttentionKernels:
        """Test the attention kernels on the device, for the types and sizes of the bundle."""
        manifest = self.manifest
        rows = self.capacity + manifest.max_pending
        sizes = manifest.kv_heads, manifest.head_dim, rows
        return choose_attention(device, manifest.float_type, *sizes)

    def engine(self, name: str, stream: CudaStream, captures: bool) -> Any:
        """Load an engine for a stream. See `DeviceEngine` for `captures`."""
        engine = CudaEngine(
            self.bundle.engine(name),
            self.threads,
            stream,
            captures=captures,
            attention=self.attention.options,
        )
        check_contract(self.manifest, name, engine.session)
        return engine

    def weight_bytes(self) -> int:
        """Return a lower bound: engines that share weights, such as the head, each load a copy."""
        return self.manifest.weight_bytes

    @contextmanager
    def loading(self, meanwhile: Callable[[], None]) -> Iterator[Load]:
        try:
            meanwhile()
            yield self._load
        except BaseException:
            self._free()
            raise

    def runners(self, engine: Load) -> tuple[Runner, Runner]:
        """Return the runners of the shallow and the deep engine.

        The deep engine runs concurrently unless the option `overlap` is False, or the exit reads
        features of deep passes. Shallow steps have priority, because a token waits for them.
        """
        manifest = self.manifest
        beside = self.options.overlap is not False and not manifest.exit_engine
        shallow = self._cache(manifest.shallow_caches, zeros=self._zeros("shallow"))
        deep = self._cache(manifest.deep_layers, zeros=self._zeros("deep"))
        return (
            self._runner(engine("shallow"), shallow, heads=not manifest.exit_engine),
            self._runner(engine("deep"), deep, beside),
        )

    def exit_runner(self, engine: Load) -> Runner | None:
        if not self.manifest.exit_engine:
            return None
        return self._runner(engine("exit"), self._feature_cache(zeros=self._zeros("exit")))

    def encoder(self, engine: Load, runner: Runner) -> Encoder | None:
        manifest = self.manifest
        if not manifest.encoder_decoder:
            return None
        assert isinstance(runner, CudaRunner)
        encoder = engine("encoder")
        prologue = engine("prologue")
        return CudaEncoder(
            encoder,
            prologue,
            runner,
            longest=manifest.encoder_capacity,
            hidden_size=manifest.hidden_size,
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
        cache = rows * (manifest.kv_bytes_per_token + manifest.feature_bytes_per_token)
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
        captures = name in ("shallow", "exit", "deep") and self.options.cuda_graphs
        engine = self.engine(name, self._stream(name), captures)
        self._engines.append(engine)
        return engine

    def _zeros(self, name: str) -> Callable[..., Any]:
        """Return the allocator of arrays that are used in the stream of an engine."""
        return partial(self.cuda.zeros, stream=self._stream(name))

    def _stream(self, name: str) -> CudaStream:
        # All engines but the deep one share a stream. The shallow engine reads the prologue's
        # results first, and the exit reads the shallow engine's states.
        return self._streams[1] if name == "deep" else self._streams[0]

    def _runner(
        self, engine: Any, cache: KVCache, beside: bool = False, heads: bool = True
    ) -> CudaRunner:
        self._runners.append(CudaRunner(engine, cache, engine.stream, beside=beside, heads=heads))
        return self._runners[-1]
