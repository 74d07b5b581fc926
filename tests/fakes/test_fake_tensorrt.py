"""The fake of `tensorrt` has the names, arguments and enumeration members of NVIDIA's bindings."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fake_tensorrt
import pytest
from fake_cuda import FakeCuda

trt = pytest.importorskip("tensorrt", reason="TensorRT is not installed (tools/gpu/tensorrt_environment.py)")
pytestmark = pytest.mark.tensorrt

CLASSES = {
    "Runtime": fake_tensorrt._Runtime,
    "ICudaEngine": fake_tensorrt._Engine,
    "IExecutionContext": fake_tensorrt._Context,
    "Builder": fake_tensorrt._Builder,
    "IBuilderConfig": fake_tensorrt._Config,
    "IOptimizationProfile": fake_tensorrt._OptimizationProfile,
    "OnnxParser": fake_tensorrt._Parser,
}
METHODS = [
    (name, method)
    for name, fake in CLASSES.items()
    for method, value in vars(fake).items()
    if callable(value) and not method.startswith("_")
]
ENUMERATIONS = {
    "DataType": fake_tensorrt.DataType,
    "TensorIOMode": fake_tensorrt.TensorIOMode,
    "TensorLocation": fake_tensorrt.TensorLocation,
    "ExecutionContextAllocationStrategy": fake_tensorrt.Strategy,
}
# What the code reads or sets, and the fake sets on its instances.
ATTRIBUTES = {
    "ICudaEngine": ["num_io_tensors", "num_optimization_profiles"],
    "IExecutionContext": ["engine"],
    "IBuilderConfig": ["progress_monitor"],
    "OnnxParser": ["num_errors"],
}


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_fake_methods_have_the_real_arguments(name: str, method: str) -> None:
    documentation = getattr(getattr(trt, name), method).__doc__
    overloads = [arguments_of(text) for text in re.findall(rf"{method}\((self: [^\n]*?)\) -> ", documentation)]
    fake = list(inspect.signature(getattr(CLASSES[name], method)).parameters)[1:]
    # Those that the fake leaves out have a default.
    assert any(list(real)[: len(fake)] == fake and all(list(real.values())[len(fake) :]) for real in overloads), (
        fake,
        overloads,
    )


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_fake_enumerations_have_the_real_members(name: str) -> None:
    assert {member.name for member in ENUMERATIONS[name]} <= set(getattr(trt, name).__members__)


@pytest.mark.parametrize(
    ("name", "attribute"), [(name, attribute) for name, found in ATTRIBUTES.items() for attribute in found]
)
def test_fake_attributes_exist_in_tensorrt(name: str, attribute: str) -> None:
    assert hasattr(getattr(trt, name), attribute)


def test_every_public_name_of_the_fake_exists_in_tensorrt() -> None:
    package = vars(fake_tensorrt.fake_tensorrt(FakeCuda()))
    names = {name for name in package if not name.startswith("_")} - {"runs"}
    assert {"Builder", "ILogger", "OnnxParser", "Runtime"} <= names
    assert all(hasattr(trt, name) for name in names)
    assert trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED


def arguments_of(signature: str) -> dict[str, Any]:
    """Names of the arguments after self, and whether each has a default."""
    depth, parts = 0, [""]
    for character in signature:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return {part.split(":")[0].strip(): " = " in part for part in parts[1:]}
