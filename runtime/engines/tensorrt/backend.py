"""Engines of a session on TensorRT, built for this GPU by `convert --build`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.bundle.bundle import engine_files
from runtime.engines.backend import cache_sizes
from runtime.engines.cuda.attention import FUSED, AttentionKernels
from runtime.engines.cuda.backend import CudaBackend
from runtime.engines.cuda.call import ALIGNMENT
from runtime.engines.cuda.driver import CudaStream
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.files import architecture, find_engine, import_tensorrt, read_record
from runtime.errors import CapacityError, OptionError
from runtime.machine.device import Device


class TensorRTBackend(CudaBackend):
    """Backend on a CUDA device with TensorRT engines.

    Raises:
        EngineError: If an engine is not built, or only for other weights, another GPU or TensorRT
            version.
        OptionError: If the engines support fewer sequences per call than there are slots.
        CapacityError: If a slot of the KV cache cannot be aligned, or memory is too small.
    """

    _files: dict[str, Path]

    def check_installed(self, device: Device) -> None:
        import_tensorrt()

    def choose_attention(self, device: Device) -> AttentionKernels:
        return AttentionKernels(FUSED)  # tested by `convert --build`

    def engine(self, name: str, stream: CudaStream, captures: bool) -> TensorRTEngine:
        return TensorRTEngine(self._files[name], stream, captures)

    def weight_bytes(self) -> int:
        """Return the size of all engine files. Every engine has its own weights."""
        return sum(path.stat().st_size for path in self._files.values())

    def check_memory(self) -> None:
        version = str(import_tensorrt().__version__)
        here = architecture(self.cuda.index)
        self._files = {
            name: find_engine(
                self.bundle, name, version, architecture=here, verify=self.options.verify
            )
            for name in (Path(file).stem for file in engine_files(self.manifest))
        }
        slots = self.options.slots
        manifest = self.manifest
        records = [read_record(path) for path in self._files.values()]
        profiles = [record.plan.profiles[0] for record in records if record is not None]
        max_slots = min(profile.ranges["B"][2] for profile in profiles)
        if slots > max_slots:
            raise OptionError(
                f"slots is {slots}, and the TensorRT engines of this bundle take {max_slots} "
                f"sequences per call; choose slots={max_slots}, "
                f"or run: freeexport convert {self.bundle.path} --build {slots}"
            )
        sizes = cache_sizes(manifest, manifest.deep_layers, slots, self.capacity)
        elements = sizes["kv_heads"] * sizes["rows"] * sizes["width"]
        size = elements * np.dtype(sizes["dtype"]).itemsize
        if slots > 1 and size % ALIGNMENT:
            raise CapacityError(
                f"a slot of this bundle's KV cache has {size} bytes per layer, and TensorRT needs "
                f"a multiple of {ALIGNMENT} for several slots; "
                "choose slots=1, or convert with another --capacity"
            )
        super().check_memory()
