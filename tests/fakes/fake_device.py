"""Machines with a GPU that is not there: with TensorRT (`install`), or ONNX Runtime's CUDA provider (`Machine`)."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_onnxruntime import FakeOnnxRuntime
from fake_tensorrt import fake_tensorrt

from runtime.engines.cuda.attention import choose_attention


class Machine:
    """Keyword arguments are those of FakeCuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **options: Any) -> None:
        choose_attention.cache_clear()
        self.cuda = FakeCuda(seed, **options)
        self.onnxruntime = FakeOnnxRuntime(self.cuda)
        monkeypatch.setattr("runtime.engines.cuda.driver._import_runtime", lambda: self.cuda)
        for module in ("runtime.engines.onnx", "runtime.engines.cuda.onnx_engine", "runtime.engines.cuda.attention"):
            monkeypatch.setattr(f"{module}.import_onnxruntime", lambda: self.onnxruntime)


def install(monkeypatch: pytest.MonkeyPatch, seed: int = 0, version: str = "11.4.0.106", **options: Any) -> FakeCuda:
    """The device: `tensorrt` and `cuda.bindings.runtime` are the fakes from here on, also in sys.modules. Keyword
    arguments are those of FakeCuda."""
    fake = FakeCuda(seed, **options)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(fake, version))
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    cuda = ModuleType("cuda")
    cuda.bindings = bindings  # type: ignore[attr-defined]
    for name, module in (("cuda", cuda), ("cuda.bindings", bindings)):
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake
