"""TensorRT's Python package and the GPU it builds for, or what to install."""

from __future__ import annotations

import re
from typing import Any

from graphs.errors import BuildError

# The first version whose ONNX parser maps TensorScatter to KV-cache updates.
LEAST = (10, 15)
NO_GPU = "nogpu"
INSTALL = "pip install 'freeexport[tensorrt]'"


def import_tensorrt() -> Any:
    """The package `tensorrt`. BuildError where it is missing, does not load, or is too old."""
    try:
        import tensorrt
    except ImportError as error:
        raise BuildError(f"TensorRT cannot be imported ({_first_line(error)}); run: {INSTALL}") from error
    check_version(str(tensorrt.__version__))
    return tensorrt


def check_version(version: str) -> None:
    """BuildError for a version before LEAST."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < LEAST:
        least = ".".join(map(str, LEAST))
        raise BuildError(f"TensorRT {version} has no KV-cache updates; {least} or newer is needed, run: {INSTALL}")


def architecture() -> str:
    """The first CUDA device as sm90 and the like; NO_GPU where there is none, or no cuda-python to ask."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return NO_GPU
    failed, properties = runtime.cudaGetDeviceProperties(0)
    return NO_GPU if int(failed) else f"sm{properties.major}{properties.minor}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
