"""A machine with a GPU: `tensorrt` and `cuda.bindings.runtime` are the fakes from here on."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from fake_cuda_graphs import GraphCuda
from fake_tensorrt import fake_tensorrt


def install(monkeypatch: pytest.MonkeyPatch, seed: int = 0, version: str = "11.4.0.106", **options: Any) -> GraphCuda:
    """The device. Keyword arguments are those of GraphCuda. Its package `tensorrt` is in sys.modules."""
    fake = GraphCuda(seed, **options)
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
