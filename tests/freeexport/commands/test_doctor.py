"""Reports of doctor: wheels, providers, CUDA, TensorRT, extras; and what to do about each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_line import invoke
from fake_device import Machine

from freeexport.commands import doctor
from freeexport.commands.doctor import (
    WHEELS,
    check_attention,
    check_cuda,
    check_tensorrt,
    examine,
    probe_onnxruntime,
    provider_problem,
    wheel_problems,
)

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def fake_onnxruntime(working: Collection[str], silent: Collection[str] = ()) -> Any:
    """An onnxruntime in which only `working` providers run; `silent` ones fall back without an error."""

    class InferenceSession:
        def __init__(self, model: bytes, options: Any, providers: list[str], enable_fallback: int) -> None:
            if not {*providers} <= {*working, *silent}:
                raise RuntimeError("libcublas.so.12 not found\nand pages more")
            self.providers = [name for name in providers if name in working]

        def get_providers(self) -> list[str]:
            return [*self.providers, CPU]

        def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
            return [feeds["x"] * 2]

    return SimpleNamespace(
        InferenceSession=InferenceSession,
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda key, value: None),
        set_default_logger_severity=lambda level: None,
        get_available_providers=lambda: [CUDA, CPU],
    )


def test_zero_or_two_onnxruntime_wheels_are_reported_with_a_command() -> None:
    report = examine({}.get)
    assert (report["ok"], report["wheels"], report["providers"]) == (False, {}, [])
    assert "pip install 'freeexport[cpu]'" in report["problems"][0]
    report = examine({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}.get)
    assert not report["ok"]
    remove, _, install = report["problems"][0].partition(" && ")
    assert remove.endswith("pip uninstall -y onnxruntime onnxruntime-gpu")
    assert install == "pip install 'freeexport[gpu]'"
    assert all(wheel_problems([wheel]) == [] for wheel in WHEELS)


def test_this_installation_can_decode_on_the_cpu() -> None:
    report = examine()
    assert report["ok"]
    assert {"name": CPU, "usable": True, "problem": ""} in report["providers"]
    assert report["packages"]["numpy"] == np.__version__


def test_wheel_that_fails_to_import_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # what an overwritten wheel leaves behind
    providers, problems = probe_onnxruntime("onnxruntime-gpu")
    assert providers == []
    assert "pip install --force-reinstall --no-deps onnxruntime-gpu" in problems[0]


def test_provider_that_raises_or_falls_back_is_not_usable() -> None:
    assert provider_problem(fake_onnxruntime({CPU}), CUDA) == "libcublas.so.12 not found"
    assert provider_problem(fake_onnxruntime({CPU}, silent={CUDA}), CUDA)


def test_page_and_json_show_versions_problems_and_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: examine({"torch": "2.13.0", "cuda-bindings": "13"}.get))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "2.13.0" in result.stdout
    assert "not installed" in result.stdout
    assert "problem: ONNX Runtime is not installed; run: pip install 'freeexport[cpu]'" in result.stdout
    assert "can decode" not in result.stdout
    assert "CUDA" not in result.stdout
    result = invoke("doctor", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (1, False)
    assert report["machine"]["usable_cores"] >= 1
    assert report["problems"]
    assert {item["extra"] for item in report["missing"]} >= {"cpu", "convert"}


def test_doctor_imports_no_torch() -> None:
    code = "import sys; from freeexport.commands.doctor import examine; examine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


REQUIRES = ["numpy>=1.21.6", 'nvidia-cudnn-cu13~=9.0; extra == "cudnn"']


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({}, "fused"),
        ({"0": 1.0}, "unfused, because fused: results differ by 1 for 4 heads and 1 queries"),
        ({"0": 1.0, "16": 1.0}, "attention does not work on device cuda:0 in fp16"),
    ],
)
def test_attention_on_a_gpu_is_tested(broken: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch).onnxruntime.broken_attention = broken
    found = check_attention([{"name": CUDA, "usable": True}])
    assert found is not None
    assert found.startswith(said)
    device = check_cuda({}.get) | {"attention": found}
    assert ("attention", found) in doctor._cuda_rows(device)
    assert check_attention([{"name": CUDA, "usable": False}, {"name": CPU, "usable": True}]) is None


WHOLE = {"onnxruntime-gpu": "1.31.1", "cuda-bindings": "13.5.0", "nvidia-cudnn-cu13": "9.14"}


@pytest.mark.parametrize(
    ("missing", "driver", "problem"),
    [
        (None, 13000, None),
        (None, 12040, "requires CUDA 13.0, but the driver supports up to 12.4; install a newer driver"),
        (None, 0, "no NVIDIA driver is loaded"),
        ("cuda-bindings", 0, "require cuda-python; pip install 'freeexport[gpu]'"),
        ("nvidia-cudnn-cu13", 13000, "cuDNN 9 is not installed as a package"),
    ],
)
def test_cuda_mismatch_is_reported_with_a_remedy(
    missing: str | None, driver: int, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_built_for", lambda: "13.0")
    monkeypatch.setattr(doctor, "_driver_version", lambda: driver)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: REQUIRES)
    found = check_cuda({name: version for name, version in WHOLE.items() if name != missing}.get)
    rows = doctor._cuda_rows(found)
    assert ("onnxruntime-gpu", "built for CUDA 13.0, cuDNN 9") in rows
    if problem is None:
        assert found == {"wanted": "13.0", "cudnn": "9", "driver": "13.0", "bindings": "13.5.0", "problems": []}
    else:
        (line,) = found["problems"]
        assert problem in line
        assert ("does not fit", line) in rows


@pytest.mark.parametrize(
    ("version", "loads", "problem"),
    [
        (None, True, ""),
        ("10.16.1.11", True, ""),
        ("10.9.0", True, "TensorRT 10.9.0 does not support KV-cache updates"),
        ("11.4.0", False, "cannot be imported"),
    ],
)
def test_tensorrt_that_cannot_build_is_reported_with_the_reason(
    version: str | None, loads: bool, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = ModuleType("tensorrt")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", fake if loads else None)
    found = check_tensorrt(({"tensorrt": version} if version else {}).get)
    assert found["version"] == version
    assert bool(found["problem"]) == bool(problem)
    assert problem in str(found["problem"])
