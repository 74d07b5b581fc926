"""Devices for engines: names, ONNX Runtime's providers, and checks that a device is really used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.bundle.manifest import Manifest
from runtime.errors import EngineError, OptionError, shown

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """A device that engines run on.

    Attributes:
        index: Number of a CUDA device. None for the CPU.
    """

    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> Device:
        """Parse `cpu`, `cuda` or `cuda:1`.

        Raises:
            OptionError: For any other value.
        """
        match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", text) if isinstance(text, str) else None
        if match is None:
            raise OptionError(
                f"device is {shown(text)}; choose 'cpu', or 'cuda:0' for the first GPU"
            )
        return cls() if text == "cpu" else cls(int(match[1] or 0))

    def __str__(self) -> str:
        return "cpu" if self.index is None else f"cuda:{self.index}"

    def providers(self, ort: Any, options: Mapping[str, str]) -> list[Any]:
        """Return the providers for ONNX Runtime.

        Operators without a CUDA kernel run on the CPU.

        Args:
            ort: The package onnxruntime.
            options: Options of the CUDA provider.

        Raises:
            EngineError: If the installed wheel has no CUDA provider.
        """
        if self.index is None:
            return [CPU_PROVIDER]
        if CUDA_PROVIDER not in ort.get_available_providers():
            raise EngineError(
                f"device {self} needs ONNX Runtime with CUDA, and the installed version "
                f"{ort.__version__} has none; run: "
                "pip uninstall -y onnxruntime && pip install 'freeexport[gpu]'"
            )
        return [(CUDA_PROVIDER, {"device_id": str(self.index), **options}), CPU_PROVIDER]

    def check_active(self, session: Any, name: str) -> None:
        """Check that a session runs on this device. ONNX Runtime falls back to the CPU with only a
        warning.

        Raises:
            EngineError: If it does not.
        """
        active = session.get_providers()
        if self.index is not None and CUDA_PROVIDER not in active:
            raise EngineError(
                f"device {self} was requested, but ONNX Runtime would run {name} on "
                f"{', '.join(active)}: its CUDA provider does not load; "
                "run freeexport doctor, or choose device='cpu'"
            )


CPU = Device()


def check_runnable(manifest: Manifest, device: Device) -> None:
    """Check that a device can run the graphs of a bundle.

    Raises:
        EngineError: If the device's provider lacks operators for them.
        OptionError: If the bundle reads speech and the device is a GPU.
    """
    if device.index is None and manifest.float_type == "bf16":
        raise EngineError(
            "bf16 engines run on a GPU only; "
            "choose device='cuda:0', or convert with --precision fp32"
        )
    if device.index is not None and manifest.target == "cpu":
        raise EngineError(
            "this bundle was converted for the CPU; "
            f"for device {device}, convert again with --target cuda"
        )
    if manifest.speech is not None and device.index is not None:
        raise OptionError(
            f"device is {str(device)!r}, but speech is supported only on the CPU; leave it out"
        )
