"""A bundle on disk, checked: the manifest, the calibration, and the Beta mixture that it holds."""

from __future__ import annotations

from runtime.bundle.bundle import VERIFICATION, Bundle, engine_files, sha256_of

__all__ = ["VERIFICATION", "Bundle", "engine_files", "sha256_of"]
