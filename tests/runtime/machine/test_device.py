"""A device is the one that was asked for, or an error: ONNX Runtime alone would go on, on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import BY_NAME, Bundles

from runtime import Session
from runtime.engines.onnx import OnnxEngine
from runtime.errors import EngineError, OptionError
from runtime.machine.device import CPU_PROVIDER, CUDA_PROVIDER, Device

LLAMA = BY_NAME["llama-tied"]


@pytest.mark.parametrize(
    ("text", "index"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)], ids=lambda value: str(value)
)
def test_device_name_is_parsed(text: str, index: int | None) -> None:
    assert Device.parse(text) == Device(index)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "", 0])
def test_unknown_device_name_is_refused_with_the_choices(text: str, bundle: Bundles) -> None:
    with pytest.raises(OptionError, match=r"choose 'cpu', or 'cuda:0'"):
        Session(bundle(LLAMA), device=text)


def test_missing_cuda_provider_error_says_what_to_install(bundle: Bundles) -> None:
    with pytest.raises(EngineError, match=r"cuda:0 needs ONNX Runtime with CUDA.*freeexport\[gpu\]"):
        Session(bundle(LLAMA, target="cuda"), device="cuda:0")


def test_cpu_bundle_is_refused_on_a_gpu(bundle: Bundles) -> None:
    with pytest.raises(
        EngineError, match=r"converted for the CPU; for device cuda:1, convert again with --target cuda"
    ):
        Session(bundle(LLAMA), device="cuda:1")


class Runtime(SimpleNamespace):
    """ONNX Runtime with CUDA in the wheel, whose sessions end up on `active`."""

    def __init__(self, active: list[str]) -> None:
        self.asked: list[object] = []
        super().__init__(__version__="1.31.1", get_available_providers=lambda: [CUDA_PROVIDER, CPU_PROVIDER])
        self.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=lambda *_: None)
        self.InferenceSession = lambda path, options, providers: self._session(providers, active)

    def _session(self, providers: list[object], active: list[str]) -> SimpleNamespace:
        self.asked = providers
        return SimpleNamespace(get_providers=lambda: active)


def test_provider_that_fails_to_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime prints a warning and goes on with the CPU where a CUDA library is missing."""
    monkeypatch.setattr("runtime.engines.onnx.import_onnxruntime", lambda: Runtime([CPU_PROVIDER]))
    with pytest.raises(EngineError, match=r"cuda:0 was requested, but .* run deep.onnx on CPUExecutionProvider"):
        OnnxEngine(Path("deep.onnx"), 1, Device(0))


def test_cuda_provider_receives_the_device_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Runtime([CUDA_PROVIDER, CPU_PROVIDER])
    monkeypatch.setattr("runtime.engines.onnx.import_onnxruntime", lambda: fake)
    OnnxEngine(Path("deep.onnx"), 1, Device(2))
    assert fake.asked == [(CUDA_PROVIDER, {"device_id": "2"}), CPU_PROVIDER]
