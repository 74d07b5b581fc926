"""Devices that engines run on: a name, ONNX Runtime's provider for it, and proof that it is the one that runs them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.bundle.manifest import Manifest
from runtime.errors import EngineError, OptionError, shown

CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """The CPU, or with an `index` a CUDA device."""

    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Device:
        """`cpu`, `cuda` or `cuda:1`. OptionError for anything else."""
        found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text) if isinstance(text, str) else None
        if found is None:
            raise OptionError(f"device is {shown(text)}; choose 'cpu', or 'cuda:0' for the first GPU")
        return cls() if text == "cpu" else cls(int(found[1] or 0))

    def __str__(self) -> str:
        return "cpu" if self.index is None else f"cuda:{self.index}"

    def providers(self, ort: Any, options: Mapping[str, str]) -> list[Any]:
        """For ONNX Runtime, which puts on the CPU what its CUDA provider has no operator for. `options` of that
        provider. EngineError where the installed wheel has no such provider."""
        if self.index is None:
            return [CPU_PROVIDER]
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise EngineError(
                f"device {self} needs ONNX Runtime with CUDA, and version {ort.__version__} here has none; run: "
                "pip uninstall -y onnxruntime && pip install 'freeexport[gpu]'"
            )
        return [(CUDA_PROVIDER, {"device_id": str(self.index), **options}), CPU_PROVIDER]

    def check_active(self, session: Any, name: str) -> None:
        """EngineError where ONNX Runtime fell back to the CPU, which it does with a warning."""
        active = session.get_providers()
        if self.index is not None and CUDA_PROVIDER not in active:
            raise EngineError(
                f"device {self} was asked for, but ONNX Runtime would run {name} on {', '.join(active)}: its CUDA "
                "provider does not load here; run freeexport doctor, or choose device='cpu'"
            )


CPU = Device()


def check_runnable(manifest: Manifest, device: Device) -> None:
    """EngineError for a bundle whose graphs this device's provider has no operators for."""
    if device.index is None and manifest.float_type == "bf16":
        raise EngineError("bf16 engines run on a GPU only; choose device='cuda:0', or convert with --precision fp32")
    if device.index is not None and manifest.target == "cpu":
        raise EngineError(
            f"this bundle was converted for the CPU; for device {device} convert again with --target cuda"
        )
