"""TensorRT's Python package, its log, and the GPU that engines are for; or what to install."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError

if TYPE_CHECKING:
    from runtime.cuda.driver import Cuda

logger = logging.getLogger(__name__)

# The first version whose ONNX parser maps TensorScatter to KV-cache updates.
LEAST = (10, 15)
NO_GPU = "nogpu"
INSTALL = "pip install 'freeexport[tensorrt]'"


def import_tensorrt() -> Any:
    """The package `tensorrt`. EngineError where it is missing, does not load, or is too old."""
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be imported ({_first_line(error)}); run: {INSTALL}") from error
    check_version(str(tensorrt.__version__))
    return tensorrt


def check_version(version: str) -> None:
    """EngineError for a version before LEAST."""
    if version_numbers(version)[:2] < LEAST:
        least = ".".join(map(str, LEAST))
        raise EngineError(f"TensorRT {version} has no KV-cache updates; {least} or newer is needed, run: {INSTALL}")


def version_numbers(version: str) -> tuple[int, ...]:
    """11.4.0 -> (11, 4, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def architecture(index: int = 0) -> str:
    """A CUDA device as sm90 and the like; NO_GPU where there is none, or no cuda-python to ask."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return NO_GPU
    failed, properties = runtime.cudaGetDeviceProperties(index)
    return NO_GPU if int(failed) else f"sm{properties.major}{properties.minor}"


def architecture_of(cuda: Cuda) -> str:
    """The architecture of an open device."""
    properties = cuda.call("cudaGetDeviceProperties", cuda.index)
    return f"sm{properties.major}{properties.minor}"


def logger_of(trt: Any) -> Any:
    """TensorRT's messages into Python's logging; `errors` keeps those of severity error."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            logger.debug("TensorRT: %s", message)

        def reason(self) -> str:
            """What it said last, cut to a line."""
            return self.errors[-1][:600] if self.errors else "no reason given"

    return Log()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
