"""A session's engines on TensorRT: those that `convert --build` made for this GPU."""

from __future__ import annotations

import math
from pathlib import Path

from runtime.bundle.bundle import engine_files
from runtime.cuda.backend import CudaBackend
from runtime.cuda.call import ALIGNMENT
from runtime.cuda.driver import Stream
from runtime.engines.backend import cache_sizes
from runtime.errors import CapacityError, OptionError
from runtime.machine.device import Device
from runtime.tensorrt.engine import TensorRTEngine
from runtime.tensorrt.files import architecture, find_engine, import_tensorrt, read_record


class TensorRTBackend(CudaBackend):
    """On `device`. EngineError where an engine is not built, or only for other weights, another GPU or TensorRT;
    OptionError where the engines take fewer sequences a call than there are slots."""

    _files: dict[str, Path]

    def check_installed(self, device: Device) -> None:
        import_tensorrt()

    def engine(self, name: str, stream: Stream, captures: bool) -> TensorRTEngine:
        return TensorRTEngine(self._files[name], stream, captures)

    def weight_bytes(self) -> int:
        """Every engine has its own."""
        return sum(path.stat().st_size for path in self._files.values())

    def check_memory(self) -> None:
        version, here = str(import_tensorrt().__version__), architecture(self.cuda.index)
        self._files = {
            name: find_engine(self.bundle, name, version, here, self.options.verify)
            for name in (Path(file).stem for file in engine_files(self.manifest))
        }
        slots, manifest = self.options.slots, self.manifest
        records = [read_record(path) for path in self._files.values()]
        most = min(record.plan.profiles[0].ranges["B"][2] for record in records if record is not None)
        if slots > most:
            raise OptionError(
                f"slots is {slots}, and the TensorRT engines of this bundle take {most} sequences a call; "
                f"choose slots={most}, or run: freeexport convert {self.bundle.path} --build {slots}"
            )
        _, _, *shape, dtype = cache_sizes(manifest, manifest.deep_layers, slots, self.capacity)
        size = math.prod(shape) * dtype().itemsize
        if slots > 1 and size % ALIGNMENT:
            raise CapacityError(
                f"a slot of this bundle's KV cache has {size} bytes a layer, no multiple of {ALIGNMENT} as TensorRT "
                "wants it for several slots; choose slots=1, or convert with another --capacity"
            )
        super().check_memory()
