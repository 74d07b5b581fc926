from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from freeexport import cli
from freeexport.commands import doctor
from freeexport.system.installation import report as installation
from freeexport.system.installation.extras import extras
from freeexport.system.installation.report import (
    Provider,
    examine,
    missing_extras,
    probe_onnxruntime,
    probe_provider,
    wheel_problems,
)

ALL_OF_CONVERT = dict.fromkeys(extras()["convert"], "1.0")


def fake_onnxruntime(working: Collection[str], silent: Collection[str] = ()) -> Any:
    """An onnxruntime in which only `working` providers run; `silent` ones fall back without an error."""

    class InferenceSession:
        def __init__(self, model: bytes, options: Any, providers: list[str], enable_fallback: int) -> None:
            if not {*providers} <= {*working, *silent}:
                raise RuntimeError("libcublas.so.12 not found\nand pages more")
            self.providers = [name for name in providers if name in working]

        def get_providers(self) -> list[str]:
            return [*self.providers, "CPUExecutionProvider"]

        def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
            return [feeds["x"] * 2]

    return SimpleNamespace(
        InferenceSession=InferenceSession,
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda key, value: None),
        set_default_logger_severity=lambda level: None,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )


def test_neither_wheel_is_a_problem_with_a_command() -> None:
    report = examine({}.get)
    assert not report.ok
    assert report.wheels == {}
    assert report.providers == ()
    assert "pip install 'freeexport[cpu]'" in report.problems[0]


def test_both_wheels_are_a_problem_with_a_command() -> None:
    report = examine({"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}.get)
    assert not report.ok
    remove, _, install = report.problems[0].partition(" && ")
    assert remove.endswith("pip uninstall -y onnxruntime onnxruntime-gpu")
    assert install == "pip install 'freeexport[gpu]'"


@pytest.mark.parametrize("wheel", installation.WHEELS)
def test_one_wheel_is_no_problem(wheel: str) -> None:
    assert wheel_problems({wheel: "1.32.0"}) == ()


def test_this_installation_can_decode_on_the_cpu() -> None:
    pytest.importorskip("onnxruntime")
    report = examine()
    assert report.ok
    assert Provider("CPUExecutionProvider", True) in report.providers
    assert report.packages["numpy"] == np.__version__


def test_a_wheel_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # what an overwritten wheel leaves behind
    providers, problems = probe_onnxruntime("onnxruntime-gpu")
    assert providers == ()
    assert "pip install --force-reinstall --no-deps onnxruntime-gpu" in problems[0]


def test_a_provider_that_raises_is_not_usable() -> None:
    ort = fake_onnxruntime(working={"CPUExecutionProvider"})
    provider = probe_provider(ort, "CUDAExecutionProvider")
    assert provider == Provider("CUDAExecutionProvider", False, "libcublas.so.12 not found")


def test_a_provider_that_falls_back_silently_is_not_usable() -> None:
    ort = fake_onnxruntime(working={"CPUExecutionProvider"}, silent={"CUDAExecutionProvider"})
    assert not probe_provider(ort, "CUDAExecutionProvider").usable


def test_one_working_provider_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(working={"CPUExecutionProvider"}))
    providers, problems = probe_onnxruntime("onnxruntime-gpu")
    assert [provider.usable for provider in providers] == [False, True]
    assert problems == ()


def test_no_working_provider_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(working=()))
    _, problems = probe_onnxruntime("onnxruntime")
    assert "no execution provider" in problems[0]


def test_missing_extras_name_packages_and_command() -> None:
    missing = {item.extra: item for item in missing_extras({"onnxruntime": "1", **ALL_OF_CONVERT, "torch": ""}.get)}
    assert missing["convert"].packages == ("torch",)
    assert missing["convert"].command == "pip install 'freeexport[convert]'"
    assert "cpu" not in missing
    assert "gpu" not in missing


def test_without_a_wheel_cpu_and_gpu_are_both_missing() -> None:
    extras = [item.extra for item in missing_extras(ALL_OF_CONVERT.get)]
    assert extras[:2] == ["cpu", "gpu"]
    assert "convert" not in extras


def test_page_shows_versions_problems_and_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: examine({"torch": "2.13.0"}.get))
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1
    assert "2.13.0" in result.stdout
    assert "not installed" in result.stdout
    assert "problem: ONNX Runtime is not installed; run: pip install 'freeexport[cpu]'" in result.stdout
    assert "can decode" not in result.stdout


def test_json_holds_the_whole_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: examine({}.get))
    result = CliRunner().invoke(cli.main, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["ok"] is False
    assert report["machine"]["usable_cores"] >= 1
    assert report["problems"]
    assert {item["extra"] for item in report["missing"]} >= {"cpu", "convert"}


def test_doctor_imports_no_torch() -> None:
    code = (
        "import sys; from freeexport.system.installation.report import examine; examine(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
