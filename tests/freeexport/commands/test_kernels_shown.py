"""Kernels that a bundle needs and this machine has, as doctor, inspect and convert say it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME
from command_line import error, invoke, succeed
from handmade_bundle import write_bundle

import runtime.engines.kernels
from freeexport.system.environment import environment
from runtime.bundle.quantization import Quantization
from runtime.engines.kernels import VERSION, kernels_of, missing

CASE = BY_NAME["llama-tied"]
ROUNDED: dict[str, Any] = {"precision": "int8", "quantization": Quantization()}


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime.engines.kernels, "LIBRARY", tmp_path / "missing.so")


def printed(*arguments: str) -> str:
    """Words, wherever the page breaks its lines."""
    result = succeed(*arguments)
    return " ".join(result.stdout.replace("│", " ").split())


@pytest.mark.usefixtures("no_library")
def test_commands_report_slower_kernels_if_the_library_is_missing(
    tmp_path: Path, checkpoint: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ONNX Runtime's slower ones are used" in json.loads(printed("doctor", "--json"))["kernels"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert " slow: freeexport's kernels are not built here (missing.so is missing); install a C++" in printed("doctor")
    assert "no C++ compiler is found here" in json.loads(printed("doctor", "--json"))["kernels"]
    page = printed("inspect", str(write_bundle(tmp_path / "rounded", **ROUNDED)))
    assert "ONNX Runtime's, which are slower; freeexport's kernels are not built" in page
    assert "activations in products int8" in page
    out = convert(checkpoint(CASE), tmp_path / "bundle")
    assert "kernels: ONNX Runtime's, which are slower; freeexport's kernels are not built here" in out
    assert "install a C++ compiler" in out


@pytest.mark.skipif(missing() is not None, reason="the library is not built")
def test_commands_name_the_instruction_set_of_the_library(tmp_path: Path, checkpoint: Callable[[Any], Path]) -> None:
    here = runtime.engines.kernels.instructions()
    assert json.loads(printed("doctor", "--json"))["kernels"] == here
    for needed in (9, VERSION):  # the version that runs, not the oldest that could
        page = printed("inspect", str(write_bundle(tmp_path / str(needed), **ROUNDED, kernels=needed)))
        assert f"freeexport's own, version {VERSION}, with {here} here" in page
    assert f"; version {VERSION + 1} is needed, upgrade freeexport" in kernels_of(VERSION + 1)
    out = convert(checkpoint(CASE), tmp_path / "bundle", "--activations", "int16")
    assert f"kernels: freeexport's own, version {VERSION}, with {here} here" in out
    assert environment()["versions"]["kernels"] == str(VERSION)
    assert "activations in products: int16" in out
    assert "activations in products int16" in printed("inspect", str(tmp_path / "bundle"))
    assert "kernels: ONNX Runtime's\n" in convert(checkpoint(CASE), tmp_path / "other", "--kernels", "onnxruntime")


def test_nothing_is_mentioned_for_an_fp32_bundle(tmp_path: Path) -> None:
    assert "kernels" not in printed("inspect", str(write_bundle(tmp_path / "fp32")))


@pytest.mark.usefixtures("no_library")
def test_bundle_that_cannot_be_verified_here_is_refused_before_long_work(
    tmp_path: Path, checkpoint: Callable[[Any], Path]
) -> None:
    arguments = ["convert", str(checkpoint(CASE)), str(tmp_path / "out"), "--exit-layer", "1", "--precision", "int8"]
    result = invoke(*arguments, "--kernels", "freeexport")
    assert "freeexport's kernels are not built here" in error(result)
    assert not (tmp_path / "out").exists()
    succeed(*arguments, "--kernels", "freeexport", "--verify", "none")


def convert(model: Path, out: Path, *arguments: str) -> str:
    options = ["--exit-layer", "1", "--capacity", "64", "--precision", "int8", "--verify", "none"]
    result = succeed("convert", model, out, *options, *arguments)
    return result.stdout
