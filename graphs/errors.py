"""Errors of checkpoints and graphs that are refused."""

from __future__ import annotations

from runtime.errors import FreeExportError


class UnsupportedModelError(FreeExportError):
    """The checkpoint's architecture, or an option of its configuration, has no description here."""


class GraphError(FreeExportError):
    """A graph cannot be built as asked: an exit layer out of range, a weight of the wrong shape or out of range."""


class BuildError(FreeExportError):
    """A TensorRT engine cannot be built: TensorRT is missing or too old, or refuses the graph."""
