"""Errors, as types. Every message names what was wrong, the value, and what to do."""

from __future__ import annotations

from typing import Any


class FreeExportError(Exception):
    """Base of every error this project raises on purpose; its text is one line for a person."""


class BundleError(FreeExportError):
    """A bundle is missing, incomplete, altered, or written by a newer version."""


class CalibrationError(BundleError):
    """A calibration cannot be read, is one of another model, or cannot be had from these data."""


class PromptError(FreeExportError):
    """A prompt is empty, too long, not valid text, or holds token ids out of range."""


class PromptLengthError(PromptError):
    """A prompt is longer than fits."""


class CapacityError(FreeExportError):
    """The KV cache asked for does not fit the bundle or the machine's memory."""


class OptionError(FreeExportError):
    """A generation or session option is out of range or contradicts another."""


class EngineError(FreeExportError):
    """ONNX Runtime is missing, or an engine could not be loaded or run."""


class DeviceError(EngineError):
    """A device is missing, has no driver that fits, refused a call, or was lost while it worked."""


class QueueFullError(FreeExportError):
    """The queue of the session is full; the request was not taken."""


class BatchError(FreeExportError):
    """Some prompts of a list failed; the others came to their end.

    `results` has an entry for each prompt, in order: its GenerationResult, or the exception that ended it.
    """

    def __init__(self, message: str, results: list[Any]) -> None:
        super().__init__(message)
        self.results = results


def shown(value: Any) -> str:
    """A value for a message: one line of at most 80 characters, whatever its repr does."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, or a foreign class
        return f"of type {type(value).__name__}, which cannot be printed"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(error: BaseException) -> str:
    """The message of an error in one line of at most 200 characters; its type where it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, at most 300 characters of it; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
