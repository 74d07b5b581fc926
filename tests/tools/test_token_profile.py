"""Profiles of a token: ONNX Runtime's notes of each kernel, added up by operator and shape."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoints import CASES, Bundles
from click.testing import CliRunner

from runtime import Bundle
from tools.token_profile import Kernel, calls, main, profile, table, typical

BY_NAME = {case.name: case for case in CASES}


def kernel(operator: str, start: int, microseconds: int, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
    shapes = {"input_type_shape": [{"float": inputs}], "output_type_shape": [{"float": outputs}]}
    args = {"op_name": operator, **shapes}
    return {"cat": "Node", "name": f"node_{start}_kernel_time", "ts": start, "dur": microseconds, "args": args}


def run(start: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start - 1, "dur": 1800, "args": {}}


def call(start: int, product: int) -> list[dict[str, Any]]:
    """Two products and ten reshapes of 3 microseconds, then the call that they belong to."""
    events = [kernel("Gemm", start + 100 * number, product, [1, 8], [1, 16]) for number in range(2)]
    events += [kernel("Reshape", start + 300 + 10 * number, 3, [1, 8], [1, 1, 8]) for number in range(10)]
    return [*events, run(start)]


def test_a_call_is_the_median_one_without_what_noting_took() -> None:
    found = calls([*call(2000, 40), *call(4000, 50), *call(6000, 900)])
    assert [len(kernels) for kernels in found] == [12, 12, 12]
    assert {event["dur"] for event in found[1]} == {50, 3}
    (product, reshape), noting = typical(found)
    assert noting == pytest.approx(3e-6)
    assert product == Kernel("Gemm", "8 -> 16", 2, pytest.approx(94e-6))
    assert reshape == Kernel("Reshape", "", 10, 0)
    assert (product.kind, reshape.kind) == ("products", "glue")


def test_a_bundle_is_profiled_kernel_by_kernel(bundle: Bundles) -> None:
    path = bundle(BY_NAME["llama-tied"])
    found = profile(path, 1, 6, 8)
    attended = [one for kernels in found.kernels.values() for one in kernels if one.kind == "attention"]
    assert sum(one.count for one in attended) == Bundle.open(path).manifest.layers
    assert set(found.engines) == {"shallow", "deep"}
    assert found.token > sum(found.engines.values()) > 0
    assert found.opened > 0
    shown = table(found, 0)
    assert "GroupQueryAttention" in shown
    assert "between them" in shown


def test_the_command_prints_a_table(bundle: Bundles) -> None:
    path = str(bundle(BY_NAME["t5-relu-tied"]))
    result = CliRunner().invoke(main, [path, "--tokens", "6", "--context", "4", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "1 thread(s)" in result.output
    for operator in ("GroupQueryAttention", "MultiHeadAttention", "Gemm"):
        assert operator in result.output
    few = CliRunner().invoke(main, [path, "--tokens", "2"])
    assert "4 or more" in str(few.exception)
