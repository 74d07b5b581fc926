"""What tools/cuda_provider.py says of what a provider did; the provider itself needs its wheel."""

from __future__ import annotations

from typing import Any

import pytest

from tools.cuda_provider import show

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
