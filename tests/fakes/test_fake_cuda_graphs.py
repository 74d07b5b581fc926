"""The fake of CUDA with graphs has the names and arguments of cuda-python."""

from __future__ import annotations

import inspect

import pytest
from fake_cuda_graphs import GraphCuda, cudaStreamCaptureMode


def test_functions_have_the_arguments_of_the_real_ones() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    functions = [
        name for name, value in vars(GraphCuda).items() if name.startswith("cuda") and inspect.isfunction(value)
    ]
    assert len(functions) > 5
    for name in functions:
        parameters = list(inspect.signature(getattr(GraphCuda, name)).parameters)[1:]
        assert parameters == list(inspect.signature(getattr(real, name)).parameters), name


def test_members_of_the_enumeration_are_real() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for member in cudaStreamCaptureMode:
        assert int(getattr(real.cudaStreamCaptureMode, member.name)) == int(member)


def test_a_device_tells_its_architecture_by_the_names_that_are_read() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    assert {"major", "minor"} <= set(dir(real.cudaDeviceProp))
