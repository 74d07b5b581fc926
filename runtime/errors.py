"""Exceptions. Every message states the problem, the value, and what to do."""

from __future__ import annotations

from typing import Any


class FreeExportError(Exception):
    """Base class of the errors that this project raises on purpose. Messages are one line."""


class BundleError(FreeExportError):
    """A bundle is missing, incomplete, altered, or written by a newer version."""


class HubError(FreeExportError):
    """The hub cannot be reached, refuses a request, or sent an altered file."""


class CalibrationError(BundleError):
    """A calibration cannot be read, is for another model, or cannot be computed from the data."""


class PromptError(FreeExportError):
    """A prompt is empty, too long, not valid text, or has token ids out of range."""


class PromptLengthError(PromptError):
    """A prompt is longer than the model or the session allows."""


class CapacityError(FreeExportError):
    """The requested KV cache does not fit the bundle or into memory."""


class OptionError(FreeExportError):
    """An option is out of range or contradicts another."""


class EngineError(FreeExportError):
    """ONNX Runtime is missing, or an engine cannot be loaded or run."""


class DeviceError(EngineError):
    """A device is missing, has no suitable driver, refused a call, or was lost during work."""


class QueueFullError(FreeExportError):
    """The queue of the session is full. The request was not accepted."""


class BatchError(FreeExportError):
    """Some prompts of a list failed. The others were completed.

    Attributes:
        results: One entry per prompt, in order: its GenerationResult, or the exception that ended
            it.
    """

    def __init__(self, message: str, results: list[Any]) -> None:
        super().__init__(message)
        self.results = results


def shown(value: Any) -> str:
    """Format a value for a message: one line of at most 80 characters. Never raises."""
    if isinstance(value, str):
        value = value[:200]  # a text of megabytes takes a tenth of a second
    try:
        return cut(repr(value))
    except Exception:  # an int with too many digits for Python, or a foreign class
        return f"of type {type(value).__name__}, which cannot be printed"


def cut(text: str) -> str:
    """Return a text as one line of at most 80 characters."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 200 characters. Default: its type."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters. Default: its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
