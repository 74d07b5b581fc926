"""What doctor says about TensorRT: the installed version, and the one that ONNX Runtime's provider is linked to."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from freeexport.system.installation.gpu import TensorRT, check_tensorrt, provider_wants, tensorrt_rows


@pytest.fixture
def provider(tmp_path: Path) -> Path:
    """A library as `readelf` would show it: it needs libnvinfer.so.10."""
    path = tmp_path / "libonnxruntime_providers_tensorrt.so"
    path.write_bytes(b"\x7fELF\0libcudart.so.13\0libnvinfer.so.10\0libnvinfer_plugin.so.10\0")
    return path


def package(version: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    fake = ModuleType("tensorrt")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    return {"tensorrt": version}


def test_a_provider_says_which_major_version_it_loads(provider: Path, tmp_path: Path) -> None:
    assert provider_wants(provider) == 10
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert provider_wants(other) is None
    assert provider_wants(None) is None


def test_a_version_that_builds_and_fits_the_provider_has_no_problem(
    provider: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_tensorrt(package("10.16.1.11", monkeypatch).get, provider)
    assert found == TensorRT("10.16.1.11", wanted=10)
    assert "can build engines" in dict(tensorrt_rows(found))["tensorrt"]
    assert "libnvinfer.so.10 fits" in dict(tensorrt_rows(found))["ONNX Runtime's provider"]


def test_a_newer_major_version_builds_but_does_not_fit_the_provider(
    provider: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check_tensorrt(package("11.4.0.106", monkeypatch).get, provider)
    assert (found.problem, found.wanted) == ("", 10)
    assert found.provider_problem == (
        "it loads libnvinfer.so.10, and 11.4.0.106 is installed; pip install 'tensorrt>=10.15,<11'"
    )


def test_an_older_version_fits_the_provider_but_does_not_build(provider: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_tensorrt(package("10.9.0", monkeypatch).get, provider)
    assert found.provider_problem == ""
    assert "TensorRT 10.9.0 has no KV-cache updates" in found.problem


def test_without_tensorrt_the_provider_has_nothing_to_load(provider: Path) -> None:
    found = check_tensorrt({}.get, provider)
    assert found.version is None
    assert "none is installed; pip install 'tensorrt>=10.15,<11'" in found.provider_problem
    assert dict(tensorrt_rows(found))["tensorrt"] == "not installed"


def test_a_package_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = check_tensorrt({"tensorrt": "11.4.0"}.get)
    assert found.version == "11.4.0"
    assert "cannot be imported" in found.problem
