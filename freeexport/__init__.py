"""The pipeline around early-exit bundles: convert, verify, generate, and the command line.

`from freeexport import Session` is `from runtime import Session`, and so for every public name of `runtime`: they are
imported when they are first used, without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import (
        AsyncStream,
        BatchError,
        Bundle,
        BundleError,
        CacheError,
        CalibrationError,
        CapacityError,
        DeviceError,
        EngineError,
        FreeExportError,
        GenerationOptions,
        GenerationResult,
        Histogram,
        Metrics,
        OptionError,
        PromptError,
        PromptLengthError,
        QueueFullError,
        RequestEvent,
        Session,
        SessionOptions,
        Stats,
        Stream,
        Token,
    )

__version__ = "0.2.0"

__all__ = [
    "AsyncStream",
    "BatchError",
    "Bundle",
    "BundleError",
    "CacheError",
    "CalibrationError",
    "CapacityError",
    "DeviceError",
    "EngineError",
    "FreeExportError",
    "GenerationOptions",
    "GenerationResult",
    "Histogram",
    "Metrics",
    "OptionError",
    "PromptError",
    "PromptLengthError",
    "QueueFullError",
    "RequestEvent",
    "Session",
    "SessionOptions",
    "Stats",
    "Stream",
    "Token",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import runtime

    if not hasattr(runtime, name):
        place = runtime.__file__ or next(iter(runtime.__path__), "another folder")
        raise ImportError(
            f"{place} hides the package runtime that freeexport installs; rename it, or run from another folder"
        )
    return getattr(runtime, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
