"""What tools/gpu/provider.py says of what a provider did; and, where its wheel is, what the provider does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CASES
from conftest import Bundles

from tools.gpu.provider import show

# Too large for continuous integration (256 MB): pip download --no-deps onnxruntime-gpu==1.31.1
WHEEL = "ONNXRUNTIME_GPU_WHEEL"
BY_NAME = {case.name: case for case in CASES}

GOOD: dict[str, Any] = {
    "placed": {"CUDA Attention": 2, "CPU Concat": 1},
    "cache": 4096,
    "run": ["kernel stream 0x1000", "memcpyAsync 64 kind 3 stream 0x1000", "kernel stream 0x1000"],
    "replay": ["graphLaunch 0x1000"],
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"run": ["memcpyAsync 8 kind 1 stream 0x1000"]}, "'copies between host and device': 1"),
        ({"run": ["memcpy SYNC 8 kind 2"]}, "'copies between host and device': 1"),
        ({"run": ["memcpyAsync 4096 kind 3 stream 0x1000"]}, "'copies of a cache': 1"),
        ({"run": ["streamSynchronize 0x1000"]}, "'waits': 1"),
        ({"replay": ["graphLaunch 0x1000", "streamSynchronize 0x1000"]}, "'graph': 1"),
        ({"placed": {"CUDA Add": 1, "CPU Attention": 1}}, "{'Attention'}"),
    ],
)
def test_what_a_run_should_not_do_is_named(
    change: dict[str, Any], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show({"shallow": {**GOOD, **change}}) is (said is not None)
    output = capsys.readouterr().out
    assert (said or "2 kernels, 0 copies between host and device") in output
    assert ("NOT AS IT SHOULD BE" in output) is (said is not None)


@pytest.mark.slow
@pytest.mark.skipif(WHEEL not in os.environ, reason=f"{WHEEL} names no wheel of onnxruntime-gpu")
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "int8"}, {"precision": "int4"}], ids=str)
@pytest.mark.parametrize("name", ["t5-relu-tied", "llama-tied"])
def test_the_provider_itself_puts_kernels_into_the_stream_and_nothing_else(
    name: str, options: dict[str, str], bundle: Bundles
) -> None:
    path = bundle(BY_NAME[name], target="cuda", **options)
    command = [sys.executable, "-m", "tools.gpu.provider", str(path), "--wheel", os.environ[WHEEL]]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "a captured run is graphLaunch" in result.stdout
