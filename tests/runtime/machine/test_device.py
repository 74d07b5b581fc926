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
def test_a_device_is_read_from_its_name(text: str, index: int | None) -> None:
    assert Device.parse(text) == Device(index)


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "", 0])
def test_another_name_is_an_error_that_says_what_to_choose(text: str, bundle: Bundles) -> None:
    with pytest.raises(OptionError, match=r"choose 'cpu', or 'cuda:0'"):
        Session(bundle(LLAMA), device=text)


def test_a_wheel_without_cuda_is_an_error_that_says_what_to_install(bundle: Bundles) -> None:
    with pytest.raises(EngineError, match=r"cuda:0 needs ONNX Runtime with CUDA.*freeexport\[gpu\]"):
        Session(bundle(LLAMA, target="cuda"), device="cuda:0")


def test_a_bundle_for_the_cpu_does_not_run_half_on_the_cpu(bundle: Bundles) -> None:
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


def test_a_provider_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime prints a warning and goes on with the CPU where a CUDA library is missing."""
    monkeypatch.setattr("runtime.engines.onnx.import_onnxruntime", lambda: Runtime([CPU_PROVIDER]))
    with pytest.raises(EngineError, match=r"cuda:0 was requested, but .* run deep.onnx on CPUExecutionProvider"):
        OnnxEngine(Path("deep.onnx"), 1, Device(0))


def test_an_active_provider_is_taken_with_the_device_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Runtime([CUDA_PROVIDER, CPU_PROVIDER])
    monkeypatch.setattr("runtime.engines.onnx.import_onnxruntime", lambda: fake)
    OnnxEngine(Path("deep.onnx"), 1, Device(2))
    assert fake.asked == [(CUDA_PROVIDER, {"device_id": "2"}), CPU_PROVIDER]
