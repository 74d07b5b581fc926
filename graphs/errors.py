"""Errors raised for unsupported checkpoints and invalid graphs."""

from __future__ import annotations

from runtime.errors import FreeExportError


class UnsupportedModelError(FreeExportError):
    """Raised if an architecture, or an option of its configuration, is not supported."""


class GraphError(FreeExportError):
    """Raised if a graph cannot be built with the given options or weights."""


class BuildError(FreeExportError):
    """Raised if a TensorRT engine cannot be built."""
